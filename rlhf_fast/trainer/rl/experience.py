# SPDX-License-Identifier: Apache-2.0
"""The input of an update: a step's samples with everything computed from them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from rlhf_fast.models.batches import Batch


class Experience(NamedTuple):
    """B samples, those of one prompt next to each other; everything per token is aligned with `batch.input_ids`."""

    batch: Batch
    learned: Tensor  # (B, T) bool, the tokens of `batch.mask` that the policy learns from
    rewards: Tensor  # (B,) before the KL
    old_logprobs: Tensor  # (B, T); with a single update per step, written by the update itself
    entropy: Tensor  # (B, T), as old_logprobs
    ref_logprobs: Tensor  # (B, T)
    values: Tensor  # (B, T)
    advantages: Tensor  # (B, T)
    returns: Tensor  # (B, T)

    def rows(self, index: Tensor) -> Experience:
        """The rows with the indices `index` (n,), as wide as the longest of them."""
        batch = self.batch.rows(index)
        width = batch.mask.shape[1]
        per_token = (self.old_logprobs, self.entropy, self.ref_logprobs, self.values, self.advantages, self.returns)
        return Experience(
            batch, self.learned[index, :width], self.rewards[index], *(x[index, :width] for x in per_token)
        )
