# SPDX-License-Identifier: Apache-2.0
"""Real rows, dense and in order: what the mask drops costs no matmul."""

from __future__ import annotations

import torch
from torch import Tensor


class Rows:
    """The real rows of `(*shape, ...)` tensors, and the way back.

    Counting them makes the host wait for a GPU once. While a CUDA graph is captured that is impossible: then all rows
    stay, the masked ones replaced by harmless values going in and by 0 coming out.
    """

    def __init__(self, shape: torch.Size, mask: Tensor | None) -> None:
        self.shape = shape
        self.count = shape.numel()
        self.index: Tensor | None = None
        self.masked: Tensor | None = None
        if mask is not None and mask.is_cuda and torch.cuda.is_current_stream_capturing():
            self.masked = ~mask.reshape(-1)
        elif mask is not None:
            self.index = mask.reshape(-1).nonzero().squeeze(-1)
        self.real = self.count if self.index is None else self.index.shape[0]

    def take(self, x: Tensor | None, width: tuple[int, ...] = (), harmless: float = 0) -> Tensor | None:
        """(*shape, *width) -> (real, *width), contiguous: BLAS is slow on strided rows."""
        if x is None:
            return None
        flat = x.reshape(self.count, *width)
        if self.index is not None:
            return flat.index_select(0, self.index)
        if self.masked is not None:
            return flat.masked_fill(_over(self.masked, flat), harmless)
        return flat.contiguous()

    def put(self, x: Tensor, width: tuple[int, ...] = ()) -> Tensor:
        """(real, *width) -> (*shape, *width), 0 at masked rows."""
        if self.index is not None:
            x = x.new_zeros(self.count, *width).index_copy_(0, self.index, x)
        elif self.masked is not None:
            x = x.masked_fill(_over(self.masked, x), 0)
        return x.view((*self.shape, *width))


def _over(masked: Tensor, x: Tensor) -> Tensor:
    return masked.view(-1, *[1] * (x.dim() - 1))
