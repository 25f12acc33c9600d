# SPDX-License-Identifier: Apache-2.0
"""What the metrics of a phase say about it: for the progress bar while it runs, and for `rlhf-fast doctor` afterwards.

The limits are rules of thumb.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

Level = Literal["good", "look", "bad"]
Rows = Sequence[Mapping[str, Any]]  # of metrics.jsonl, oldest first
FEWEST = 8  # steps before a trend is judged


class Verdict(NamedTuple):
    """The result of one check."""

    level: Level
    text: str


def graded(good: bool, tolerable: bool, text: str, advice: str) -> Verdict:
    """`text`, with advice unless it is good; bad unless it is tolerable."""
    if good:
        return Verdict("good", text)
    return Verdict("look" if tolerable else "bad", f"{text}: {advice}")


def of_sft(rows: Rows) -> Iterator[Verdict]:
    """SFT: whether the training loss falls."""
    loss = column(rows, "loss")
    if len(loss) >= FEWEST:
        first, last = mean(loss[: len(loss) // 4]), mean(loss[-(len(loss) // 4) :])
        yield graded(last < first, True, f"training loss {first:.2f} -> {last:.2f}", "it does not fall; look at lr")


def of_reward(rows: Rows) -> Iterator[Verdict]:
    """The reward model: whether it has begun to tell completions apart."""
    accuracy = column(rows, "pair_accuracy")
    if len(accuracy) >= FEWEST:
        last = mean(accuracy[-(len(accuracy) // 4) :])
        yield graded(last >= 0.6, True, f"pair accuracy of the last batches {last:.2f}", "0.5 is chance")


def of_rl(rows: Rows, kl: float | None) -> Iterator[Verdict]:
    """RL; `kl` is the latest KL from the reference, in nats per sequence."""
    if ratio := column(rows, "policy/ratio"):
        off = abs(ratio[0] - 1)
        yield graded(off < 0.1, off < 0.5, f"mean ratio of the first step {ratio[0]:.3f}", "should be near 1: lower lr")
    if kl is not None:
        wrong = "log-probs are not of the distribution that was sampled from"
        advice = wrong if kl < 0 else "far from it: raise kl_coef, lower lr"
        yield graded(-1 < kl < 40, kl > -1, f"KL {kl:.1f} nats per sequence from the reference", advice)
    if updates := column(rows, "policy/approxkl_avg"):
        update = max(updates)
        yield graded(update < 0.1, update < 1, f"largest update {update:.3g} nats per token", "lower lr or epochs")
    if explained := column(rows[-max(1, len(rows) // 4) :], "val/explained_variance"):
        text = f"the critic explains {mean(explained):.0%} of the returns"
        yield graded(mean(explained) > 0, True, text, "less than a constant would")
    if spread := column(rows, "objective/scores_std"):
        text = f"scores spread by {spread[-1]:.2g}"
        yield graded(spread[-1] > 0.05, spread[-1] > 1e-3, text, "nothing to learn from")
    accuracy = column(rows, "rewards/accuracies")
    if len(accuracy) >= FEWEST:
        last = mean(accuracy[-(len(accuracy) // 4) :])
        yield graded(
            last > 0.5, True, f"{last:.0%} of the last pairs are in the right order", "50% is chance; look at lr"
        )
    if clipped := column(rows, "objective/scores_clipped"):
        share = mean(clipped)
        text = f"score_clip clips {share:.0%} of the scores"
        yield graded(share < 0.1, share < 0.5, text, "raise it: they become equal")


def of_rl_so_far(rows: Rows) -> Iterator[Verdict]:
    """`of_rl` while it runs, and what the evaluation afterwards would show: entropy and ends of the samples."""
    kl = column(rows, "objective/kl")
    yield from of_rl(rows, kl[-1] if kl else None)
    entropy, ended = column(rows, "objective/entropy"), column(rows, "sample/ended")
    if entropy:
        yield of_entropy(entropy[0], entropy[-1])
    if ended:
        text = f"{ended[-1]:.0%} of the samples end by themselves"
        yield graded(ended[-1] > 0.5, ended[-1] > 0.1, text, "raise max_new_tokens or missing_eos_penalty")


def of_entropy(before: float, after: float) -> Verdict:
    """Whether the policy's entropy, in nats per token, collapses."""
    left = after / max(before, 1e-9)
    text = f"entropy {before:.2f} -> {after:.2f} nats per token"
    return graded(left > 0.4, left > 0.1, text, "collapsing: raise kl_coef, fewer steps")


class LiveVerdict:
    """Judges a phase after each step: what the progress bar shows."""

    def __init__(self, judge: Callable[[Rows], Iterator[Verdict]], rows: Rows = ()) -> None:
        """`rows`: metrics of the steps before, in a resumed run."""
        self.judge, self.rows = judge, list(rows)

    def after(self, metrics: Mapping[str, Any]) -> str:
        """The worst verdict after one more step, and how many others there are; empty before any check."""
        self.rows.append(metrics)
        verdicts = list(self.judge(self.rows))
        for level in ("bad", "look"):
            found = [verdict for verdict in verdicts if verdict.level == level]
            if found:
                others = sum(verdict.level != "good" for verdict in verdicts) - 1
                return f"{level}: {found[0].text}" + (f" (and {others} more)" if others else "")
        return "good so far" if verdicts else ""


def column(rows: Rows, name: str) -> list[float]:
    """The values of a metric, where it was logged."""
    return [row[name] for row in rows if row.get(name) is not None]


def mean(values: Sequence[float]) -> float:
    """Their mean."""
    return sum(values) / len(values)
