# SPDX-License-Identifier: Apache-2.0
"""The forward of token_stats: a row's sums in one pass over its logits, and the outputs from them.

Each vector of a block has its own maximum and sums relative to it (online softmax): when the maximum rises, the sums so
far are scaled down. Threads exchange nothing until the row's end, and an element takes one exponential.
"""

import triton
import triton.language as tl

from rlhf_fast.kernels.common import LN2, LOG2E
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

PARTIALS = tl.constexpr(5)  # per split: max, sum, weighted sum, sum of squares, vector of the argmax


@triton.jit
def _merge(top, total, weighted, squares, factor2):
    """Merges the sums of several vectors or splits (along axis 1), each relative to its own maximum."""
    row_top = tl.max(top, 1)
    down = fall(top, row_top[:, None], factor2[:, None])
    scale = tl.exp2(down)
    return (
        row_top,
        tl.sum(total * scale, 1),
        tl.sum((weighted + down * total) * scale, 1),
        tl.sum(squares * scale * scale, 1),
    )


@triton.jit
def _first_max(row_ptrs, vector, real, columns, in_scale, cap, SHAPE: tl.constexpr, VEC: tl.constexpr):
    """The lowest column of the maximum within each row's vector; 0 at masked rows and where NaN hides it."""
    column = vector[:, None] + tl.arange(0, VEC)[None, :]
    in_range = real[:, None] & (column < columns)
    u = shaped(load_logits(row_ptrs[:, None] + column, in_range, SHAPE), in_range, in_scale, cap, SHAPE, False)
    first = tl.min(tl.where(in_range & (u == tl.max(u, 1)[:, None]), column, columns), 1)
    return tl.where(first < columns, first, 0).to(tl.int64)


