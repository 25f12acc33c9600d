# SPDX-License-Identifier: Apache-2.0
"""Selects the real rows before the matmul, and puts results back to all rows."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.ops import _check


class RowInputs(NamedTuple):
    """The selected rows: by a mask, by indices, or all if neither is given."""

    mask: Tensor | None  # (...) bool
    row_index: Tensor | None  # (R,) int64, -1 for padding


def row_count(x: Tensor) -> int:
    """N of a tensor (..., H). Not `shape.numel()`, which turns a dynamic size of torch.compile into a constant."""
    return math.prod(x.shape[:-1])


def select_rows(
    op: str, mask: Tensor | None, rows: Tensor | None, hidden: Tensor
) -> tuple[RowInputs, Tensor | None, bool]:
    """The operators' inputs for `mask` or `rows`, a mask of the rows whose values can be checked, and whether the
    indices may hold padding.

    Turning a mask into indices makes the host wait for a GPU, so it is done here, once for forward and backward. Under
    torch.compile, where tensors have no values yet, the operator does it, in forward and backward. While a CUDA graph
    is captured nothing may wait, so all rows are kept.
    """
    if rows is not None:
        if mask is not None:
            raise ValueError(f"rlhf_fast.{op}: mask and rows say the same; give one of the two")
        _check_rows(op, rows, hidden)
        return RowInputs(None, rows.long()), _mask_of(rows, hidden), True
    _check.is_mask(op, "mask", mask, hidden.shape[:-1], "the rows", hidden)
    if mask is None or type(mask) is not Tensor or torch.compiler.is_compiling() or _capturing(mask):
        return RowInputs(mask, None), mask, False
    return RowInputs(None, mask.reshape(-1).nonzero().squeeze(-1)), mask, False


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _check_rows(op: str, rows: Tensor, hidden: Tensor) -> None:
    if not isinstance(rows, Tensor) or rows.dtype not in (torch.int64, torch.int32):
        came = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
        raise TypeError(f"rlhf_fast.{op}: rows must be an int64 or int32 tensor of indices, got {came}")
    _check.is_dense(op, "rows", rows)
    if rows.dim() != 1:
        raise ValueError(f"rlhf_fast.{op}: rows must have one dimension, got {tuple(rows.shape)}")
    _check.on_device(op, "rows", rows, "hidden", hidden)
    if not _check.can_look(rows) or not rows.numel():
        return
    count = row_count(hidden)
    low, high = int(rows.min()), int(rows.max())
    if low < -1 or high >= count:
        raise ValueError(
            f"rlhf_fast.{op}: rows must be between 0 and {count - 1}, or -1 for padding, "
            f"got {low if low < -1 else high}"
        )
    repeated = rows[rows >= 0].long().bincount() > 1
    if bool(repeated.any()):
        raise ValueError(f"rlhf_fast.{op}: rows must differ, got {int(repeated.nonzero()[0])} more than once")


def _mask_of(rows: Tensor, hidden: Tensor) -> Tensor | None:
    if not _check.can_look(rows):
        return None
    mask = torch.zeros(row_count(hidden), dtype=torch.bool, device=rows.device)
    mask[rows[rows >= 0].long()] = True
    return mask.view(hidden.shape[:-1])


class RowSelection:
    """Selects rows of `(*shape, ...)` tensors, dense and in order, and puts results back."""

    def __init__(self, shape: torch.Size, inputs: RowInputs, padded: bool) -> None:
        self.shape = shape
        self.count = shape.numel()
        self.index = inputs.row_index
        self.unused: Tensor | None = None  # which of the selected rows are padding
        mask = inputs.mask
        if self.index is not None and padded:
            self.unused = self.index < 0
            self.index = torch.where(self.unused, self.count, self.index)
        elif mask is not None and _capturing(mask):
            self.unused = ~mask.reshape(-1)
        elif mask is not None:
            self.index = mask.reshape(-1).nonzero().squeeze(-1)
        self.selected = self.count if self.index is None else self.index.shape[0]
        self.most = self.count if inputs.row_index is None else inputs.row_index.shape[0]  # known without waiting

    def take(self, x: Tensor | None, width: tuple[int, ...] = (), harmless: float = 0) -> Tensor | None:
        """(*shape, *width) -> (selected, *width), contiguous: BLAS is slow on strided rows."""
        if x is None:
            return None
        flat = x.reshape(self.count, *width)
        if self.index is not None:
            within = self.index if self.unused is None else self.index.clamp(max=max(0, self.count - 1))
            flat = flat.index_select(0, within) if self.count else flat.new_zeros(self.selected, *width)
        if self.unused is not None:
            return flat.masked_fill(_over(self.unused, flat), harmless)
        return flat.contiguous()

    def put(self, x: Tensor, width: tuple[int, ...] = ()) -> Tensor:
        """(selected, *width) -> (*shape, *width), 0 at rows that were not selected."""
        if self.index is not None:
            spare = 0 if self.unused is None else 1  # one more row, where the results of padding go
            everything = x.new_zeros(self.count + spare, *width).index_copy_(0, self.index, x)
            x = everything[: self.count] if spare else everything
        elif self.unused is not None:
            x = x.masked_fill(_over(self.unused, x), 0)
        return x.view((*self.shape, *width))

    def used(self) -> Tensor | None:
        """(selected,) bool: which of the selected rows are not padding; None if all are real."""
        return None if self.unused is None else ~self.unused


def _over(rows: Tensor, x: Tensor) -> Tensor:
    return rows.view(-1, *[1] * (x.dim() - 1))
