# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels share: how rows lie in memory, how work is cut up and launched, and a logit's shaping.

A kernel works on a tile of rows, block by block. A block's columns are read as `lanes` vectors of `vec` elements, 16
bytes a thread; what a row needs is accumulated per vector and reduced over them once, at the row's end.
"""

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast import _triton

INTERPRETED = tl.constexpr(_triton.INTERPRETED)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# How a logit x becomes u, of which z = factor * u: u = x, u = -x (a negative scale), or u = cap * tanh(in_scale * x).
AS_IS, NEGATED, CAPPED = (tl.constexpr(i) for i in range(3))

# The interpreter, whose programs are slow and whose rows are the tests', gets small blocks and many narrow rows at
# once, and pretends that a few programs fill it.
NARROW_LANES = 4096
PRETENDED_PROGRAMS = 5

MAX_SPLITS = tl.constexpr(64)
BLOCKS_PER_SPLIT = 1 if INTERPRETED else 4
BLOCKS_PER_SPAN = 3 if INTERPRETED else 8
PROGRAMS_PER_PROCESSOR = 32  # about eight waves of four: the last, ragged one then costs little


# ------------------------------------------------------------------------------------------- on the host


class Tile(NamedTuple):
    """The shape of a program's work; compile-time constants of the kernels."""

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


