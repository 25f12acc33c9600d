# SPDX-License-Identifier: Apache-2.0
"""The plan of tiles on a GPU, on meta tensors: what is kept stays in the budget, and beside it there is one tile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_fast.ops.linear.inputs import buffer_elements
from rlhf_fast.ops.linear.tiles import GPU_ROWS, GPU_TILE, Tiles, rows_of_pair, tile_shape, whole_rows

MIB = 2**20


class Allocated(TorchDispatchMode):
    """Bytes of the tensors that are created, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.new_empty.default:
            self.bytes += out.nbytes
        return out


@pytest.mark.parametrize("budget", [0, 100 * MIB, 2048 * MIB, 64 * 1024 * MIB])
@pytest.mark.parametrize(("rows", "columns"), [(8192, 151936), (1, 151936), (65536, 32000), (4096, 262144), (700, 999)])
def test_one_tile_beside_the_budget(rows: int, columns: int, budget: int) -> None:
    buffer = torch.empty(buffer_elements(rows, columns, torch.bfloat16, budget), dtype=torch.bfloat16, device="meta")
    tiles = Tiles(rows, columns, buffer, *tile_shape(rows, columns, buffer))
    covered, in_buffer, row_heights = 0, 0, set()
    with Allocated() as scratch:
        for tile in tiles:
            covered += tile.logits.numel()
            in_buffer += tile.logits.nbytes if tile.in_buffer else 0
            row_heights.add(tile.logits.shape[0])
    assert covered == rows * columns
    assert in_buffer <= buffer.nbytes <= budget
    assert scratch.bytes <= GPU_TILE
    assert in_buffer + GPU_TILE > min(budget, 2 * rows * columns)  # what the budget could hold is held
    assert max(row_heights) >= min(rows, GPU_ROWS)  # or reading the weight would cost as much as multiplying by it


@pytest.mark.parametrize("budget", [0, 2048 * MIB])
def test_a_pair_of_tiles_beside_the_budget(budget: int) -> None:
    height = rows_of_pair(8192, 2 * 151936 * 2, "cuda", budget)
    assert 1 <= height * 2 * 151936 * 2 <= GPU_TILE


def test_blocks_of_whole_rows_take_the_budget() -> None:
    """A policy loss keeps nothing, so its block is the budget."""
    for budget in (0, 2048 * MIB):
        height = whole_rows(8192, 151936 * 2, 0, "cuda", budget)
        assert height * 151936 * 2 <= max(budget, GPU_TILE)
