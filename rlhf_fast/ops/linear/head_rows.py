# SPDX-License-Identifier: Apache-2.0
"""Base class of all loops: the selected rows of hidden, and this rank's columns of the head."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.ops.linear.head import Head
from rlhf_fast.ops.linear.inputs import HeadTensors, LogitOptions, LoopOptions, tile_dtype
from rlhf_fast.ops.linear.row_selection import RowSelection
from rlhf_fast.ops.linear.shards import Shard
from rlhf_fast.ops.linear.slices import Shaping
from rlhf_fast.ops.reference import accumulate_dtype


class HeadRows:
    """The selected rows, the head, and the dtypes of tiles and of sums."""

    def __init__(self, tensors: HeadTensors, options: LoopOptions, selection: RowSelection) -> None:
        self.selection = selection
        self.vocabulary = tensors.weight.shape[0]  # of this rank, padding included
        self.shard = Shard(options.group, self.vocabulary)
        self.columns = self.shard.counting(options.vocab_size)
        # Ranks that talk to each other in every block of rows need blocks of the same height, however many of their
        # columns count.
        self.block_columns = self.columns if self.shard.group is None else self.vocabulary
        head = Head(tensors.weight, tensors.bias, tensors.lora_a, tensors.lora_b, options.lora_scale)
        self.head = head.first(self.columns)
        taken = selection.take(tensors.hidden, (tensors.hidden.shape[-1],))
        assert taken is not None
        self.hidden, self.low = taken, self.head.low_rank(taken)
        self.sum_dtype = accumulate_dtype(tensors.hidden.dtype)
        self.tile_dtype = tile_dtype(tensors.hidden, options.float_logits)

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def count(self) -> int:
        return self.selection.selected

    def fill(self, tile: Tensor, rows: slice, columns: slice) -> Tensor:
        """Writes the logits of these rows and columns into tile."""
        return self.head.fill(tile, self.hidden[rows], None if self.low is None else self.low[rows], columns)

    def shaping(self, row_temperature: Tensor | None, options: LogitOptions) -> Shaping:
        return Shaping(self.selection.take(row_temperature, (), 1), *options)

    def put_hidden(self, gradient: Tensor) -> Tensor:
        """The gradient of hidden (selected, H) in the shape of hidden; (0,) if not needed."""
        return self.selection.put(gradient, (gradient.shape[-1],)) if gradient.dim() == 2 else gradient