@triton.jit
def _store_stats(
    top, total, weighted, squares, vector, rows, exists, real, factors, offsets,
    logits_ptr, targets_ptr, logprobs_ptr, entropy_ptr, logsumexp_ptr, squares_ptr, argmax_ptr, parts_ptr,
    columns, targets_per_row, in_scale, cap,
    SHAPE: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """A row's outputs from its merged sums."""
    total = tl.where(total < 1, 1.0, total)  # the maximum itself adds 1: a row of -inf has 0, one with a NaN has NaN
    bits = tl.log2(total)
    log_sum = bits * LN2
    tl.store(parts_ptr + rows * 2, tl.where(real, tl.where(total == total, top, total), 0.0), mask=exists)
    tl.store(parts_ptr + rows * 2 + 1, tl.where(real, log_sum, 0.0), mask=exists)
    if entropy_ptr is not None:
        entropy = (bits - weighted / total) * LN2
        tl.store(entropy_ptr + rows, tl.where(real & ~(entropy < 0), entropy, 0.0), mask=exists)
    if logsumexp_ptr is not None:
        tl.store(logsumexp_ptr + rows, tl.where(real, top * factors + log_sum, 0.0), mask=exists)
    if squares_ptr is not None:
        tl.store(squares_ptr + rows, tl.where(real, squares / (total * total), 0.0), mask=exists)
    if argmax_ptr is not None:
        first = _first_max(logits_ptr + offsets, vector, real, columns, in_scale, cap, SHAPE, VEC)
        tl.store(argmax_ptr + rows, first, mask=exists)
    if logprobs_ptr is not None:
        for k in range(targets_per_row):
            place = rows.to(tl.int64) * targets_per_row + k
            target = tl.load(targets_ptr + place, mask=real, other=0).to(tl.int64)
            valid = real & (target >= 0) & (target < columns)
            u = shaped(load_logits(logits_ptr + offsets + target, valid, SHAPE), valid, in_scale, cap, SHAPE, False)
            gap = u - finite_max(top)
            logprob = tl.where(gap > 0, 0.0, gap) * factors - log_sum
            logprob = tl.where(valid, logprob, float("nan"))
            tl.store(logprobs_ptr + place, tl.where(real, logprob, 0.0), mask=exists)


@triton.jit(do_not_specialize=["n_rows", "inner", "splits", "blocks"])
def token_stats_fold(
    logits_ptr, targets_ptr, mask_ptr, temperature_ptr,
    logprobs_ptr, entropy_ptr, logsumexp_ptr, squares_ptr, argmax_ptr, parts_ptr, partials_ptr,
    n_rows, inner, outer_stride, stride, columns, targets_per_row, splits, blocks, readable,
    factor, in_scale, cap,
    SHAPE: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Reduces a tile's rows, or a split of their columns; partials_ptr is None if there is one split."""
    BLOCK: tl.constexpr = LANES * VEC
    tile = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    rows, exists, real = tile_rows(tile, n_rows, mask_ptr, ROWS)
    factors = row_factors(factor, temperature_ptr, rows, real)
    factor2 = (factors * LOG2E)[:, None]
    offsets = row_offsets(rows, inner, outer_stride, stride)

    lane_columns = tl.arange(0, LANES)[None, :, None] * VEC + tl.arange(0, VEC)[None, None, :]
    pointers = logits_ptr + offsets[:, None, None] + lane_columns
    begin = split * blocks * BLOCK
    end = tl.minimum(begin + blocks * BLOCK, readable)
    end = tl.where(tl.max(real.to(tl.int32), 0) > 0, end, begin)  # masked rows are not read
    top = tl.full((ROWS, LANES), float("-inf"), tl.float32)
    total = tl.zeros((ROWS, LANES), tl.float32)
    weighted = tl.zeros((ROWS, LANES), tl.float32)
    squares = tl.zeros((ROWS, LANES), tl.float32)
    block_of_top = tl.zeros((ROWS, LANES), tl.int32)

    in_range = real[:, None, None] & (lane_columns < end - begin)
    x = load_logits(pointers + begin, in_range, SHAPE)
    for start in range(begin, end, BLOCK):
        counts = in_range & (lane_columns < columns - start)
        u = shaped(x, counts, in_scale, cap, SHAPE, PADDED)
        in_range = real[:, None, None] & (lane_columns < end - start - BLOCK)
        x = load_logits(pointers + start + BLOCK, in_range, SHAPE)  # prefetched while this block is reduced
        higher = tl.maximum(top, tl.max(u, 2))  # ignores NaN; the sum does not
        if argmax_ptr is not None:
            block_of_top = tl.where(higher > top, start, block_of_top)
        down = fall(top, higher, factor2)
        scale = tl.exp2(down)
        exponent = (u - finite_max(higher)[:, :, None]) * factor2[:, :, None]
        e = tl.exp2(exponent)
        if entropy_ptr is not None:
            weighted = (weighted + down * total) * scale + tl.sum(e * tl.maximum(exponent, -200.0), 2)  # 0 * -inf = 0
        if squares_ptr is not None:
            squares = squares * scale * scale + tl.sum(e * e, 2)
        total = total * scale + tl.sum(e, 2)
        top = higher

    row_top, total, weighted, squares = _merge(top, total, weighted, squares, factors * LOG2E)
    vectors = tl.where(top == row_top[:, None], block_of_top + tl.arange(0, LANES)[None, :] * VEC, columns)
    vector = tl.min(vectors, 1)
    if partials_ptr is None:
        _store_stats(
            row_top, total, weighted, squares, vector, rows, exists, real, factors, offsets,
            logits_ptr, targets_ptr, logprobs_ptr, entropy_ptr, logsumexp_ptr, squares_ptr, argmax_ptr, parts_ptr,
            columns, targets_per_row, in_scale, cap, SHAPE, VEC,
        )  # fmt: skip
    else:
        to = partials_ptr + (rows * splits + split) * PARTIALS
        tl.store(to, row_top, mask=exists)
        tl.store(to + 1, total, mask=exists)
        tl.store(to + 2, weighted, mask=exists)
        tl.store(to + 3, squares, mask=exists)
        tl.store(to + 4, vector.to(tl.float32, bitcast=True), mask=exists)


@triton.jit(do_not_specialize=["n_rows", "inner", "splits"])
def token_stats_combine(
    logits_ptr, targets_ptr, mask_ptr, temperature_ptr,
    logprobs_ptr, entropy_ptr, logsumexp_ptr, squares_ptr, argmax_ptr, parts_ptr, partials_ptr,
    n_rows, inner, outer_stride, stride, columns, targets_per_row, splits,
    factor, in_scale, cap,
    SHAPE: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Merges the splits of one row in order."""
    rows, exists, real = tile_rows(tl.program_id(0), n_rows, mask_ptr, 1)
    factors = row_factors(factor, temperature_ptr, rows, real)
    offsets = row_offsets(rows, inner, outer_stride, stride)
    split = tl.arange(0, MAX_SPLITS)[None, :]
    ours = split < splits
    partials = partials_ptr + (rows[:, None] * splits + split) * PARTIALS
    top = tl.load(partials, mask=ours, other=float("-inf"))
    vector = tl.load(partials + 4, mask=ours, other=0.0).to(tl.int32, bitcast=True)
    row_top, total, weighted, squares = _merge(
        top,
        tl.load(partials + 1, mask=ours, other=0.0),
        tl.load(partials + 2, mask=ours, other=0.0),
        tl.load(partials + 3, mask=ours, other=0.0),
        factors * LOG2E,
    )
    vector = tl.min(tl.where(ours & (top == row_top[:, None]), vector, columns), 1)
    _store_stats(
        row_top, total, weighted, squares, vector, rows, exists, real, factors, offsets,
        logits_ptr, targets_ptr, logprobs_ptr, entropy_ptr, logsumexp_ptr, squares_ptr, argmax_ptr, parts_ptr,
        columns, targets_per_row, in_scale, cap, SHAPE, VEC,
    )  # fmt: skip
