# SPDX-License-Identifier: Apache-2.0
"""whiten_moments and whiten in Triton: (x - mean) rsqrt(var + 1e-8) over the real entries, without a host sync.

The moments are count, sum and sum of squares in float64, which ranks can sum, and which keep the digits of a small
variance around a large mean. Each program sums a block, PyTorch sums the blocks, always in the same order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast._triton import INTERPRETED
from rlhf_fast.kernels.common import launch

BLOCK = 256 if INTERPRETED else 4096
WARPS = 8


@triton.jit
def store_moments(moments_ptr, count, total, squares):
    """Stores the sums in this program's line of moments_ptr: (programs, 3)."""
    line = moments_ptr + tl.program_id(0) * 3
    tl.store(line, tl.sum(count).to(tl.float64))
    tl.store(line + 1, tl.sum(total))
    tl.store(line + 2, tl.sum(squares))


@triton.jit
def _load_block(values_ptr, mask_ptr, values_stride, mask_stride, length, blocks, BLOCK: tl.constexpr):
    """A block of a row: entries, which are real, which exist, and their offsets in a dense tensor."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    inside = lane < length - start
    x = tl.load(values_ptr + (row * values_stride + start) + lane, inside, other=0).to(tl.float32)
    real = inside & (tl.load(mask_ptr + (row * mask_stride + start) + lane, inside, other=0) != 0)
    return x, real, inside, row * length + start + lane


@triton.jit(do_not_specialize=["blocks"])
def block_moments(
    values_ptr, mask_ptr,  # (rows, length)
    moments_ptr,  # (programs, 3)
    values_stride, mask_stride, length, blocks,
    BLOCK: tl.constexpr,
):  # fmt: skip
    x, real, inside, place = _load_block(values_ptr, mask_ptr, values_stride, mask_stride, length, blocks, BLOCK)
    x = tl.where(real, x, 0.0).to(tl.float64)
    store_moments(moments_ptr, real.to(tl.int32), x, x * x)


@triton.jit(do_not_specialize=["blocks"])
def whiten_block(
    values_ptr, mask_ptr,  # (rows, length)
    moments_ptr,  # (3,)
    whitened_ptr,  # (rows, length), dense
    values_stride, mask_stride, length, blocks,
    SHIFT_MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    x, real, inside, place = _load_block(values_ptr, mask_ptr, values_stride, mask_stride, length, blocks, BLOCK)
    count, total, squares = tl.load(moments_ptr), tl.load(moments_ptr + 1), tl.load(moments_ptr + 2)
    mean = total / tl.maximum(count, 1.0)
    variance = (squares - count * mean * mean) / tl.maximum(count - 1.0, 1.0)
    variance = tl.where(variance < 0, 0.0, variance)  # NaN stays NaN
    scale = 1.0 / tl.sqrt(variance + 1e-8)
    whitened = (x.to(tl.float64) - mean) * scale
    if not SHIFT_MEAN:
        whitened += mean
    tl.store(whitened_ptr + place, tl.where(real, whitened, 0.0).to(tl.float32), inside)


def _as_rows(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """Both as rows of adjacent entries, copied unless they are dense or (B, T); number of rows, and their length."""
    dense = values.is_contiguous() and mask.is_contiguous()
    if values.dim() == 2 and not dense and values.stride(1) == mask.stride(1) == 1:
        return values, mask, *values.shape
    return values.contiguous().view(1, -1), mask.contiguous().view(1, -1), 1, values.numel()


def whiten_moments(values: Tensor, mask: Tensor) -> Tensor:
    """Count, sum and sum of squares of the real entries: (3,) float64."""
    if values.numel() == 0:
        return values.new_zeros(3, dtype=torch.float64)
    x, real, rows, length = _as_rows(values, mask)
    blocks = triton.cdiv(length, BLOCK)
    moments = values.new_empty((rows * blocks, 3), dtype=torch.float64)
    launch(
        block_moments, rows * blocks, values, x, real, moments, x.stride(0), real.stride(0), length, blocks,
        BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return moments.sum(0)


def whiten(values: Tensor, mask: Tensor, moments: Tensor, shift_mean: bool) -> Tensor:
    """float32, of the shape of values, dense."""
    whitened = values.new_empty(values.shape, dtype=torch.float32)
    if values.numel() == 0:
        return whitened
    x, real, rows, length = _as_rows(values, mask)
    blocks = triton.cdiv(length, BLOCK)
    launch(
        whiten_block, rows * blocks, values, x, real, moments.contiguous(), whitened,
        x.stride(0), real.stride(0), length, blocks,
        SHIFT_MEAN=shift_mean, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return whitened
