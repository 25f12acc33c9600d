# SPDX-License-Identifier: Apache-2.0
"""Order and size of the tiles of logits, and which of them the memory budget keeps for the backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Default number of bytes of logits kept for the backward.
DEFAULT_BUDGET = {"cpu": 512 * 2**20, "cuda": 2 * 2**30}

# On a CPU a tile shares the last-level cache with the parts of the operands that it is the product of. On a GPU it must
# be large enough to fill the device but no larger, because it is needed in addition to the tiles that the budget keeps.
CPU_TILE = 16 * 2**20
GPU_TILE = 256 * 2**20

# Rows of a tile. The hidden gradient is read and written once per column of tiles, the weight gradient once per row of
# tiles. On a CPU about as many rows as columns is fastest; on a GPU this many rows hide the weight's float32 sums.
CPU_ROWS = 2048
GPU_ROWS = 4096

# Tiles of ops that need whole rows (a KL, a policy loss): about so many bytes, and at least so many rows if the budget
# allows: with fewer rows, reading the weight would take as long as multiplying by it.
CPU_ROW_TILE = 48 * 2**20
CPU_MIN_ROWS = 1024


def budget_of(memory_budget: int | None, device: torch.device) -> int:
    """The caller's budget in bytes, or the device's default."""
    if memory_budget is not None:
        return memory_budget
    return DEFAULT_BUDGET.get(device.type, DEFAULT_BUDGET["cuda"])


class Tile(NamedTuple):
    rows: slice
    columns: slice
    logits: Tensor  # (rows, columns), dense
    in_buffer: bool  # kept until the backward


class Tiles:
    """All tiles of `(rows, columns)` logits, one column of tiles after the other; the first ones are in `buffer`.

    whole_rows: every block of rows has a tile, if need be without columns; otherwise there are no empty tiles.
    """

    def __init__(
        self, rows: int, columns: int, buffer: Tensor, height: int, width: int, whole_rows: bool = False
    ) -> None:
        self.rows, self.columns, self.buffer, self.whole_rows = rows, columns, buffer, whole_rows
        self.height, self.width = height, width
        self.row_blocks = -(-rows // height)
        self.column_blocks = -(-columns // width)

    def __iter__(self) -> Iterator[Tile]:
        used, scratch = 0, None
        for left in range(0, max(self.columns, int(self.whole_rows)) if self.rows else 0, self.width):
            columns = slice(left, min(left + self.width, self.columns))
            for top in range(0, self.rows, self.height):
                rows = slice(top, min(top + self.height, self.rows))
                shape = (rows.stop - rows.start, columns.stop - columns.start)
                size = shape[0] * shape[1]
                if used + size <= self.buffer.numel():
                    yield Tile(rows, columns, self.buffer[used : used + size].view(shape), True)
                    used += size
                else:
                    scratch = self.buffer.new_empty(self.height * self.width) if scratch is None else scratch
                    yield Tile(rows, columns, scratch[:size].view(shape), False)


def tile_shape(rows: int, columns: int, buffer: Tensor) -> tuple[int, int]:
    """Rows and columns of a tile for ops without a need for whole rows; `buffer` is where tiles are kept."""
    element_size, device = buffer.element_size(), buffer.device.type
    if device == "cpu":
        elements = CPU_TILE // element_size
        height = min(rows, CPU_ROWS)
    else:
        elements = GPU_TILE // element_size
        height = min(rows, max(GPU_ROWS, elements // max(1, columns)))
    height = max(1, height)
    return height, max(1, min(columns, elements // height))


def rows_of_pair(rows: int, row_bytes: int, device: str, budget: int) -> int:
    """Rows of a pair of tiles of whole rows, which is needed in addition to the tiles that the budget keeps."""
    return whole_rows(rows, row_bytes, 0, device, budget if device == "cpu" else 0)


def whole_rows(rows: int, row_bytes: int, spare: int, device: str, budget: int) -> int:
    """How many whole rows of `row_bytes` an op takes at a time.

    spare: bytes that the op saves if it takes all rows at once (a float32 sum of the weight gradient).
    """
    if device == "cpu":
        if rows * row_bytes <= min(budget, CPU_ROW_TILE + spare):
            return max(1, rows)
        wanted = min(max(CPU_ROW_TILE, CPU_MIN_ROWS * row_bytes), max(budget, 2 * CPU_TILE))
    else:
        wanted = max(budget, GPU_TILE)
    most = max(1, min(rows, wanted // max(1, row_bytes)))
    blocks = max(1, -(-rows // most))
    return max(1, -(-rows // blocks))  # equal blocks: a small last one would read the whole weight for few rows
