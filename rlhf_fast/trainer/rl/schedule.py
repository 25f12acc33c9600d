# SPDX-License-Identifier: Apache-2.0
"""Learning rates during a run: a linear warm-up, then constant, linear or cosine decay."""

from __future__ import annotations

import math
from typing import NamedTuple, assert_never

from rlhf_fast.run.options import Schedule


class LearningRates(NamedTuple):
    """The peak learning rates of policy and critic, and their common schedule."""

    policy: float
    critic: float
    warmup_steps: int
    max_steps: int
    schedule: Schedule

    def at(self, step: int) -> tuple[float, float]:
        """Learning rates of policy and critic at `step`, from 0."""
        scale = learning_rate_scale(step, self.warmup_steps, self.max_steps, self.schedule)
        return self.policy * scale, self.critic * scale


def learning_rate_scale(step: int, warmup_steps: int, max_steps: int, schedule: Schedule) -> float:
    """Factor of the learning rate at `step` (from 0); it depends on the step alone, so resuming is exact.

    It rises to 1 over the warm-up and falls from 1 towards 0, which it would reach at `max_steps`.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    done = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    if schedule == "linear":
        return 1.0 - done
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    assert_never(schedule)
