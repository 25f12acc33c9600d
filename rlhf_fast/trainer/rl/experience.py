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
    rounding: Tensor | None = None  # (B,) of the rewards; None: they are exact
    learned_copy: Tensor | None = None  # `learned` on the CPU, if it is elsewhere

    def with_copies(self) -> Experience:
        """The same; its micro-batches know which of their tokens to learn from without waiting for a GPU."""
        if self.learned.device.type == "cpu":
            return self
        return self._replace(batch=self.batch.with_copy(), learned_copy=self.learned.cpu())

    def learned_tokens(self) -> Tensor:
        """(N,) bool on the CPU: which tokens of `batch.mask`, in row-major order, are learned from."""
        learned = self.learned if self.learned_copy is None else self.learned_copy
        return learned.cpu()[self.batch.on_cpu().mask]

    def rows(self, index: Tensor) -> Experience:
        """The rows with the indices `index` (n,), as wide as the longest of them."""
        batch = self.batch.rows(index)
        width = batch.mask.shape[1]
        per_token = (self.old_logprobs, self.entropy, self.ref_logprobs, self.values, self.advantages, self.returns)
        rows = Experience(
            batch, self.learned[index, :width], self.rewards[index], *(x[index, :width] for x in per_token)
        )._replace(rounding=None if self.rounding is None else self.rounding[index])
        return rows if self.learned_copy is None else rows._replace(learned_copy=self.learned_copy[index.cpu(), :width])
