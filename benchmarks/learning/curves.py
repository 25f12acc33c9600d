# SPDX-License-Identifier: Apache-2.0
"""The table and the figure of docs/learning.md, from the measured curves."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

Curves = list[list[dict[str, Any]]]  # one curve a seed
RL_TASKS = ("dpo", "ppo", "grpo", "rloo")
PEER = {"ppo": "one-file PPO"}
METRICS = {"reward": "reward", "kl": "KL, nats a sequence", "entropy": "entropy, nats a token", "length": "tokens"}
SMOOTHED = 16  # training losses are means of so many steps


def read(results: Path, task: str, side: str) -> Curves:
    return [json.loads(p.read_text())["curve"] for p in sorted(results.glob(f"{task}-{side}-*.json"))]


def band(values: list[float]) -> str:
    return f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def reward_at(curve: list[dict[str, Any]], kl: float) -> float:
    """The reward where the curve first reaches so much KL, between measurements by a straight line; else its last."""
    for before, after in zip(curve, curve[1:], strict=False):
        if before["kl"] <= kl <= after["kl"]:
            share = (kl - before["kl"]) / max(after["kl"] - before["kl"], 1e-9)
            return float(before["reward"] + share * (after["reward"] - before["reward"]))
    return float(curve[-1]["reward"])


def steps_to(curve: list[dict[str, Any]], reward: float) -> float:
    """The first measured step with so much reward; infinity if there is none."""
    return float(next((row["step"] for row in curve if row["reward"] >= reward), float("inf")))


def verdict(ours: list[float], theirs: list[float], higher: bool = True) -> str:
    sign = 1 if higher else -1
    if sign * mean(ours) > sign * max(theirs, key=lambda x: sign * x):
        return "better"
    return "inside" if min(theirs) <= mean(ours) <= max(theirs) else "**outside**"


def rl_rows(results: Path) -> list[str]:
    rows = []
    for task in RL_TASKS:
        ours, theirs = read(results, task, "rlhf_fast"), read(results, task, "other")
        if not ours or not theirs:
            continue
        kl = min(max(row["kl"] for row in curve) for curve in [*ours, *theirs])
        start = mean(curve[0]["reward"] for curve in theirs)
        goal = start + 0.9 * (mean(curve[-1]["reward"] for curve in theirs) - start)
        at = [[reward_at(c, kl) for c in side] for side in (ours, theirs)]
        steps = [[steps_to(c, goal) for c in side] for side in (ours, theirs)]
        names = ("rlhf_fast", PEER.get(task, "TRL"))
        for name, side, same, first in zip(names, (ours, theirs), at, steps, strict=True):
            last = {key: [curve[-1][key] for curve in side] for key in METRICS}
            cells = [task.upper(), name, len(side), band(last["reward"]), f"{band(same)} at {kl:.1f}"]
            cells += [f"{mean(first):.0f} ({min(first):.0f} to {max(first):.0f})", band(last["kl"])]
            cells += [f"{mean(last['entropy']):.2f}", f"{mean(last['length']):.1f}"]
            cells.append(verdict(at[0], at[1]) if name == "rlhf_fast" else "")
            rows.append(f"| {' | '.join(map(str, cells))} |")
    return rows


def other_rows(results: Path) -> list[str]:
    rows = []
    for task, keys in (("sft", ("nll",)), ("reward", ("accuracy", "loss"))):
        ours, theirs = ([c[-1] for c in read(results, task, side)] for side in ("rlhf_fast", "other"))
        for key in keys if ours and theirs else ():
            own, other = [row[key] for row in ours], [row[key] for row in theirs]
            judged = verdict(own, other, higher=key == "accuracy")
            rows.append(f"| {task} | held-out {key} | {band(own)} | {band(other)} | {judged} |")
    return rows


def report(results: Path, figure: Path) -> None:
    columns = [
        "",
        "",
        "seeds",
        "final reward",
        "reward at one KL",
        "steps to 90 %",
        "final KL",
        "entropy",
        "length",
        "",
    ]
    print(f"\n| {' | '.join(columns)} |\n| --- | --- |{' ---: |' * 7} --- |")
    print("\n".join(rl_rows(results)))
    print("\n| | figure | rlhf_fast | TRL | |\n| --- | --- | ---: | ---: | --- |")
    print("\n".join(other_rows(results)))
    draw(results, figure)


def shown(task: str, curve: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values; losses of single batches as means of several."""
    points = [(row["step"], row[key]) for row in curve if key in row]
    if key == "train loss":
        groups = [points[i : i + SMOOTHED] for i in range(0, len(points) - SMOOTHED + 1, SMOOTHED)]
        points = [(mean(s for s, _ in g), mean(v for _, v in g)) for g in groups]
    return [s for s, _ in points], [v for _, v in points]


def draw(results: Path, figure: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [(task, key) for key in METRICS for task in RL_TASKS] + [("sft", "nll"), ("reward", "train loss")]
    fig, axes = plt.subplots(5, 4, figsize=(11, 11), constrained_layout=True)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for (task, key), axis in zip(panels, axes.flat, strict=False):
        for side, color in (("other", "tab:gray"), ("rlhf_fast", "tab:blue")):
            made = [shown(task, curve, key) for curve in read(results, task, side)]
            if not made:
                continue
            steps, rows = made[0][0], list(zip(*(values for _, values in made), strict=False))
            name = "rlhf_fast" if side == "rlhf_fast" else PEER.get(task, "TRL")
            axis.plot(steps, [mean(row) for row in rows], color=color, label=name, linewidth=1.3)
            axis.fill_between(steps, list(map(min, rows)), list(map(max, rows)), color=color, alpha=0.2, linewidth=0)
        axis.set_title(f"{task.upper()}: {METRICS.get(key, key)}", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.legend(fontsize=6)
    fig.savefig(figure, dpi=80)
