# SPDX-License-Identifier: Apache-2.0
"""`rlhf-fast doctor RUN`: which phase of a run is bad, and why.

Phases build on one another: a reward model cannot be right about samples of a broken SFT model, nor PPO against a
broken reward model. So findings are listed in the order of the phases; look at the first bad one first. Everything is
read from the run folder; the limits are rules of thumb.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from rlhf_fast.errors import UserError
from rlhf_fast.run.options import read_yaml
from rlhf_fast.run.records import read_json, read_jsonl
from rlhf_fast.run.terminal import printable
from rlhf_fast.run.verdicts import Level, column, graded, of_entropy, of_rl

from .page import PHASES, Phase

Pair = tuple[float, float]  # a figure before and after


class Finding(NamedTuple):
    """The result of one check."""

    phase: str
    level: Level
    text: str


def diagnose(folder: str | Path) -> list[Finding]:
    """Findings on every phase in a pipeline's folder, or on the one phase whose folder it is."""
    folder = Path(folder)
    phases = [(name, folder / name) for name in PHASES if (folder / name).is_dir() and name in CHECKS]
    if not phases and (name := kind_of(folder)):
        phases = [(name, folder)]
    if not phases:
        raise UserError(f"{folder} holds no run: wanted one of the folders {', '.join(CHECKS)}, or a phase's own")
    findings = []
    for name, path in phases:
        phase = Phase(path)
        if phase.summary:
            findings += [Finding(name, *finding) for finding in CHECKS[name](phase)]
        else:
            findings.append(Finding(name, "look", "has not finished (no summary.json); --resume goes on"))
    return findings


def kind_of(folder: Path) -> str:
    """The phase whose folder it is, by its summary and options; empty for a pipeline's folder and any other."""
    config = folder / "config.yaml"  # before there is a summary
    keys = {*read_json(folder / "summary.json"), *(read_yaml(config) if config.exists() else {})}
    marks = {
        "sft": {"demonstrations", "train_file"},
        "reward": {"heldout_pair_accuracy", "feedback_file"},
        "ppo": {"objective"},
    }
    return next((name for name, mark in marks.items() if mark & keys), "")


def _sft(phase: Phase) -> Iterator[tuple[Level, str]]:
    before, after = phase.summary.get("loss_before"), phase.summary.get("loss_after")
    if before is None or after is None:
        yield "look", "no held-out demonstrations (eval_file), so its perplexity is not known"
        return
    text = f"held-out perplexity {math.exp(min(before, 50)):.4g} -> {math.exp(min(after, 50)):.4g}"
    yield ("bad", f"{text}: it has learned nothing; look at lr and the data") if after >= before else ("good", text)
    training = phase.line("loss").y
    if training and after - training[-1] > 1.0:
        yield "look", f"training loss {training[-1]:.2f} is far below the held-out {after:.2f}: fewer epochs, more data"


def _reward(phase: Phase) -> Iterator[tuple[Level, str]]:
    summary = phase.summary
    accuracy, train = summary.get("heldout_pair_accuracy"), summary.get("train_pair_accuracy")
    if accuracy is None:
        yield "look", "no held-out pairs (eval_fraction), so its accuracy is not known"
    else:
        text = f"held-out pair accuracy {accuracy:.2f} on {summary.get('heldout_pairs')} pairs"
        yield graded(accuracy >= 0.65, accuracy >= 0.55, text, "0.5 is chance: more or cleaner feedback, or lr")
        if train is not None and train - accuracy > 0.2:
            yield "look", f"training pairs {train:.2f} against held-out {accuracy:.2f}: it memorises; fewer epochs"
    spread = summary.get("score_std", 1.0)
    yield graded(spread > 0.1, spread > 0.01, f"spread of raw scores {spread:.3g}", "nearly one score for all")
    gap = summary.get("read_position_gap", 0.0)
    yield graded(gap < 0.1, gap < 0.5, f"a score moves by {gap:.2g} deviations with padding", "read at a wrong token")
    error = summary.get("calibration_error")
    if error is not None:
        yield graded(error < 0.15, True, f"calibration error {error:.2f}", "over- or underconfident")
    rows = read_jsonl(phase.folder / "samples.jsonl")
    lengths = [float(len(row["completion"])) for row in rows]
    score = correlation(lengths, [row["score"] for row in rows])
    people = correlation(lengths, [row["goodness"] for row in rows])
    if score is not None and people is not None:
        text = f"score and length correlate {score:+.2f}, feedback and length {people:+.2f}"
        yield graded(abs(score) < 0.5 or abs(score - people) < 0.3, True, text, "it rewards length")


def _ppo(phase: Phase) -> Iterator[tuple[Level, str]]:
    summary = phase.summary
    rows = phase.metrics
    if summary.get("objective") != "ppo":  # another one has no critic
        rows = [{name: value for name, value in row.items() if not name.startswith("val/")} for row in rows]
    yield from of_rl(rows, summary.get("kl_final"))
    yield from _engine(phase)
    yield from _before_and_after(summary)
    samples = read_jsonl(phase.folder / "samples.jsonl")
    samples = [row for row in samples if row.get("when") == "after" and "reward" in row]
    by_length = correlation([float(len(row["completion"])) for row in samples], [row["reward"] for row in samples])
    if by_length is not None:
        yield graded(
            abs(by_length) < 0.6, True, f"reward and length of samples correlate {by_length:+.2f}", "it rewards length"
        )


