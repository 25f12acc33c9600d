# SPDX-License-Identifier: Apache-2.0
"""Scaling and memory as pictures, with the machine's limit drawn in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = {"native": "#0b6e4f", "eager": "#b23a48"}
LABELS = {"native": "rlhf_fast", "eager": "eager PyTorch"}


def draw(name: str, report: dict[str, Any], folder: Path) -> None:
    """Writes <name>-scaling.png and <name>-memory.png."""
    import matplotlib

    matplotlib.use("Agg")
    if report.get("scaling"):
        _scaling(report["scaling"]).savefig(folder / f"{name}-scaling.png", dpi=110)
    if report.get("memory"):
        _memory(report["memory"]).savefig(folder / f"{name}-memory.png", dpi=110)


def _panels(titles: list[str], columns: int) -> tuple[Any, list[Any]]:
    import matplotlib.pyplot as plt

    rows = -(-len(titles) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 3.4 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(titles) :]:
        axis.set_visible(False)
    for axis, title in zip(axes.flat, titles, strict=False):
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    return figure, list(axes.flat)


def _scaling(rows: list[dict[str, Any]]) -> Any:
    sweeps: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        sweeps.setdefault(row["sweep"], []).append(row)
    figure, axes = _panels(list(sweeps), 3)
    for axis, points in zip(axes, sweeps.values(), strict=False):
        for provider, colour in COLOURS.items():
            line = [(p["at"], p["seconds"][provider]) for p in points if provider in p["seconds"]]
            axis.plot(*zip(*line, strict=True), "o-", color=colour, markersize=3, label=LABELS[provider])
        axis.plot([p["at"] for p in points], [p["limit"] for p in points], "k--", lw=1, label="read bandwidth")
        axis.set_yscale("log")
        axis.set_ylabel("seconds")
        axis.set_xlabel(points[0]["axis"])
        if points[0]["axis"] == "threads":
            axis.set_xticks([p["at"] for p in points])
        else:
            axis.set_xscale("log", base=2)
    axes[0].legend(fontsize=8)
    return figure


def _memory(rows: list[dict[str, Any]]) -> Any:
    ops = list(dict.fromkeys(row["op"] for row in rows))
    figure, axes = _panels([f"{op}, forward + backward" for op in ops], 2)
    for axis, op in zip(axes, ops, strict=False):
        for provider, colour in COLOURS.items():
            line = [(r["rows"], r["extra_bytes"] / 2**20) for r in rows if (r["op"], r["provider"]) == (op, provider)]
            axis.plot(*zip(*line, strict=True), "o-", color=colour, markersize=3, label=LABELS[provider])
        axis.set_xlabel("N")
        axis.set_ylabel("peak extra MiB")
        axis.set_ylim(bottom=0)
    axes[0].legend(fontsize=8)
    return figure
