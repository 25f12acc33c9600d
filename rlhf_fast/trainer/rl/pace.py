# SPDX-License-Identifier: Apache-2.0
"""Estimating when the phase ends, and fitting the prompts per step into `max_seconds`."""

from __future__ import annotations

import time
from typing import NamedTuple

from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.run.progress import Timer, notice

from .sizes import Sizes

LEAST = 4  # a step never has fewer than a fourth of its prompts
MARGIN = 1.2  # steps vary: samples differ in length
WORTH_SAYING = 60.0  # seconds that a phase must take before its end is announced


class Duration(NamedTuple):
    """How long the phase takes."""

    max_steps: int
    min_steps: int  # in spite of `max_seconds`
    max_seconds: float  # 0: no limit


class Pace:
    """If time is short, steps get smaller before they get fewer: many small steps teach more than a few large ones.

    with timer("step"):
        train_step(..., pace.sizes, step, ...)
    """

    def __init__(self, duration: Duration, sizes: Sizes, timer: Timer) -> None:
        """Steps begin with the `sizes` given."""
        self.sizes = self.full = sizes
        self.duration, self.timer = duration, timer
        self._first: int | None = None
        self._seconds = 0.0  # total of all steps at the end of the last one
        self._notified = False

    def ended(self, step: int) -> bool:
        """Whether no further step fits after `step` of them; the same on every rank. Sets `sizes` for the next one."""
        if self._first is None:
            self._first = step
        if step == self._first:
            return False
        last = self.timer.totals["step"] - self._seconds
        self._seconds = self.timer.totals["step"]
        # the main process decides for all, as clocks differ
        prompts, stop = ranks().once(lambda: self._plan(step, last))
        if not stop:
            self.sizes = self.full._replace(prompts=prompts)
        return stop

    def _plan(self, step: int, last: float) -> tuple[int, bool]:
        """(prompts of the next step, whether to stop instead); `last` is the duration of the last step."""
        max_steps, min_steps, limit = self.duration
        full, left = self.full.prompts, max_steps - step
        each = last / self.sizes.prompts  # seconds per prompt
        after = self.timer.totals["evaluate"] + self.timer.totals["load"]  # evaluation and saving take about as long
        room = limit - self.timer.elapsed() - after if limit else float("inf")
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
        expected = left * each * prompts + after
        if done == 1 and expected > WORTH_SAYING:
            end = time.strftime("%H:%M", time.localtime(time.time() + expected))
            notice(f"{left} more steps of {each * prompts:.1f} s: the phase ends at about {end}")
        return prompts, False

    def _valid(self, wanted: int) -> int:
        """The largest number of prompts up to `wanted` that minibatches and ranks can share; at least a fourth."""
        full, samples = self.full.prompts, self.full.samples
        fits = [
            n
            for n in range(max(1, full // LEAST), full + 1)
            if n % ranks().count == 0 and n * samples % self.full.minibatches == 0
        ]
        return max((n for n in fits if n <= wanted), default=min(fits, default=full))
