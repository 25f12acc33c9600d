# SPDX-License-Identifier: Apache-2.0
"""Rows of logits, for the families logprob and kl: memory layout, tiles and splits, scale, softcap and temperature.

A program works on a tile of rows, block by block. A block's columns are read as `lanes` vectors of `vec` elements, 16
bytes a thread; sums are accumulated per vector and reduced over the vectors once, at the row's end.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels import common
from rlhf_fast.kernels.common import INTERPRETED, LOG2E, widen

# How a logit x becomes u, of which z = factor * u: u = x, u = -x (a negative scale), or u = cap * tanh(in_scale * x).
AS_IS, NEGATED, CAPPED = (tl.constexpr(i) for i in range(3))

MAX_SPLITS = tl.constexpr(64)
BLOCKS_PER_SPLIT = 1 if INTERPRETED else 4
BLOCKS_PER_SPAN = 3 if INTERPRETED else 8
PROGRAMS_PER_PROCESSOR = 32  # about eight waves of four, so that an incomplete last wave matters little

# In the interpreter, which is slow and only runs tests, blocks are small, many narrow rows are processed at once, and a
# few programs count as a full device.
NARROW_LANES = 4096
PRETENDED_PROGRAMS = 5


# ------------------------------------------------------------------------------------------- on the host


class Tile(NamedTuple):
    """The shape of a program's work, compile-time constants of the kernels."""

    rows: int
    lanes: int
    vec: int
    warps: int

    @property
    def block(self) -> int:
        return self.lanes * self.vec

    def constants(self) -> dict[str, int]:
        return {"ROWS": self.rows, "LANES": self.lanes, "VEC": self.vec, "num_warps": self.warps}

    def flat_constants(self) -> dict[str, int]:
        return {"ROWS": self.rows, "BLOCK": self.block, "num_warps": self.warps}


