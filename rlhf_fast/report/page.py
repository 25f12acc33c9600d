# SPDX-License-Identifier: Apache-2.0
"""report.html: a whole pipeline run on one self-contained page, readable on a phone, in light and dark.

Everything is read back from the run folder (metrics.jsonl, samples.jsonl, summary.json of each phase), so
a report can be written again later, or for a run that stopped early; missing parts are left out.
Text from models, files and people is escaped.
"""

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_fast.data.examples import prompt_text
from rlhf_fast.errors import UserError
from rlhf_fast.run.checkpoint import write_text
from rlhf_fast.run.records import read_json, read_jsonl

from . import plots
from .elements import PAGE, STYLE, card, escaped, grid, section, tile
from .plots import BLUE, GREEN, GREY, ORANGE, Line
from .timeline import timeline

PHASES = {"sft": "Supervised fine-tuning", "collect": "Feedback", "reward": "Reward model", "ppo": "PPO"}
SHOWN_SAMPLES = 12
OF_PAIRS = {f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")}  # not of a reward


class Phase:
    """The files of one phase's folder."""

    def __init__(self, folder: Path) -> None:
        """Read it; missing files count as empty."""
        self.name = folder.name
        self.folder = folder
        self.metrics = read_jsonl(folder / "metrics.jsonl")
        self.summary: dict[str, Any] = read_json(folder / "summary.json")

    def line(self, metric: str, label: str = "", color: str = BLUE, marks: bool = False) -> Line:
        """The curve of a metric over the steps."""
        rows = [row for row in self.metrics if row.get(metric) is not None]
        return Line(label or metric, [row["step"] for row in rows], [row[metric] for row in rows], color, marks)

    def chart(self, title: str, caption: str, *curves: Line, zero: bool = False) -> str:
        """A card with the curves that have points; an empty string if none has."""
        drawn = [curve for curve in curves if curve.x]
        return card(title, caption, plots.lines(drawn, zero=zero)) if drawn else ""


def write_report(folder: str | Path) -> Path:
    """Write `report.html` into the folder of a pipeline run and return its path; UserError if it holds none."""
    folder = Path(folder)
    phases = {name: Phase(folder / name) for name in PHASES if (folder / name).is_dir()}
    if not phases:
        raise UserError(f"{folder} holds no run: wanted one of the folders {', '.join(PHASES)}")
    summary = read_json(folder / "summary.json")
    sections = {"sft": _sft, "collect": _collect, "reward": _reward, "ppo": _ppo}
    body = [
        _header(folder, phases, summary),
        *(section(name, PHASES[name], sections[name](phase)) for name, phase in phases.items()),
        section("time", "Where the time went", _time(phases)),
        section("setup", "Configuration, backend, versions", _setup(folder, summary)),
    ]
    page = PAGE.format(title=escaped(f"{folder.name}: rlhf_fast report"), style=STYLE, body="\n".join(body))
    path = folder / "report.html"
    write_text(path, page)
    return path


def _header(folder: Path, phases: dict[str, Phase], summary: dict[str, Any]) -> str:
    sft, reward, ppo = (phases[n].summary if n in phases else {} for n in ("sft", "reward", "ppo"))
    seconds = summary.get("seconds", {}).get("total")
    tiles = [
        tile("held-out loss", sft.get("loss_before"), sft.get("loss_after"), "nats per token, SFT"),
        tile("pair accuracy", None, reward.get("heldout_pair_accuracy"), "reward model, held-out prompts"),
        tile("reward", ppo.get("reward_before"), ppo.get("reward_after"), "held-out prompts, normalised"),
        tile("gold", ppo.get("gold_before"), ppo.get("gold_after"), "held-out prompts, simulated rater"),
        tile("KL", None, ppo.get("kl_final"), "nats per sequence from the SFT model"),
        tile("time", None, seconds, "seconds in all", digits=0),
    ]
    model = f"<p class='lead'>{escaped(summary['model'])}</p>" if "model" in summary else ""
    return f"<header><h1>{escaped(folder.name)}</h1>{model}<div class='tiles'>{''.join(tiles)}</div></header>"


def _sft(phase: Phase) -> str:
    held_out = phase.line("eval/nll", "held out", ORANGE, marks=True)
    loss = phase.line("loss", "training")
    caption = "Nats per completion token, the end-of-sequence token included."
    return grid(phase.chart("Loss", caption, loss, held_out))


def _collect(phase: Phase) -> str:
    rows = read_jsonl(phase.folder / "feedback.jsonl")
    ratings = [rating for row in rows for rating in row.get("ratings") or []]
    if not rows:
        return ""
    count = sum(len(row["completions"]) for row in rows)
    rater = rows[0].get("annotator") or "nobody yet"
    ended = [e for row in rows for e in row.get("ended") or []]
    text = f"{count} completions of {len(rows)} prompts, rated by {rater}."
    if ended:
        text += f" {sum(ended) / len(ended):.0%} ended by themselves."
    chart = card(
        "Ratings",
        "The rater's numbers for the fine-tuned model.",
        plots.histogram([("", ratings, BLUE)], "rating"),
    )
    return f"<p>{escaped(text)}</p>" + grid(chart if ratings else "")


def _reward(phase: Phase) -> str:
    rows = read_jsonl(phase.folder / "samples.jsonl")
    cards = [
        phase.chart("Loss", "Logistic loss over the pairs of a ranking; 0.693 is chance.", phase.line("loss")),
        phase.chart(
            "Pair accuracy",
            "How often the better completion scores higher.",
            phase.line("pair_accuracy", "training batch"),
            phase.line("eval/pair_accuracy", "held out", ORANGE, marks=True),
        ),
    ]
    if rows:
        scores, goodness = [row["score"] for row in rows], [row["goodness"] for row in rows]
        cards.append(
            card("Scores", "Held-out completions, normalised.", plots.histogram([("", scores, BLUE)], "score"))
        )
        margins = _margins(rows)
        if margins:
            caption = "Score of the better minus the worse one, held-out pairs; left of the line the model is wrong."
            cards.append(card("Margins", caption, plots.histogram([("", margins, GREEN)], "margin", split=0.0)))
        if bins := phase.summary.get("calibration"):
            x, y = ([entry[name] for entry in bins] for name in ("predicted", "observed"))
            curves = [Line("held-out pairs", x, y, marks=True), Line("perfect", [0.5, 1.0], [0.5, 1.0], GREY)]
            caption = "How often the model prefers the better completion, against the probability it gives its choice."
            cards.append(card("Calibration", caption, plots.lines(curves, "confidence")))
        caption = "Each point is a held-out completion (ratings, or negated ranks)."
        cards.append(card("Score against feedback", caption, plots.scatter(goodness, scores, "feedback", "score")))
    return grid(*cards)


def _margins(rows: list[dict[str, Any]]) -> list[float]:
    """Score of the better minus that of the worse completion, for every pair of one prompt that is not a tie."""
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_prompt.setdefault(json.dumps(row["prompt"]), []).append(row)
    return [
        a["score"] - b["score"]
        for group in by_prompt.values()
        for a in group
        for b in group
        if a["goodness"] > b["goodness"]
    ]


def _ppo(phase: Phase) -> str:
    last = max((row["step"] for row in phase.metrics), default=0)
    last = phase.summary.get("best_step", last)  # with keep_best the figures after are of that step's policy
    before, after = (read_json(phase.folder / f"eval_{when}.json") for when in ("before", "after"))

    def held_out(name: str, label: str, color: str) -> Line:
        points = [(x, figures[name]) for x, figures in ((0, before), (last, after)) if name in figures]
        return Line(label, [x for x, _ in points], [y for _, y in points], color, marks=True)

    line, chart = phase.line, phase.chart
    gold = held_out("gold", "simulated rater", GREEN)
    reward, kl = line("objective/scores"), line("objective/kl")
    cards = [
        chart(
            "Reward",
            "Score of each step's samples, and the reward after the KL penalty.",
            line("objective/scores", "score"),
            line("objective/rlhf_reward", "reward with KL", GREY),
            held_out("reward", "held out", ORANGE),
            zero=True,
        ),
        chart("Gold", "The simulated rater on held-out prompts; never trained on.", gold, zero=True),
        chart(
            "KL",
            "Nats per sequence from the frozen SFT model.",
            line("objective/kl", "samples"),
            held_out("kl", "held out", ORANGE),
        ),
        chart("Entropy", "Nats per token.", line("objective/entropy")),
        *_terms(phase),
        chart("Length", "Tokens in a completion.", line("sample/length")),
        chart("Clip fraction", "Share of tokens whose ratio was clipped.", line("policy/clipfrac_avg")),
        chart(
            "Explained variance",
            "Of the returns, by the critic; 1 is perfect.",
            line("val/explained_variance"),
            zero=True,
        ),
    ]
    if reward.x and len(reward.x) == len(kl.x):
        caption = "The path of training, blue to orange: score gained for each nat of divergence."
        cards.append(
            card("Reward against KL", caption, plots.scatter(kl.y, reward.y, "KL", "score", color_by=reward.x))
        )
    cards.append(timeline(phase.metrics))
    rows = read_jsonl(phase.folder / "samples.jsonl")
    return grid(*cards) + _extremes([row for row in rows if "reward" in row]) + _samples(rows)


def _terms(phase: Phase) -> list[str]:
    """Charts of what `rewards/` holds: each term of the reward, and the pairs of dpo."""
    margin = "Of dpo: kl_coef times log p / p_ref of the better completion less that of the worse."
    names = {name for row in phase.metrics for name in row if name.startswith("rewards/")} - OF_PAIRS
    return [
        *[
            phase.chart(
                f"Reward: {escaped(name.partition('/')[2])}",
                "Before its weight, mean of each step's samples.",
                phase.line(name),
            )
            for name in sorted(names)
        ],
        phase.chart("Margin", margin, phase.line("rewards/margins"), zero=True),
        phase.chart("Pairs", "Share of pairs in the right order.", phase.line("rewards/accuracies")),
    ]


def _samples(rows: Sequence[dict[str, Any]]) -> str:
    """Completions of held-out prompts before and after, side by side: the first sample of each prompt."""
    first: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        first.setdefault(prompt_text(row["prompt"]), {}).setdefault(row["when"], row)
    pairs = [(prompt, both) for prompt, both in first.items() if "before" in both]
    if not pairs:
        return ""
    entries = [
        f"<tr><th scope='row'>{escaped(prompt)}</th>{_sample(both.get('before'))}{_sample(both.get('after'))}</tr>"
        for prompt, both in pairs
    ]
    table = _sample_table(entries[:SHOWN_SAMPLES])
    if rest := entries[SHOWN_SAMPLES:]:
        table += f"<details><summary>{len(rest)} more</summary>{_sample_table(rest)}</details>"
    return f"<h3>Held-out samples, before and after</h3>{table}"


def _extremes(rows: Sequence[dict[str, Any]]) -> str:
    """The best, median and worst sample by reward, before and after, of prompts that have both."""
    after = {prompt_text(row["prompt"]) for row in rows if row["when"] == "after"}
    rows = [row for row in rows if prompt_text(row["prompt"]) in after]
    ordered = {
        when: sorted((row for row in rows if row["when"] == when), key=lambda row: -row["reward"])
        for when in ("before", "after")
    }
    if not all(ordered.values()):
        return ""
    entries = []
    for name, place in (("best", 0.0), ("median", 0.5), ("worst", 1.0)):
        picked = [ordered[when][round(place * (len(ordered[when]) - 1))] for when in ("before", "after")]
        cells = "".join(
            _sample({**row, "completion": f"{prompt_text(row['prompt'])} {row['completion']}"}) for row in picked
        )
        entries.append(f"<tr><th scope='row'>{name}</th>{cells}</tr>")
    return f"<h3>Best, median and worst by reward</h3>{_sample_table(entries, '')}"


def _sample_table(entries: list[str], first: str = "prompt") -> str:
    head = f"<thead><tr><th>{first}</th><th>before</th><th>after</th></tr></thead>"
    return f"<table class='samples'>{head}<tbody>{''.join(entries)}</tbody></table>"


def _sample(row: dict[str, Any] | None) -> str:
    if row is None:
        return "<td></td>"
    figures = [f"{name} {row[name]:+.2f}" for name in ("reward", "gold") if name in row]
    figures += [
        f"{escaped(name.partition('/')[2])} {value:+.2f}" for name, value in row.items() if name.startswith("rewards/")
    ]
    end = "" if row["ended"] else "<span class='cut' title='cut at max_new_tokens'> ...</span>"
    return f"<td>{escaped(row['completion'].strip())}{end}<small>{', '.join(figures)}</small></td>"


def _time(phases: dict[str, Phase]) -> str:
    """One bar for each phase, divided into its parts."""
    totals = {name: float(phase.summary.get("seconds", 0.0)) for name, phase in phases.items()}
    longest = max([*totals.values(), 1e-9])
    bars = []
    for name, phase in phases.items():
        parts = sorted(phase.summary.get("seconds_by_part", {}).items(), key=lambda part: -part[1])
        pieces = "".join(
            f"<i style='width:{100 * seconds / longest:.2f}%;opacity:{max(0.25, 1 - 0.13 * i):.2f}'></i>"
            for i, (_, seconds) in enumerate(parts)
        )
        listed = ", ".join(f"{part} {seconds:.1f}" for part, seconds in parts)
        bars.append(
            f"<div class='time'><b>{name}</b><span>{totals[name]:.1f} s</span><div class='bar'>{pieces}</div>"
            f"<small>{escaped(listed)}</small></div>"
        )
    return "".join(bars)


def _setup(folder: Path, summary: dict[str, Any]) -> str:
    config = folder / "config.yaml"
    text = config.read_text(encoding="utf-8") if config.exists() else ""
    rows = {**_versions(), **{f"op {op}": backend for op, backend in summary.get("backend", {}).items()}}
    table = "".join(f"<tr><th scope='row'>{escaped(k)}</th><td>{escaped(v)}</td></tr>" for k, v in rows.items())
    details = f"<details><summary>config.yaml</summary><pre>{escaped(text)}</pre></details>" if text else ""
    return f"<table class='facts'><tbody>{table}</tbody></table>{details}"


def _versions() -> dict[str, str]:
    import torch
    import transformers

    import rlhf_fast

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {
        "rlhf_fast": rlhf_fast.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {device}",
    }
