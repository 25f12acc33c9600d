# SPDX-License-Identifier: Apache-2.0
"""Small SVG charts for the report, drawn by matplotlib, for use inline in a page.

Text and axes take the page's colour (`currentColor`) and the page's font, so one chart suits light and
dark pages.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

BLUE, ORANGE, GREEN, GREY = "#3b82f6", "#f97316", "#10b981", "#8b93a1"
_INK, _GRID = "#010203", "#040506"  # placeholders, replaced by the page's colours
SIZE = (4.3, 2.55)  # inches


class Line(NamedTuple):
    """One curve; `marks` draws each point, with a dotted line between them."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: str = BLUE
    marks: bool = False


def lines(curves: Sequence[Line], xlabel: str = "step", zero: bool = False) -> str:
    """Curves over a common x, with a legend if there are several; `zero` marks y = 0."""

    def draw(axes: Any) -> None:
        for curve in curves:
            style = (
                {"marker": "o", "linestyle": ":", "linewidth": 1, "markersize": 6}
                if curve.marks
                else {"linewidth": 1.8}
            )
            axes.plot(curve.x, curve.y, color=curve.color, label=curve.label, zorder=3, **style)
        if zero:
            axes.axhline(0, color=_INK, linewidth=0.7, alpha=0.5)
        axes.set_xlabel(xlabel)
        if len(curves) > 1:
            axes.legend(frameon=False, labelcolor=_INK)

    return _svg(draw)


def histogram(groups: Sequence[tuple[str, Sequence[float], str]], xlabel: str, split: float | None = None) -> str:
    """Overlaid histograms of (label, values, color) on common bins; `split` draws a vertical line there."""

    def draw(axes: Any) -> None:
        values = [v for _, group, _ in groups for v in group]
        low, high = min(values), max(values)
        width = max(high - low, 1e-6) / 20
        edges = [low + i * width for i in range(21)]
        for label, group, color in groups:
            axes.hist(group, bins=edges, color=color, alpha=0.65, label=label, zorder=3)
        if split is not None:
            axes.axvline(split, color=_INK, linewidth=0.8, alpha=0.6, zorder=4)
        axes.set_xlabel(xlabel)
        if len(groups) > 1:
            axes.legend(frameon=False, labelcolor=_INK)

    return _svg(draw)


def scatter(
    x: Sequence[float], y: Sequence[float], xlabel: str, ylabel: str, color_by: Sequence[float] | None = None
) -> str:
    """Points; with `color_by` a line connects them in order, and their colour goes from blue to orange as it grows."""

    def draw(axes: Any) -> None:
        if color_by is None:
            axes.scatter(x, y, s=14, color=BLUE, alpha=0.6, linewidths=0, zorder=3)
        else:
            from matplotlib.colors import LinearSegmentedColormap

            colors = LinearSegmentedColormap.from_list("time", [BLUE, ORANGE])
            axes.plot(x, y, color=GREY, linewidth=0.7, alpha=0.7, zorder=2)
            axes.scatter(x, y, s=22, c=color_by, cmap=colors, linewidths=0, zorder=3)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)

    return _svg(draw)


class Span(NamedTuple):
    """From `start` to `end`, in seconds, with a label above."""

    start: float
    end: float
    color: str
    label: str = ""


def spans(rows: Mapping[str, Sequence[Span]]) -> str:
    """What each of several did over a common time; the first on top."""

    def draw(axes: Any) -> None:
        for place, row in enumerate(rows.values()):
            for span in row:
                axes.barh(-place, span.end - span.start, left=span.start, height=0.6, color=span.color, zorder=3)
                axes.text((span.start + span.end) / 2, -place + 0.42, span.label, ha="center", fontsize=8)
        axes.set_yticks([-place for place in range(len(rows))], list(rows))
        axes.set_xlabel("seconds; the numbers are the steps that samples are for")

    return _svg(draw)


def frontiers(paths: Sequence[Line], xlabel: str, ylabel: str) -> str:
    """Points of each run, and as a stepped line the largest y that it reached within each x."""

    def draw(axes: Any) -> None:
        for path in paths:
            axes.scatter(path.x, path.y, s=10, color=path.color, alpha=0.35, linewidths=0, zorder=2)
            points = frontier(path.x, path.y)
            axes.step(*zip(*points, strict=True), where="post", color=path.color, label=path.label, zorder=3)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.legend(frameon=False, labelcolor=_INK)

    return _svg(draw)


def frontier(x: Sequence[float], y: Sequence[float]) -> list[tuple[float, float]]:
    """The points (x, y) with a larger y than all points of smaller x, in the order of x, up to the largest x."""
    best: list[tuple[float, float]] = []
    for point in sorted(zip(x, y, strict=True), key=lambda point: (point[0], -point[1])):
        if not best or point[1] > best[-1][1]:
            best.append(point)
    return [*best, (max(x), best[-1][1])]


def _svg(draw: Callable[[Any], None]) -> str:
    """Run `draw(axes)` in our style and return an `<svg>` element that scales with its container."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",  # real text, in the page's font
        "font.size": 9,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "axes.edgecolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "axes.grid": True,
        "grid.color": _GRID,
        "grid.linewidth": 0.7,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.linewidth": 0.7,
        "legend.fontsize": 8.5,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=SIZE, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor").replace(_GRID, "var(--line)")
    text = re.sub(r"<(metadata|style).*?</\1>|font-family: [^;]*; ", "", text, flags=re.DOTALL)
    return re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', text, count=1)