def _engine(phase: Phase) -> Iterator[tuple[Level, str]]:
    """How far the log-probabilities of an engine are from the policy's. Rounding is the same from the first to the last
    step; 0.04 nats were measured in bfloat16."""
    rows = [row for row in phase.metrics if not row.get("engine/steps_behind")]  # else the policy has moved, too
    if not (gaps := column(rows, "engine/logprob_diff_mean")):
        return
    first, last = (mean(part) for part in (gaps[: max(1, len(gaps) // 4)], gaps[-max(1, len(gaps) // 4) :]))
    text = f"the engine's log-probabilities are {last:.2g} nats per token from the policy's"
    advice = "more than rounding: the engine should have the policy's dtype, best with a float32 head"
    yield graded(last < 0.06, last < 0.15, text, advice)
    if last > max(3 * first, 0.01):
        yield "bad", f"that gap grew from {first:.2g} to {last:.2g}: new weights do not all arrive in the engine"
    if counted := phase.line("engine/effective_samples").y:
        text = f"after the correction {min(counted):.0%} of the sampled tokens count"
        yield graded(min(counted) > 0.9, min(counted) > 0.5, text, "the others were too unlikely for the policy")


def _scored(reward: Pair | None, gold: Pair | None) -> Iterator[tuple[Level, str]]:
    """Of the means before and after; without both, nothing scored the samples."""
    rose = reward is not None and reward[1] > reward[0]
    if reward is not None:
        text = f"held-out reward {reward[0]:.2f} -> {reward[1]:.2f}"
        yield graded(rose, True, text, "did not rise: lr, steps, kl_coef")
    elif gold is None:
        yield "look", "nothing scores the samples of the held-out prompts: set reward_model, reward_functions or rater"
    if gold is not None:
        text = f"held-out gold {gold[0]:.2f} -> {gold[1]:.2f}"
        hacked = rose and gold[1] < gold[0]
        if reward is None:
            yield graded(gold[1] > gold[0], True, text, "did not rise: lr, steps, kl_coef")
        else:
            yield graded(not hacked, not hacked, text, "the reward rose and gold fell: it exploits the reward model")


def _before_and_after(summary: dict[str, Any]) -> Iterator[tuple[Level, str]]:
    def both(name: str) -> Pair | None:
        values = summary.get(f"{name}_before"), summary.get(f"{name}_after")
        return None if None in values else values  # type: ignore[return-value]

    reward, gold, entropy, ended = (both(name) for name in ("reward", "gold", "entropy", "ended"))
    if entropy is None and reward is None:
        yield "look", "no held-out prompts (eval_prompts_file), so only the reward it was trained on is known"
        return
    yield from _scored(reward, gold)
    if entropy is not None:
        yield of_entropy(*entropy)
    if (length := both("length")) is not None:
        change = length[1] / max(length[0], 1e-9)
        advice = "nearly empty answers score best: min_new_tokens" if change < 1 else "it rewards length"
        text = f"samples of {length[0]:.1f} -> {length[1]:.1f} tokens"
        yield graded(0.5 <= change <= 2, 0.25 <= change <= 4, text, advice)
    if (distinct := both("distinct")) is not None:
        text = f"{distinct[1]:.0%} of the samples differ from each other"
        yield graded(
            distinct[1] > 0.8 * distinct[0], distinct[1] > 0.5 * distinct[0], text, "raise kl_coef, fewer steps"
        )
    if ended is not None:
        yield graded(ended[1] > 0.7, ended[1] > 0.2, f"{ended[1]:.0%} end by themselves", "raise missing_eos_penalty")


CHECKS: dict[str, Callable[[Phase], Iterator[tuple[Level, str]]]] = {"sft": _sft, "reward": _reward, "ppo": _ppo}


def correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's r; None with fewer than eight points or where one side is constant."""
    import numpy

    if len(x) < 8 or numpy.std(x) == 0 or numpy.std(y) == 0:
        return None
    return float(numpy.corrcoef(x, y)[0, 1])


def main(arguments: Sequence[str]) -> int:
    """Print the findings; exit code 1 if one is bad."""
    parser = argparse.ArgumentParser("rlhf-fast doctor", description="Say which phase of a run is bad, and why.")
    parser.add_argument("run", help="folder of a pipeline run, or of one phase")
    findings = diagnose(parser.parse_args(list(arguments)).run)
    for finding in findings:
        print(f"{finding.phase:7}{finding.level:5} {printable(finding.text)}")
    worst = next((f for level in ("bad", "look") for f in findings if f.level == level), None)
    if worst is None:
        print("nothing stands out")
    else:
        print(f"look first at {PHASES[worst.phase]}: {printable(worst.text)}")
    return int(worst is not None and worst.level == "bad")
