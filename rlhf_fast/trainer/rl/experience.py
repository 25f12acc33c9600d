# SPDX-License-Identifier: Apache-2.0
"""What an update learns from: a step's samples with everything that was computed of them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from rlhf_fast.models.batches import Batch


class Experience(NamedTuple):
    """B samples, those of one prompt next to each other; everything per token is aligned with `batch.input_ids`."""

    batch: Batch
    learned: Tensor  # (B, T) bool, of `batch.mask` the tokens that the policy learns from
    rewards: Tensor  # (B,) before the KL
    old_logprobs: Tensor  # (B, T); where a step is learned from once the update writes its own here
    entropy: Tensor  # (B, T), as old_logprobs
    ref_logprobs: Tensor  # (B, T)
    values: Tensor  # (B, T)
    advantages: Tensor  # (B, T)
    returns: Tensor  # (B, T)

    def rows(self, index: Tensor) -> Experience:
        """The rows numbered `index` (n,), as wide as the longest of them."""
        batch = self.batch.rows(index)
        width = batch.mask.shape[1]
        per_token = (self.old_logprobs, self.entropy, self.ref_logprobs, self.values, self.advantages, self.returns)
        return Experience(
            batch, self.learned[index, :width], self.rewards[index], *(x[index, :width] for x in per_token)
        )
