# SPDX-License-Identifier: Apache-2.0
"""kl_coef during a run: fixed, or adapted to keep the KL from the reference at a target."""

from __future__ import annotations

GAIN, LARGEST_ERROR = 0.1, 0.2


class KLController:
    """The coefficient `coef` of the KL in the reward or the loss.

    With a target, Ziegler et al. 2019 (arXiv 1909.08593, section 2.2): after each step coef is multiplied by
    1 + 0.1 * clip(kl / target - 1, -0.2, 0.2), the KL in nats per sequence. It lives as long as the run and is in its
    checkpoints.
    """

    def __init__(self, coef: float, target: float) -> None:
        """`target` 0 keeps `coef` fixed."""
        self.coef, self.target = coef, target

    def update(self, kl: float) -> None:
        """Adapt `coef` to the mean KL of a step over all ranks."""
        if self.target:
            error = max(-LARGEST_ERROR, min(LARGEST_ERROR, kl / self.target - 1))
            self.coef *= 1 + GAIN * error
