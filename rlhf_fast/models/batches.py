# SPDX-License-Identifier: Apache-2.0
"""Cutting a batch of sequences into micro-batches whose rows are of like length, so that pads cost little.

The cut changes speed and memory, never results: what is computed for a row depends on that row alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Sequences padded on the right. `mask` says which tokens are asked for (the completion's)."""

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) bool
    mask: Tensor  # (B, T) bool

    def rows(self, index: Tensor) -> Batch:
        """Those rows, cut to the longest of them."""
        attention = self.attention_mask[index]
        width = int(attention.sum(1).max())
        return Batch(self.input_ids[index, :width], attention[:, :width], self.mask[index, :width])

    def plan(self, size: int, index: Tensor | None = None) -> list[Tensor]:
        """Rows (all, or those of `index`) cut into micro-batches of at most `size`, longest rows first.

        Longest first, so that too large a micro-batch runs out of memory at once and not after an hour.
        """
        index = torch.arange(len(self.input_ids)) if index is None else index
        lengths = self.attention_mask.sum(1).cpu()[index]
        return list(index[lengths.argsort(descending=True, stable=True)].split(size))


def in_micro_batches(function: Callable[[Batch], Tensor], batch: Batch, plan: list[Tensor]) -> Tensor:
    """`function` of each micro-batch, without autograd, in the order of the batch: (B,), (B, T) or (B, T, n)."""
    with torch.inference_mode():
        outputs = [function(batch.rows(index)) for index in plan]
    whole = [len(batch.input_ids), *outputs[0].shape[1:]]
    if outputs[0].dim() > 1:
        whole[1] = batch.input_ids.shape[1]
    # made outside of inference mode, since autograd refuses to save tensors from within
    result = torch.zeros(whole, dtype=outputs[0].dtype, device=outputs[0].device)
    for index, output in zip(plan, outputs, strict=True):
        if output.dim() > 1:
            result[index, : output.shape[1]] = output
        else:
            result[index] = output
    return result
