# SPDX-License-Identifier: Apache-2.0
"""token_kl from normalised probabilities: the sums of jsd and tv, which read the rows a second time, and every kind's
gradient. Sides a and b are policy and reference, or the reverse (SWAPPED) for the forward divergence.
"""

import triton
import triton.language as tl

from rlhf_fast.kernels.common import LN2, LOG2E, narrow
from rlhf_fast.kernels.rows import (
    CAPPED,
    NEGATED,
    finite_max,
    load_logits,
    row_factors,
    row_offsets,
    shaped,
    tile_rows,
)
from rlhf_fast.ops import codes

RATIO, JSD, TV = tl.constexpr(codes.REVERSE), tl.constexpr(codes.JSD), tl.constexpr(codes.TV)
LOG_FLOOR = tl.constexpr(-104.0 * LOG2E.value)  # see rlhf_fast/ops/reference/kl.py
TERMS = tl.constexpr(3)  # of a split of jsd or tv: sum p s_p, sum q s_q, divergence


@triton.jit
def _terms(bits_p, bits_q, beta, KIND: tl.constexpr):
    """From log2-probabilities: p, q, and s_p, s_q in nats: the gradients are p (s_p - mean), q (s_q - mean).

    reverse and forward need s_p alone. Where p is 0, s_p is finite: 0 * (-inf) must be 0.
    """
    p = tl.exp2(bits_p)
    q = tl.exp2(bits_q)
    if KIND == RATIO:
        floored = tl.where(bits_q == float("-inf"), LOG_FLOOR, bits_q)
        slope_p = (tl.maximum(bits_p, -200.0) - floored) * LN2
        slope_q = slope_p
    if KIND == JSD:
        m = (1 - beta) * p + beta * q
        tiny = m < 1.1754944e-38  # a subnormal m might count as 0
        bits_m = tl.log2(tl.where(tiny, 1.0, m))
        slope_p = tl.where(tiny, 0.0, (1 - beta) * (tl.maximum(bits_p, -200.0) - bits_m) * LN2)
        slope_q = tl.where(tiny, 0.0, beta * (tl.maximum(bits_q, -200.0) - bits_m) * LN2)
    if KIND == TV:
        slope_p = tl.where(p > q, 0.5, tl.where(p < q, -0.5, 0.0 * (p - q)))  # NaN stays NaN
        slope_q = -slope_p
    return p, q, slope_p, slope_q


