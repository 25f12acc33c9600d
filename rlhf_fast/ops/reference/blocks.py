# SPDX-License-Identifier: Apache-2.0
"""The row ops work on blocks of rows, so that their temporaries are small and stay in cache."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

CPU_ENTRIES = 1 << 18  # entries of a block per thread: 1 MiB of float32, about the size of a core's own cache
DEVICE_ENTRIES = 1 << 26  # elsewhere: few launches
TOKEN_ENTRIES = 1 << 14  # of a block of per-token tensors (B, T), whose temporaries are 8 bytes an entry


def row_blocks(x: Tensor, start: int = 0, entries: int | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of the rows of x (..., V) in order: which rows, and a view (..., V) of them.

    Depends only on shape and device, so that tensors of one shape have the same blocks. entries: approximate number in
    a block on a CPU; None = CPU_ENTRIES per thread.
    """
    if x.device.type != "cpu":
        entries = DEVICE_ENTRIES
    elif entries is None:
        entries = CPU_ENTRIES * torch.get_num_threads()
    most = max(1, entries // x.shape[-1])
    if x.dim() == 1:
        x = x.unsqueeze(0)
    rows, inner = x.shape[0], math.prod(x.shape[1:-1])
    if inner > most:
        for i in range(rows):
            yield from row_blocks(x[i], start + i * inner, entries)
        return
    blocks = math.ceil(rows / (most // inner))
    step = math.ceil(rows / blocks)  # equal blocks, so that the last one is not tiny
    for i in range(0, rows, step):
        block = x[i : i + step]
        yield slice(start + i * inner, start + (i + block.shape[0]) * inner), block


class Buffers:
    """Named temporaries that all blocks reuse: mapping new memory takes longer than the arithmetic in it."""

    def __init__(self) -> None:
        self._flat: dict[str, Tensor] = {}

    def like(self, x: Tensor, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised contiguous tensor of x's shape, and of x's dtype if none is given."""
        flat = self._flat.get(name)
        if flat is None or flat.numel() < x.numel():
            flat = self._flat[name] = torch.empty(x.numel(), dtype=dtype or x.dtype, device=x.device)
        return flat[: x.numel()].view(x.shape)
