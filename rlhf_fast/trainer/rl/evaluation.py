# SPDX-License-Identifier: Apache-2.0
"""Held-out prompts: evaluation before, after and every `eval_steps`, the best one, and the phase's summary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.feedback.raters import Rater
from rlhf_fast.models.batches import MicroBatch
from rlhf_fast.rollout.builtin import generate
from rlhf_fast.rollout.evaluate import evaluate, figures_of
from rlhf_fast.rollout.rollout import Sampler, SamplingParams
from rlhf_fast.run.folder import RunFolder
from rlhf_fast.run.progress import Timer, notice
from rlhf_fast.run.records import read_jsonl

from .agent import Agent, save_policy
from .prompts import Prompts

Figures = dict[str, float]
Rows = list[dict[str, Any]]  # of samples
BEST, BEST_SAMPLES = "best.json", "best_samples.jsonl"  # with keep_best


class EvalOptions(NamedTuple):
    """Options of evaluation on held-out prompts."""

    params: SamplingParams
    samples: int  # of each prompt
    micro_batch: MicroBatch
    every: int  # steps; 0: only before and after
    keep_best: bool  # save the best of the models evaluated, the last one among them, instead of the last


@dataclass
class Evaluator:
    """Evaluates the policy on held-out prompts, if there are any, always with the same seed."""

    agent: Agent
    held_out: Prompts | None
    options: EvalOptions
    run: RunFolder
    rater: Rater | None
    sampler: Sampler = generate
    best: tuple[int, float] | None = None  # step and reward of the best evaluation during the run

    def at(self, when: str, count: int | None = None) -> Figures:
        """Figures, stored in eval_<when>.json and samples.jsonl; a resumed run reads back those before training.

        `count`: of the first prompts alone, with the random numbers that they have among all.
        """
        if self.held_out is None:
            return {}
        if when == "before" and self.run.resume and (self.run.path / "eval_before.json").exists():
            return self.run.read_json("eval_before.json")
        figures, rows = self._measure(self.held_out, count)
        self._write(when, figures, rows)
        return figures

    def _measure(self, held_out: Prompts, count: int | None) -> tuple[Figures, Rows]:
        options = self.options
        with self.agent.keep_reference():
            figures, rows = evaluate(
                self.agent.policy,
                self.agent.reference,
                None if self.agent.rewards.reader is not None else self.agent.rewards.model,
                self.agent.tokenizer,
                held_out.lines[:count],
                held_out.ids[:count],
                options.params,
                samples=options.samples,
                micro_batch=options.micro_batch,
                total=None if count is None else len(held_out.lines),
                rater=self.rater,
                sampler=self.sampler,
            )
        return figures | self.agent.rewards.add_to(rows, held_out.lines[:count]), rows

    def _write(self, when: str, figures: Figures, rows: Rows) -> None:
        """eval_<when>.json, and the rows in samples.jsonl, where those before come first."""
        if when in ("before", "after"):
            kept = 0 if when == "before" else len(self._before_rows())
            self.run.append_jsonl("samples.jsonl", [{"when": when, **row} for row in rows], kept)
        self.run.write_json(f"eval_{when}.json", figures)

    def at_end(self, step: int, before: Figures, fitting: Callable[..., int]) -> tuple[Figures, Figures]:
        """Figures before and after, of the same prompts: those of all that `fitting` says there is time for.

        After: of the model in model/, which with keep_best may be that of an earlier step. The policy of the last
        `step` competes for it as well, if there is time for all prompts (`fitting(prompts, whole=True)`): on a part of
        them chance would decide. eval_before.json and samples.jsonl keep those of all before, for a longer run that
        resumes with time for more.
        """
        if self.held_out is None:
            return before, {}
        before_rows = self._before_rows()
        # Earlier versions may have kept fewer.
        known = len(before_rows) // self.options.samples or len(self.held_out.lines)
        if self.options.keep_best:
            self._compete(step, known, fitting)
            count, after = self._best_after(known)
        else:
            count = min(fitting(len(self.held_out.lines)), known)
            after = self.at("after", self._part(count))
        if before_rows and self._part(count) is not None:
            before = figures_of(before_rows[: count * self.options.samples])
        return before, after

    def _compete(self, step: int, known: int, fitting: Callable[..., int]) -> None:
        """Evaluate the policy of the last step, unless that is done or there is a best one and too little time."""
        assert self.held_out is not None
        if self.best is None:
            self.at_step(step, self._part(min(fitting(len(self.held_out.lines)), known)))
        elif not self.due(step) and fitting(len(self.held_out.lines), whole=True):
            self.at_step(step)

    def _part(self, count: int) -> int | None:
        """As `at` takes it: None for all prompts."""
        assert self.held_out is not None
        return count if count < len(self.held_out.lines) else None

    def _best_after(self, count: int) -> tuple[int, Figures]:
        """Write what the best policy sampled as that after training: (of how many of `count` prompts, figures)."""
        assert self.best is not None
        step, reward = self.best
        rows = read_jsonl(self.run.path / BEST_SAMPLES)  # none in a run of an earlier version
        part = rows[: count * self.options.samples]
        figures = self.run.read_json(f"eval_step-{step}.json") if len(part) == len(rows) else figures_of(part)
        self._write("after", figures, part)
        notice(f"model/ is that of step {step}, whose held-out reward was the highest: {reward:.4g}")
        return len(part) // self.options.samples or count, figures

    def _before_rows(self) -> Rows:
        return [row for row in read_jsonl(self.run.path / "samples.jsonl") if row.get("when") == "before"]

    def due(self, step: int) -> bool:
        """Whether to evaluate after `step` steps."""
        return self.held_out is not None and self.options.every > 0 and step % self.options.every == 0

    def at_step(self, step: int, count: int | None = None) -> Figures:
        """Figures of a step as metrics `eval/...`; with keep_best the best model so far is saved in model/."""
        if self.held_out is None:
            return {}
        figures, rows = self._measure(self.held_out, count)
        self._write(f"step-{step}", figures, rows)
        if self.options.keep_best and ranks().once(lambda: self._is_best(figures, rows)):  # before a file is replaced
            if ranks().main:  # no best until the files below belong together
                (self.run.path / BEST).unlink(missing_ok=True)
            self.run.append_jsonl(BEST_SAMPLES, rows, keep_lines=0)
            save_policy(self.agent, self.run)
            self.best = step, figures["reward"]
            self.run.write_json(BEST, {"step": step, "reward": figures["reward"]})
        return {f"eval/{name}": value for name, value in figures.items()}

    def best_step(self) -> dict[str, int]:
        """For the summary: the step whose policy is in model/, with keep_best."""
        return {} if self.best is None else {"best_step": self.best[0]}

    def _is_best(self, figures: Figures, rows: Rows) -> bool:
        """Whether a reward is the highest so far, of the prompts that both evaluations have."""
        if self.best is None:
            return True
        best = read_jsonl(self.run.path / BEST_SAMPLES)
        if len(best) in (0, len(rows)):  # 0: a run of an earlier version, whose evaluations were of all prompts
            return figures["reward"] > self.best[1]
        common = min(len(best), len(rows))
        return figures_of(rows[:common])["reward"] > figures_of(best[:common])["reward"]

    def missed(self, step: int) -> bool:
        """Whether the step that a run resumes from is still to be evaluated: the run ended by an error of that."""
        if not step or not self.due(step):
            return False
        return ranks().once(lambda: not any(name.startswith("eval/") for name in self.run.last_metrics()))

    def resume(self, step: int) -> None:
        """Restore the best evaluation up to the step that a run resumes from, and remove the files of later ones.

        Steps after the checkpoint are repeated, maybe with changed options, so what they left says nothing any more.
        """
        if ranks().main:
            for path in self.run.path.glob("eval_step-[0-9]*.json"):
                if int(path.stem.rpartition("-")[2]) > step:
                    path.unlink()
        if self.options.keep_best and (self.run.path / BEST).exists():
            best = self.run.read_json(BEST)
            if int(best["step"]) <= step:
                self.best = int(best["step"]), float(best["reward"])
            else:
                notice(
                    f"the best model so far was that of step {best['step']}, after the checkpoint of step {step}: the "
                    "best is sought anew from here"
                )
        ranks().wait()


def summarise(
    summary: dict[str, Any], run: RunFolder, timer: Timer, before: Figures, after: Figures, metrics: Figures
) -> dict[str, Any]:
    """Complete `summary`, write it to summary.json and return it.

    Every figure of the evaluation before and after, the KL at the end, and where the time went.
    """
    for name in dict.fromkeys([*before, *after]):
        summary[f"{name}_before"], summary[f"{name}_after"] = before.get(name), after.get(name)
    summary["kl_final"] = after.get("kl", metrics.get("objective/kl"))
    summary["seconds"] = timer.elapsed()
    summary["seconds_by_part"] = {part: seconds for part, seconds in timer.parts().items() if part != "step"}
    run.finish(summary)
    return summary