class Rows(NamedTuple):
    """The rows of tensors (..., V) of one shape. Row n of a tensor begins at (n // inner) * outer + (n % inner) * step.

    Two strides are enough for `logits[:, :-1]` and transposed batches; other layouts are copied, as is a strided last
    dimension.
    """

    tensors: tuple[Tensor, ...]
    count: int
    inner: int
    strides: tuple[int, ...]  # outer and step of each tensor
    width: int  # V
    columns: int  # in the vocabulary
    readable: int  # columns that are read: whole vectors, if they are within V
    vec: int  # elements of a vector

    def tiles(self, lanes: int, vectors_per_thread: int) -> tuple[Tile, int]:
        """The tile (one wide row in blocks of `lanes` vectors, or several narrow rows), and the number of tiles."""
        if self.vec == 1:  # single elements instead, enough of them to keep a thread busy
            lanes, vectors_per_thread = 4 * lanes, 4 * vectors_per_thread
        narrow_lanes = lanes
        if INTERPRETED:
            lanes, narrow_lanes = lanes // 4, NARROW_LANES
        needed = triton.next_power_of_2(triton.cdiv(self.width, self.vec))
        rows = 1 if needed >= lanes else narrow_lanes // needed
        lanes = min(lanes, needed)
        warps = max(1, rows * lanes // (32 * vectors_per_thread))
        return Tile(rows, lanes, self.vec, warps), triton.cdiv(self.count, rows)


def rows_of(*tensors: Tensor, vocab_size: int) -> Rows:
    """`vocab_size` as the operators take it: -1 for all columns."""
    width = tensors[0].shape[-1]
    count = tensors[0].numel() // width
    columns = width if vocab_size < 0 else vocab_size
    dense, inner, strides = _dense_rows(tensors, width, count)
    vec, readable = 1, columns
    if _on_16_bytes(dense, width, strides):
        vec = 16 // dense[0].element_size()
        readable = min(width, triton.cdiv(columns, 16) * 16)
    return Rows(tuple(dense), count, inner, tuple(strides), width, columns, readable, vec)


def _on_16_bytes(tensors: list[Tensor], width: int, strides: list[int]) -> bool:
    """Whether the compiler, which checks divisibility by 16, will know that all rows are aligned to 16 bytes."""
    if INTERPRETED:
        return width % 2 == 1  # it makes no difference there, and tests should cover both
    return all(n % 16 == 0 for n in (width, *strides)) and all(x.data_ptr() % 16 == 0 for x in tensors)


def _dense_rows(tensors: tuple[Tensor, ...], width: int, count: int) -> tuple[list[Tensor], int, list[int]]:
    levels = [_levels(x) for x in tensors]
    inner = min((level[1][0] for level in levels if len(level) == 2), default=count)
    dense, strides = [], []
    for x, level in zip(tensors, levels, strict=True):
        if len(level) == 2 and level[1][0] == inner:
            outer, step = level[0][1], level[1][1]
        else:
            if len(level) != 1:
                x, level = x.contiguous(), [(count, width)]
            step = level[0][1]
            outer = 0 if inner == count else inner * step
        dense.append(x)
        strides += [outer, step]
    return dense, inner, strides


def _levels(x: Tensor) -> list[tuple[int, int]]:
    """(size, stride) of the leading dimensions, merged where that is possible; empty if V itself is strided."""
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return []
    levels: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if levels and levels[-1][1] == size * stride:
            levels[-1] = (levels[-1][0] * size, stride)
        else:
            levels.append((size, stride))
    return levels or [(1, x.shape[-1])]


def splits_for(tiles: int, columns: int, block: int, device: torch.device) -> tuple[int, int]:
    """The number of programs for a tile's columns, so that few rows fill the device, and the blocks of each program."""
    blocks = triton.cdiv(columns, block)
    wanted = triton.cdiv(_programs(device), tiles)
    return _evenly(blocks, min(wanted, blocks // BLOCKS_PER_SPLIT, MAX_SPLITS.value))


def spans_for(tiles: int, columns: int, block: int, device: torch.device) -> tuple[int, int]:
    """The same for work without sums to merge: no program has many blocks."""
    blocks = triton.cdiv(columns, block)
    wanted = triton.cdiv(_programs(device), tiles)
    return _evenly(blocks, max(min(wanted, blocks), triton.cdiv(blocks, BLOCKS_PER_SPAN)))


def _evenly(blocks: int, splits: int) -> tuple[int, int]:
    per_split = triton.cdiv(blocks, max(1, splits))
    return triton.cdiv(blocks, per_split), per_split


def _programs(device: torch.device) -> int:
    return PRETENDED_PROGRAMS if INTERPRETED else PROGRAMS_PER_PROCESSOR * common.processors(device)


class Shaping(NamedTuple):
    """z = factor * u(x) as run-time numbers; only the kind of u is a compile-time constant."""

    factor: float
    in_scale: float
    cap: float
    shape: Any


def shaping(temperature: float, logit_scale: float, softcap: float) -> Shaping:
    if softcap > 0:
        return Shaping(1.0 / temperature, logit_scale / softcap, softcap, CAPPED)
    return Shaping(abs(logit_scale) / temperature, 1.0, 0.0, NEGATED if logit_scale < 0 else AS_IS)


# ------------------------------------------------------------------------------------------- on the device


@triton.jit
def tile_rows(tile, n_rows, mask_ptr, ROWS: tl.constexpr):
    """The tile's rows: their indices, which of them exist, and which are also real tokens."""
    rows = tile * ROWS + tl.arange(0, ROWS)
    exists = rows < n_rows
    real = exists
    if mask_ptr is not None:
        real = exists & (tl.load(mask_ptr + rows, mask=exists, other=0) != 0)
    return rows, exists, real


@triton.jit
def row_offsets(rows, inner, outer_stride, stride):
    """Offsets of the rows in elements; 64 bits, since N * V can exceed 2^31."""
    return (rows // inner).to(tl.int64) * outer_stride + (rows % inner).to(tl.int64) * stride


@triton.jit
def row_factors(factor, temperature_ptr, rows, real):
    """The factor from u to z; 1 for rows that are not read."""
    if temperature_ptr is not None:
        return factor / tl.load(temperature_ptr + rows, mask=real, other=1.0)
    return tl.where(real, factor, 1.0)


@triton.jit
def load_logits(pointers, in_range, SHAPE: tl.constexpr):
    """Raw logits; out of range the value for which `shaped` returns -inf."""
    if SHAPE == NEGATED:
        return tl.load(pointers, mask=in_range, other=float("inf"))
    return tl.load(pointers, mask=in_range, other=float("-inf"))


@triton.jit
def shaped(x, counts, in_scale, cap, SHAPE: tl.constexpr, PADDED: tl.constexpr):
    """u of logits from `load_logits`, in float32; -inf outside of the vocabulary. PADDED: padding may have been read.

    The maximum of u is subtracted before multiplying by `factor`: so a common offset of the logits loses no digits, and
    factor > 0 keeps their order.
    """
    u = widen(x)
    if SHAPE == NEGATED:
        u = -u
    if SHAPE == CAPPED:
        u = cap * tanh(u * in_scale)
    if SHAPE == CAPPED or PADDED:
        u = tl.where(counts, u, float("-inf"))
    return u


@triton.jit
def tanh(x):
    """Relative error under 3e-7 (Cephes tanhf)."""
    size, square = tl.abs(x), x * x
    series = 2.06390887954e-2 - 5.70498872745e-3 * square
    series = 1.33314422036e-1 + square * (-5.37397155531e-2 + square * series)
    small = x + x * square * (-3.33332819422e-1 + square * series)
    decay = tl.exp2(size * (-2.0 * LOG2E))
    large = (1.0 - decay) / (1.0 + decay)
    return tl.where(size < 0.625, small, tl.where(x < 0, -large, large))


@triton.jit
def finite_max(top):
    """The value to subtract: the maximum, or 0 for a row of -inf."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def fall(old, new, factor2):
    """The change, in powers of two, of exponents relative to a maximum that rises from `old` to `new`. Limited to -200,
    which already makes earlier sums 0, so that a rise from -inf gives no NaN."""
    return tl.maximum((old - new) * factor2, -200.0)