def tile_for(logits: Tensor, lanes: int, vectors_per_thread: int) -> Tile:
    """One wide row in blocks of `lanes` vectors, or several narrow rows."""
    narrow_lanes = lanes
    if INTERPRETED:
        lanes, narrow_lanes = lanes // 4, NARROW_LANES
    vec = 16 // logits.element_size()
    needed = triton.next_power_of_2(triton.cdiv(logits.shape[-1], vec))
    rows = 1 if needed >= lanes else narrow_lanes // needed
    lanes = min(lanes, needed)
    return Tile(rows, lanes, vec, max(1, rows * lanes // (32 * vectors_per_thread)))


def splits_for(tiles: int, columns: int, block: int, device: torch.device) -> tuple[int, int]:
    """Into how many programs a tile's columns are cut so that few rows fill the device, and the blocks of each."""
    blocks = triton.cdiv(columns, block)
    wanted = triton.cdiv(_programs(device), tiles)
    return _evenly(blocks, min(wanted, blocks // BLOCKS_PER_SPLIT, MAX_SPLITS.value))


def spans_for(tiles: int, columns: int, block: int, device: torch.device) -> tuple[int, int]:
    """The same for work without sums to merge: no program goes through many blocks."""
    blocks = triton.cdiv(columns, block)
    wanted = triton.cdiv(_programs(device), tiles)
    return _evenly(blocks, max(min(wanted, blocks), triton.cdiv(blocks, BLOCKS_PER_SPAN)))


def _evenly(blocks: int, splits: int) -> tuple[int, int]:
    per_split = triton.cdiv(blocks, max(1, splits))
    return triton.cdiv(blocks, per_split), per_split


def _programs(device: torch.device) -> int:
    return PRETENDED_PROGRAMS if INTERPRETED else PROGRAMS_PER_PROCESSOR * processors(device)


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors, or what a vendor has of that kind."""
    properties = torch.get_device_module(device).get_device_properties(device)
    return getattr(properties, "multi_processor_count", None) or properties.max_compute_units


class Shaping(NamedTuple):
    """z = factor * u(x), as run-time numbers; only the kind of u is compiled in."""

    factor: float
    in_scale: float
    cap: float
    shape: Any


def shaping(temperature: float, logit_scale: float, softcap: float) -> Shaping:
    if softcap > 0:
        return Shaping(1.0 / temperature, logit_scale / softcap, softcap, CAPPED)
    return Shaping(abs(logit_scale) / temperature, 1.0, 0.0, NEGATED if logit_scale < 0 else AS_IS)


def dense_rows(*tensors: Tensor) -> tuple[Sequence[Tensor], int, list[int]]:
    """The tensors (..., V), `inner`, and two strides of each: row n is at (n // inner) * outer + (n % inner) * step.

    That covers `logits[:, :-1]` and transposed batches as they lie. What it does not cover is copied, as is a strided
    last dimension.
    """
    width = tensors[0].shape[-1]
    rows = tensors[0].numel() // width
    levels = [_levels(x) for x in tensors]
    inner = min((level[1][0] for level in levels if len(level) == 2), default=rows)
    dense, strides = [], []
    for x, level in zip(tensors, levels, strict=True):
        if len(level) == 1 and inner == rows:
            outer, step = 0, level[0][1]
        elif len(level) == 1:
            outer, step = inner * level[0][1], level[0][1]
        elif len(level) == 2 and level[1][0] == inner:
            outer, step = level[0][1], level[1][1]
        else:
            x, outer, step = x.contiguous(), 0 if inner == rows else inner * width, width
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


def dense(x: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """One entry per row, or a few, without holes."""
    return None if x is None else x.to(dtype or x.dtype).contiguous()


def launch(kernel: Any, programs: int, near: Tensor, *args: Any, **constants: Any) -> None:
    """Runs `programs` programs on the device that holds `near`, whichever is the current one."""
    with _on_device(near.device):
        kernel[(programs,)](*args, enable_fp_fusion=True, **constants)


def _on_device(device: torch.device) -> AbstractContextManager[Any]:
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


# ------------------------------------------------------------------------------------------- on the device


@triton.jit
def tile_rows(tile, n_rows, mask_ptr, ROWS: tl.constexpr):
    """The tile's rows: their numbers, which exist, and which are real tokens, too."""
    rows = tile * ROWS + tl.arange(0, ROWS)
    exists = rows < n_rows
    real = exists
    if mask_ptr is not None:
        real = exists & (tl.load(mask_ptr + rows, mask=exists, other=0) != 0)
    return rows, exists, real


@triton.jit
def row_offsets(rows, inner, outer_stride, stride):
    """Where rows begin, in elements; 64 bits, as N * V exceeds 2^31."""
    return (rows // inner).to(tl.int64) * outer_stride + (rows % inner).to(tl.int64) * stride


@triton.jit
def row_factors(factor, temperature_ptr, rows, real):
    """What turns u into z; 1 where nothing is read."""
    if temperature_ptr is not None:
        return factor / tl.load(temperature_ptr + rows, mask=real, other=1.0)
    return tl.where(real, factor, 1.0)


@triton.jit
def load_logits(pointers, in_range, SHAPE: tl.constexpr):
    """Logits as they lie, and where out of range what `shaped` makes -inf of."""
    if SHAPE == NEGATED:
        return tl.load(pointers, mask=in_range, other=float("inf"))
    return tl.load(pointers, mask=in_range, other=float("-inf"))


@triton.jit
def shaped(x, in_range, in_scale, cap, SHAPE: tl.constexpr):
    """u of logits from `load_logits`, in float32. Its maximum is taken and subtracted before `factor` multiplies: a
    common offset of the logits costs no digits, and factor > 0 keeps their order."""
    u = widen(x)
    if SHAPE == NEGATED:
        u = -u
    if SHAPE == CAPPED:
        u = tl.where(in_range, cap * tanh(u * in_scale), float("-inf"))
    return u


@triton.jit
def widen(x):
    """x in float32. The interpreter's own conversion loses subnormal bfloat16 numbers."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 x in `dtype`, rounded to nearest, ties to even. The interpreter's own conversion to bf16 truncates."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
        return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


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
    """What to subtract: the maximum, or 0 from a row of -inf."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def fall(old, new, factor2):
    """By how much, in powers of two, exponents relative to a maximum fall when that rises. More than 200 is all the
    same: what was summed so far vanishes, and from -inf there was nothing."""
    return tl.maximum((old - new) * factor2, -200.0)
