# SPDX-License-Identifier: Apache-2.0
"""KL(a, b) of two rows of logits in one pass, for token_kl's reverse, and for forward with policy and reference
swapped.

With exponents u = z_a - max z_a and v = z_b - max z_b (online: when a maximum rises, the sums so far are rescaled)

    KL(a, b) = sum e^u (u - v) / sum e^u - log sum e^u + log sum e^v

Where b is -inf the divergence is +inf. For the gradient's mean such entries have log b = -104: their e^u is summed
separately. Kernels compute with powers of two; stored values are in nats.
"""

import triton
import triton.language as tl

from rlhf_fast.kernels.common import LN2, LOG2E
from rlhf_fast.kernels.kl_gradient import LOG_FLOOR, RATIO, write_gradients
from rlhf_fast.kernels.rows import (
    MAX_SPLITS,
    fall,
    finite_max,
    load_logits,
    row_factors,
    row_offsets,
    shaped,
    tile_rows,
)

PARTIALS = tl.constexpr(6)  # of a split: both maxima, both sums, cross sum, lost sum


@triton.jit
def _fold_pair(
    a_pointers, b_pointers, begin, end, columns, real, factor_a, factor_b, in_scale, cap, column,
    SHAPE: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each vector's maxima of both sides, sums of e^u and e^v, sum of e^u (u - v), and of e^u where v is -inf."""
    factor_a2 = (factor_a * LOG2E)[:, None]
    factor_b2 = (factor_b * LOG2E)[:, None]
    top_a = tl.full((ROWS, LANES), float("-inf"), tl.float32)
    top_b = top_a
    sum_a = tl.zeros((ROWS, LANES), tl.float32)
    sum_b = sum_a
    cross = sum_a
    lost = sum_a
    in_range = real[:, None, None] & (column < end - begin)
    x = load_logits(a_pointers + begin, in_range, SHAPE)
    y = load_logits(b_pointers + begin, in_range, SHAPE)
    for start in range(begin, end, BLOCK):
        counts = in_range & (column < columns - start)
        a = shaped(x, counts, in_scale, cap, SHAPE, PADDED)
        b = shaped(y, counts, in_scale, cap, SHAPE, PADDED)
        in_range = real[:, None, None] & (column < end - start - BLOCK)
        x = load_logits(a_pointers + start + BLOCK, in_range, SHAPE)
        y = load_logits(b_pointers + start + BLOCK, in_range, SHAPE)
        higher_a = tl.maximum(top_a, tl.max(a, 2))
        higher_b = tl.maximum(top_b, tl.max(b, 2))
        u = (a - finite_max(higher_a)[:, :, None]) * factor_a2[:, :, None]
        v = (b - finite_max(higher_b)[:, :, None]) * factor_b2[:, :, None]
        e = tl.exp2(u)
        forbidden = v == float("-inf")
        gap = tl.maximum(u, -200.0) - tl.where(forbidden, 0.0, v)  # 0 * -inf = 0
        down_a = fall(top_a, higher_a, factor_a2)
        scale_a = tl.exp2(down_a)
        cross = (cross + down_a * sum_a - _drift(top_b, higher_b, factor_b2) * (sum_a - lost)) * scale_a
        cross += tl.sum(e * gap, 2)
        lost = lost * scale_a + tl.sum(tl.where(forbidden, e, 0.0), 2)
        sum_a = sum_a * scale_a + tl.sum(e, 2)
        sum_b = sum_b * tl.exp2(fall(top_b, higher_b, factor_b2)) + tl.sum(tl.exp2(v), 2)
        top_a = higher_a
        top_b = higher_b
    return top_a, top_b, sum_a, sum_b, cross, lost


@triton.jit
def _drift(old, new, factor2):
    """The change of finite v when b's maximum rises, not limited, as they are weighted by a; 0 if none was finite."""
    return tl.where(old == float("-inf"), 0.0, tl.maximum((old - new) * factor2, -1e30))


@triton.jit
def _merge_pair(top_a, top_b, sum_a, sum_b, cross, lost, factor_a, factor_b):
    """Merges the sums of several vectors or splits (along axis 1)."""
    row_top_a = tl.max(top_a, 1)
    row_top_b = tl.max(top_b, 1)
    factor_b2 = (factor_b * LOG2E)[:, None]
    down_a = fall(top_a, row_top_a[:, None], (factor_a * LOG2E)[:, None])
    scale_a = tl.exp2(down_a)
    scale_b = tl.exp2(fall(top_b, row_top_b[:, None], factor_b2))
    cross = cross + down_a * sum_a - _drift(top_b, row_top_b[:, None], factor_b2) * (sum_a - lost)
    return (
        row_top_a,
        row_top_b,
        tl.sum(sum_a * scale_a, 1),
        tl.sum(sum_b * scale_b, 1),
        tl.sum(cross * scale_a, 1),
        tl.sum(lost * scale_a, 1),
    )


@triton.jit
def _log2_sum(total):
    """log2 of a sum; at least 0, since the maximum itself adds 1 to it, and 0 for a row of -inf."""
    return tl.log2(tl.where(total < 1, 1.0, total))


@triton.jit
def _finish_pair(top_a, top_b, sum_a, sum_b, cross, lost):
    """Maxima and log2 sums of both sides, sum a (log a - log b) with log b floored, and the divergence, in nats."""
    bits_a = _log2_sum(sum_a)
    bits_b = _log2_sum(sum_b)
    dead = (top_a == float("-inf")) & (sum_a == 0)
    safe_sum = tl.where(dead, 1.0, sum_a)
    mean = cross / safe_sum + (bits_b - bits_a) - lost / safe_sum * (bits_b + LOG_FLOOR)
    mean = tl.where(dead, 0.0 * sum_b, mean * LN2)  # 0 without a, but NaN if b holds a NaN
    top_a += 0.0 * bits_a  # NaN if the row holds a NaN: the maximum passes NaN over, the sum does not
    top_b += 0.0 * bits_b
    return top_a, top_b, bits_a, bits_b, mean, tl.where((lost > 0) & (mean == mean), float("inf"), mean)


@triton.jit
def _store_pair(
    kl_ptr, parts_ptr, rows, exists, real, top_a, top_b, bits_a, bits_b, mean, kl, SWAPPED: tl.constexpr
):  # fmt: skip
    """KL and, unless parts_ptr is None, the row's parts; side a is the policy, or the reference if SWAPPED."""
    tl.store(kl_ptr + rows, tl.where(real, kl, 0.0), mask=exists)
    if parts_ptr is not None:
        parts = parts_ptr + rows * 6
        first = parts + 2 * SWAPPED
        second = parts + 2 - 2 * SWAPPED
        tl.store(first, tl.where(real, top_a, 0.0), mask=exists)
        tl.store(first + 1, tl.where(real, bits_a * LN2, 0.0), mask=exists)
        tl.store(second, tl.where(real, top_b, 0.0), mask=exists)
        tl.store(second + 1, tl.where(real, bits_b * LN2, 0.0), mask=exists)
        tl.store(parts + 4 + SWAPPED, tl.where(real, mean, 0.0), mask=exists)
        tl.store(parts + 5 - SWAPPED, tl.zeros_like(mean), mask=exists)


@triton.jit(do_not_specialize=["n_rows", "inner", "splits", "blocks"])
def token_kl_fold(
    a_ptr, b_ptr, mask_ptr, temperature_a_ptr, temperature_b_ptr,
    kl_ptr, parts_ptr, partials_ptr, grad_kl_ptr, grad_a_ptr, grad_b_ptr,
    n_rows, inner, a_outer, a_stride, b_outer, b_stride, columns, readable, width, splits, blocks,
    factor_a, factor_b, in_scale, cap,
    SWAPPED: tl.constexpr, SHAPE: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """KL(a, b) of a tile's rows, or the sums of a split (partials_ptr); with grad_kl_ptr also the gradient."""
    BLOCK: tl.constexpr = LANES * VEC
    tile = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    rows, exists, real = tile_rows(tile, n_rows, mask_ptr, ROWS)
    factors_a = row_factors(factor_a, temperature_a_ptr, rows, real)
    factors_b = row_factors(factor_b, temperature_b_ptr, rows, real)
    offsets_a = row_offsets(rows, inner, a_outer, a_stride)
    offsets_b = row_offsets(rows, inner, b_outer, b_stride)
    begin = split * blocks * BLOCK
    end = tl.minimum(begin + blocks * BLOCK, readable)
    end = tl.where(tl.max(real.to(tl.int32), 0) > 0, end, begin)  # masked rows are not read
    column = tl.arange(0, LANES)[None, :, None] * VEC + tl.arange(0, VEC)[None, None, :]
    state = _fold_pair(
        a_ptr + offsets_a[:, None, None] + column, b_ptr + offsets_b[:, None, None] + column,
        begin, end, columns, real, factors_a, factors_b, in_scale, cap, column, SHAPE, PADDED, ROWS, LANES, BLOCK,
    )  # fmt: skip
    top_a, top_b, sum_a, sum_b, cross, lost = _merge_pair(
        state[0], state[1], state[2], state[3], state[4], state[5], factors_a, factors_b
    )
    if partials_ptr is None:
        top_a, top_b, bits_a, bits_b, mean, kl = _finish_pair(top_a, top_b, sum_a, sum_b, cross, lost)
        _store_pair(
            kl_ptr, parts_ptr, rows, exists, real, top_a, top_b, bits_a, bits_b, mean, kl, SWAPPED
        )  # fmt: skip
        if grad_kl_ptr is not None:
            write_gradients(
                a_ptr, b_ptr, grad_a_ptr, grad_b_ptr, grad_kl_ptr, offsets_a, offsets_b, rows, exists, real,
                0, width, columns, readable, width, top_a, top_b, bits_a, bits_b, mean, mean, factors_a, factors_b,
                in_scale, cap, 0.0, RATIO, SHAPE, PADDED, BLOCK,
            )  # fmt: skip
    else:
        to = partials_ptr + (rows * splits + split) * PARTIALS
        tl.store(to, top_a, mask=exists)
        tl.store(to + 1, top_b, mask=exists)
        tl.store(to + 2, sum_a, mask=exists)
        tl.store(to + 3, sum_b, mask=exists)
        tl.store(to + 4, cross, mask=exists)
        tl.store(to + 5, lost, mask=exists)


@triton.jit(do_not_specialize=["n_rows", "splits"])
def token_kl_combine(
    mask_ptr, temperature_a_ptr, temperature_b_ptr, kl_ptr, parts_ptr, partials_ptr,
    n_rows, splits, factor_a, factor_b, SWAPPED: tl.constexpr,
):  # fmt: skip
    """Merges the splits of one row in order."""
    rows, exists, real = tile_rows(tl.program_id(0), n_rows, mask_ptr, 1)
    split = tl.arange(0, MAX_SPLITS)[None, :]
    ours = split < splits
    partials = partials_ptr + (rows[:, None] * splits + split) * PARTIALS
    top_a, top_b, sum_a, sum_b, cross, lost = _merge_pair(
        tl.load(partials, mask=ours, other=float("-inf")),
        tl.load(partials + 1, mask=ours, other=float("-inf")),
        tl.load(partials + 2, mask=ours, other=0.0),
        tl.load(partials + 3, mask=ours, other=0.0),
        tl.load(partials + 4, mask=ours, other=0.0),
        tl.load(partials + 5, mask=ours, other=0.0),
        row_factors(factor_a, temperature_a_ptr, rows, real),
        row_factors(factor_b, temperature_b_ptr, rows, real),
    )
    top_a, top_b, bits_a, bits_b, mean, kl = _finish_pair(top_a, top_b, sum_a, sum_b, cross, lost)
    _store_pair(kl_ptr, parts_ptr, rows, exists, real, top_a, top_b, bits_a, bits_b, mean, kl, SWAPPED)