@triton.jit
def write_gradients(
    a_ptr, b_ptr, grad_a_ptr, grad_b_ptr, grad_kl_ptr, offsets_a, offsets_b, rows, exists, real,
    begin, end, columns, readable, width, top_a, top_b, bits_a, bits_b, mean_a, mean_b, factor_a, factor_b,
    in_scale, cap, beta, KIND: tl.constexpr, SHAPE: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of columns [begin, end) for side a, b or both, from the last block, which is most likely still in
    cache, to the first. 0 for masked rows and for a side that is all -inf."""
    keep_a = real & (top_a != float("-inf"))
    keep_b = real & (top_b != float("-inf"))
    grad_kl = tl.load(grad_kl_ptr + rows, mask=real, other=0.0)
    slope = 1.0
    if SHAPE == NEGATED:
        slope = -1.0
    if SHAPE == CAPPED:
        slope = in_scale * cap
    weight_a = tl.where(keep_a, grad_kl * factor_a * slope, 0.0)[:, None]
    weight_b = tl.where(keep_b, grad_kl * factor_b * slope, 0.0)[:, None]
    top_a = tl.where(keep_a, top_a, 0.0)[:, None]
    top_b = tl.where(keep_b, top_b, 0.0)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    a_pointers = a_ptr + offsets_a[:, None] + column
    b_pointers = b_ptr + offsets_b[:, None] + column
    out = rows.to(tl.int64)[:, None] * width + column

    last = begin + (end - begin - 1) // BLOCK * BLOCK
    in_range = real[:, None] & (column < readable - last)
    x = load_logits(a_pointers + last, in_range, SHAPE)
    y = load_logits(b_pointers + last, in_range, SHAPE)
    for passed in range(0, end - begin, BLOCK):
        start = last - passed
        counts = in_range & (column < columns - start)
        a = shaped(x, counts, in_scale, cap, SHAPE, PADDED)
        b = shaped(y, counts, in_scale, cap, SHAPE, PADDED)
        in_range = real[:, None] & (column < tl.where(start > begin, readable - start + BLOCK, 0))
        x = load_logits(a_pointers + start - BLOCK, in_range, SHAPE)
        y = load_logits(b_pointers + start - BLOCK, in_range, SHAPE)
        bits_p = (a - top_a) * (factor_a * LOG2E)[:, None] - bits_a[:, None]
        bits_q = (b - top_b) * (factor_b * LOG2E)[:, None] - bits_b[:, None]
        p, q, slope_p, slope_q = _terms(bits_p, bits_q, beta, KIND)
        inside = exists[:, None] & (column < width - start)
        if grad_a_ptr is not None:
            grad = p * (slope_p - mean_a[:, None]) * weight_a
            _store_gradient(grad_a_ptr + out + start, grad, a, column < columns - start, inside, cap, SHAPE, PADDED)
        if grad_b_ptr is not None:
            grad = (q - p if KIND == RATIO else q * (slope_q - mean_b[:, None])) * weight_b
            _store_gradient(grad_b_ptr + out + start, grad, b, column < columns - start, inside, cap, SHAPE, PADDED)


@triton.jit
def _store_gradient(pointers, grad, u, counts, inside, cap, SHAPE: tl.constexpr, PADDED: tl.constexpr):
    if SHAPE == CAPPED:
        bent = tl.maximum(u / cap, -1.0)  # u is -inf where it was not read
        grad *= 1.0 - bent * bent
    if PADDED:
        grad = tl.where(counts, grad, 0.0)
    tl.store(pointers, narrow(grad, pointers.dtype.element_ty), mask=inside)


@triton.jit
def _load_parts(parts_ptr, rows, real, SWAPPED: tl.constexpr):
    """Max, log2 sum and mean of side a, then of side b."""
    parts = parts_ptr + rows * 6
    a = parts + 2 * SWAPPED
    b = parts + 2 - 2 * SWAPPED
    return (
        tl.load(a, mask=real, other=float("-inf")),
        tl.load(b, mask=real, other=float("-inf")),
        tl.load(a + 1, mask=real, other=0.0) * LOG2E,
        tl.load(b + 1, mask=real, other=0.0) * LOG2E,
        tl.load(parts + 4 + SWAPPED, mask=real, other=0.0),
        tl.load(parts + 5 - SWAPPED, mask=real, other=0.0),
    )


@triton.jit(do_not_specialize=["n_rows", "inner", "splits", "blocks"])
def token_kl_gradient(
    a_ptr, b_ptr, mask_ptr, temperature_a_ptr, temperature_b_ptr, parts_ptr, grad_kl_ptr, grad_a_ptr, grad_b_ptr,
    n_rows, inner, a_outer, a_stride, b_outer, b_stride, columns, readable, width, splits, blocks,
    factor_a, factor_b, in_scale, cap, beta,
    KIND: tl.constexpr, SWAPPED: tl.constexpr, SHAPE: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of a split of a tile's columns."""
    tile = tl.program_id(0) // splits
    begin = tl.program_id(0) % splits * blocks * BLOCK
    rows, exists, real = tile_rows(tile, n_rows, mask_ptr, ROWS)
    top_a, top_b, bits_a, bits_b, mean_a, mean_b = _load_parts(parts_ptr, rows, real, SWAPPED)
    write_gradients(
        a_ptr, b_ptr, grad_a_ptr, grad_b_ptr, grad_kl_ptr,
        row_offsets(rows, inner, a_outer, a_stride), row_offsets(rows, inner, b_outer, b_stride), rows, exists, real,
        begin, tl.minimum(begin + blocks * BLOCK, width), columns, readable, width,
        top_a, top_b, bits_a, bits_b, mean_a, mean_b,
        row_factors(factor_a, temperature_a_ptr, rows, real), row_factors(factor_b, temperature_b_ptr, rows, real),
        in_scale, cap, beta, KIND, SHAPE, PADDED, BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_rows", "inner", "splits", "blocks"])
def token_kl_terms(
    a_ptr, b_ptr, mask_ptr, temperature_a_ptr, temperature_b_ptr, parts_a_ptr, parts_b_ptr, sums_ptr,
    n_rows, inner, a_outer, a_stride, b_outer, b_stride, columns, readable, splits, blocks,
    factor_a, factor_b, in_scale, cap, beta,
    KIND: tl.constexpr, SHAPE: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """sum p s_p, sum q s_q and the divergence of jsd or tv, from each side's max and log-sum."""
    BLOCK: tl.constexpr = LANES * VEC
    tile = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    rows, exists, real = tile_rows(tile, n_rows, mask_ptr, ROWS)
    factor_a2 = (row_factors(factor_a, temperature_a_ptr, rows, real) * LOG2E)[:, None, None]
    factor_b2 = (row_factors(factor_b, temperature_b_ptr, rows, real) * LOG2E)[:, None, None]
    top_a = finite_max(tl.load(parts_a_ptr + rows * 2, mask=real, other=0.0))[:, None, None]
    top_b = finite_max(tl.load(parts_b_ptr + rows * 2, mask=real, other=0.0))[:, None, None]
    bits_a = (tl.load(parts_a_ptr + rows * 2 + 1, mask=real, other=0.0) * LOG2E)[:, None, None]
    bits_b = (tl.load(parts_b_ptr + rows * 2 + 1, mask=real, other=0.0) * LOG2E)[:, None, None]
    begin = split * blocks * BLOCK
    end = tl.minimum(begin + blocks * BLOCK, readable)
    end = tl.where(tl.max(real.to(tl.int32), 0) > 0, end, begin)
    column = tl.arange(0, LANES)[None, :, None] * VEC + tl.arange(0, VEC)[None, None, :]
    a_pointers = a_ptr + row_offsets(rows, inner, a_outer, a_stride)[:, None, None] + column
    b_pointers = b_ptr + row_offsets(rows, inner, b_outer, b_stride)[:, None, None] + column
    mean_p = tl.zeros((ROWS, LANES), tl.float32)
    mean_q = mean_p
    distance = mean_p
    for start in range(begin, end, BLOCK):
        in_range = real[:, None, None] & (column < end - start)
        counts = in_range & (column < columns - start)
        a = shaped(load_logits(a_pointers + start, in_range, SHAPE), counts, in_scale, cap, SHAPE, PADDED)
        b = shaped(load_logits(b_pointers + start, in_range, SHAPE), counts, in_scale, cap, SHAPE, PADDED)
        p, q, slope_p, slope_q = _terms(
            (a - top_a) * factor_a2 - bits_a, (b - top_b) * factor_b2 - bits_b, beta, KIND
        )  # fmt: skip
        mean_p += tl.sum(p * slope_p, 2)
        mean_q += tl.sum(q * slope_q, 2)
        if KIND == TV:
            distance += tl.sum((p - q) * slope_p, 2)
    if KIND == JSD:
        distance = mean_p + mean_q
    to = sums_ptr + (rows * splits + split) * TERMS
    tl.store(to, tl.sum(mean_p, 1), mask=exists)
    tl.store(to + 1, tl.sum(mean_q, 1), mask=exists)
    tl.store(to + 2, tl.sum(distance, 1), mask=exists)
