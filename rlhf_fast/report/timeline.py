# SPDX-License-Identifier: Apache-2.0
"""What server and trainer did at the same time, in a run with one_step_ahead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .elements import card
from .plots import BLUE, GREEN, GREY, ORANGE, Span, spans

STEPS = 6  # shown, the last ones
BETWEEN = ("reward", "old_logprobs", "reference", "critic", "advantages")  # parts of a step, in this order


def timeline(rows: Sequence[Mapping[str, Any]]) -> str:
    """A card with the last steps' times; an empty string if no step was sampled ahead."""
    rows = [row for row in rows if "time/engine_began" in row]
    if not rows:
        return ""
    sampled = sum(row["time/engine_ended"] - row["time/engine_began"] for row in rows)
    waited = sum(row["time/engine_wait"] for row in rows)
    rows = _together(rows)[-STEPS:]
    server = [Span(row["time/engine_began"], row["time/engine_ended"], BLUE, str(row["step"])) for row in rows]
    learner = [span for row in rows for span in _step(row)]
    caption = (
        f"The last {len(rows)} steps. The server sampled for {sampled:.1f} s of the run; the trainer (green: update, "
        f"grey: scores and log-probabilities) waits for {waited:.1f} s (orange): {_hidden(sampled, waited)} of the "
        "sampling is hidden."
    )
    return card("Sampling and learning", caption, spans({"server": server, "trainer": learner}))


def _hidden(sampled: float, waited: float) -> str:
    return f"{max(0.0, 1 - waited / max(sampled, 1e-9)):.0%}"


def _together(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows since the last resumption, at which clocks begin anew."""
    begins = [i for i in range(1, len(rows)) if rows[i]["time/step_began"] < rows[i - 1]["time/step_began"]]
    return list(rows[begins[-1] :] if begins else rows)


def _step(row: Mapping[str, Any]) -> list[Span]:
    """The trainer's parts of a step, one after the other."""
    place = row["time/step_began"]
    parts = [("time/engine_wait", ORANGE)]
    parts += [(f"time/{part}", GREY) for part in BETWEEN]
    parts += [("time/update", GREEN)]
    lengths = [(row.get(name, 0.0), color) for name, color in parts]
    lengths.insert(1, (row.get("time/generate", 0.0) - row["time/engine_wait"], GREY))  # sending the weights
    result = []
    for seconds, color in lengths:
        result.append(Span(place, place + max(0.0, seconds), color, ""))
        place = result[-1].end
    return result
