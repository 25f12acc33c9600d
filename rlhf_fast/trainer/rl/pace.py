# SPDX-License-Identifier: Apache-2.0
"""Estimating when the phase ends, and fitting the prompts per step and the last evaluation into `max_seconds`."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.run.progress import Timer, notice

from .sizes import Sizes

LEAST = 4  # neither a step nor the last evaluation has fewer than a fourth of its prompts
MARGIN = 1.2  # steps vary: samples differ in length
WORTH_SAYING = 60.0  # seconds that a phase must take before its end is announced


class Duration(NamedTuple):
    """How long the phase takes."""

    max_steps: int
    min_steps: int  # in spite of `max_seconds`
    max_seconds: float  # 0: no limit


class Pace:
    """If time is short, steps get smaller before they get fewer: many small steps teach more than a few large ones.

    The last evaluation gets smaller with them.

    with timer("step"):
        train_step(..., pace.sizes, step, ...)
    """

    def __init__(self, duration: Duration, sizes: Sizes, timer: Timer) -> None:
        """Steps begin with the `sizes` given."""
        self.sizes = self.full = sizes
        self.duration, self.timer = duration, timer
        self._first: int | None = None
        self._seconds = 0.0  # total of all steps of this launch at the end of the last one
        self._evaluation = 0.0  # seconds of the evaluation before
        self._each: list[float] = []  # seconds per prompt of the first step and of the last one
        self._notified = False

    def ended(self, step: int) -> bool:
        """Whether no further step fits after `step` of them; the same on every rank. Sets `sizes` for the next one."""
        if self._first is None:
            self._first, self._evaluation = step, self.timer.totals["evaluate"]
        if last := self.timer.totals.get("step", 0.0) - self._seconds:
            self._seconds += last
            self._each = [*self._each[:1], last / self.sizes.prompts]
        if not self._each:
            return False
        # the main process decides for all, as clocks differ
        prompts, stop = ranks().once(lambda: self._plan(step))
        if not stop:
            self.sizes = self.full._replace(prompts=prompts)
        return stop

    def state(self) -> dict[str, Any]:
        """For a checkpoint: what is known of how long steps and the evaluation take, and where the run began."""
        return {"first": self._first, "evaluation": self._evaluation, "each": self._each}

    def resume(self, state: dict[str, Any] | None) -> None:
        """Go on with what `state` returned; None, of a checkpoint without it, changes nothing."""
        if state is not None and state["first"] is not None:
            self._first, self._evaluation = int(state["first"]), float(state["evaluation"])
            self._each = [float(seconds) for seconds in state["each"]]

    def held_out(self, prompts: int, whole: bool = False) -> int:
        """How many of the held-out prompts the evaluation at the end takes: all, or those that there is time for.

        At least a fourth, or with `whole` all or none; the same on every rank.
        """
        return ranks().once(lambda: self._fitting(prompts, whole))

    def _fitting(self, prompts: int, whole_or_none: bool) -> int:
        limit, whole = self.duration.max_seconds, MARGIN * self._last_evaluation()
        room = limit - self.timer.elapsed() if limit else float("inf")
        if room >= whole or not whole:
            return prompts
        if whole_or_none:
            notice(
                f"{max(room, 0):.0f} s are left of max_seconds {limit:.0f}, too little to evaluate the last policy: "
                "the best one before it is kept"
            )
            return 0
        taken = max(-(-prompts // LEAST), min(prompts, int(prompts * room / whole)))
        notice(
            f"{max(room, 0):.0f} s are left of max_seconds {limit:.0f}: the last evaluation takes {taken} of {prompts} "
            "held-out prompts, and the figures before training are those of the same prompts"
        )
        return taken

    def _last_evaluation(self) -> float:
        """Seconds that it will take with all prompts: as the one before, or longer if steps take longer by now."""
        return self._evaluation * max(1.0, self._each[-1] / self._each[0]) if self._each else self._evaluation

    def _plan(self, step: int) -> tuple[int, bool]:
        """(prompts of the next step, whether to stop instead)."""
        max_steps, min_steps, limit = self.duration
        full, left, each = self.full.prompts, max_steps - step, self._each[-1]
        after, saving = self._last_evaluation(), self.timer.totals["load"]  # saving takes about as long as loading
        room = limit - self.timer.elapsed() - saving if limit else float("inf")
        share = room / (MARGIN * each * full * left + after)  # of the work that is left
        after *= min(1.0, max(1 / LEAST, share))
        room -= after
        prompts = self._valid(int(min(full, room / max(left, 1) / (MARGIN * each))))
        done = step - (self._first or 0)
        if done >= min(min_steps, max_steps) and left and room < MARGIN * each * prompts:
            notice(f"the time limit of {limit:.0f} s ends the phase after {step} steps")
            return prompts, True
        if prompts < full and not self._notified:
            self._notified = True
            notice(
                f"a step takes {each * full:.0f} s, too long for {left} more within max_seconds {limit:.0f}: "
                f"{prompts} of {full} prompts a step from now on"
            )
        expected = left * each * prompts + after + saving
        if done == 1 and expected > WORTH_SAYING:
            end = time.strftime("%H:%M", time.localtime(time.time() + expected))
            notice(f"{left} more steps of {each * prompts:.1f} s: the phase ends at about {end}")
        return prompts, False

    def _valid(self, wanted: int) -> int:
        """The largest number of prompts up to `wanted` that minibatches and ranks can share; at least a fourth."""
        full = self.full.prompts
        fits = [
            n
            for n in range(max(1, full // LEAST), full + 1)
            if n % ranks().count == 0 and self.full._replace(prompts=n).units % self.full.minibatches == 0
        ]
        return max((n for n in fits if n <= wanted), default=min(fits, default=full))
