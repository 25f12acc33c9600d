# SPDX-License-Identifier: Apache-2.0
"""token_stats and its gradient in Triton: see rlhf_fast/ops/logprob.py for the mathematics.

Forward: one reading of the logits. Each vector of a block updates a maximum of its own and sums relative to it
(online softmax), so nothing crosses threads until the row's end. Rows too few to fill the device are cut into
splits, whose sums a second kernel merges in a fixed order. Backward: one reading and one writing.

Exponents are in powers of two, and what is stored is in nats.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels.common import (
    CAPPED,
    LN2,
    LOG2E,
    MAX_SPLITS,
    NEGATED,
    dense,
    dense_rows,
    fall,
    finite_max,
    launch,
    load_logits,
    row_factors,
    row_offsets,
    shaped,
    shaping,
    spans_for,
    splits_for,
    tile_for,
    tile_rows,
)
from rlhf_fast.ops import codes
from rlhf_fast.ops.logprob import fake_stats

PARTIALS = tl.constexpr(5)  # of a split: max, sum, weighted sum, sum of squares, argmax' vector


@triton.jit
def _merge(top, total, weighted, squares, factor2):
    """The sums of several vectors or splits (along axis 1), each relative to its own maximum, as one row's."""
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
    """The lowest column of the maximum within each row's vector; 0 where NaN leaves none, and at masked rows."""
    column = vector[:, None] + tl.arange(0, VEC)[None, :]
    in_range = real[:, None] & (column < columns)
    u = shaped(load_logits(row_ptrs[:, None] + column, in_range, SHAPE), in_range, in_scale, cap, SHAPE)
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
    dead = (top == float("-inf")) & (total == 0)  # NaN would have made the sum NaN
    total = tl.where(dead | (total < 1), 1.0, total)  # the maximum alone adds 1; rounding must not take it back
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
            u = shaped(load_logits(logits_ptr + offsets + target, valid, SHAPE), valid, in_scale, cap, SHAPE)
            gap = u - finite_max(top)
            logprob = tl.where(gap > 0, 0.0, gap) * factors - log_sum
            logprob = tl.where(valid, logprob, float("nan"))
            tl.store(logprobs_ptr + place, tl.where(real, logprob, 0.0), mask=exists)


@triton.jit(do_not_specialize=["n_rows", "inner", "targets_per_row", "splits", "blocks"])
def _fold(
    logits_ptr, targets_ptr, mask_ptr, temperature_ptr,
    logprobs_ptr, entropy_ptr, logsumexp_ptr, squares_ptr, argmax_ptr, parts_ptr, partials_ptr,
    n_rows, inner, outer_stride, stride, columns, targets_per_row, splits, blocks,
    factor, in_scale, cap,
    SHAPE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Folds a tile's rows, or a split's share of their columns; partials_ptr is None if there is one split."""
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
    end = tl.minimum(begin + blocks * BLOCK, columns)
    end = tl.where(tl.max(real.to(tl.int32), 0) > 0, end, begin)  # masked rows are not read
    top = tl.full((ROWS, LANES), float("-inf"), tl.float32)
    total = tl.zeros((ROWS, LANES), tl.float32)
    weighted = tl.zeros((ROWS, LANES), tl.float32)
    squares = tl.zeros((ROWS, LANES), tl.float32)
    block_of_top = tl.zeros((ROWS, LANES), tl.int32)

    in_range = real[:, None, None] & (lane_columns < end - begin)
    x = load_logits(pointers + begin, in_range, SHAPE)
    for start in range(begin, end, BLOCK):
        u = shaped(x, in_range, in_scale, cap, SHAPE)
        in_range = real[:, None, None] & (lane_columns < end - start - BLOCK)
        x = load_logits(pointers + start + BLOCK, in_range, SHAPE)  # on its way while this block is folded
        higher = tl.maximum(top, tl.max(u, 2))  # passes NaN over, the sum does not
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


@triton.jit(do_not_specialize=["inner", "targets_per_row", "splits"])
def _combine(
    logits_ptr, targets_ptr, mask_ptr, temperature_ptr,
    logprobs_ptr, entropy_ptr, logsumexp_ptr, squares_ptr, argmax_ptr, parts_ptr, partials_ptr,
    n_rows, inner, outer_stride, stride, columns, targets_per_row, splits,
    factor, in_scale, cap,
    SHAPE: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Merges the splits of one row, in their order."""
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


def token_stats(
    logits: Tensor,  # (..., V)
    targets: Tensor | None,  # (...) or (..., K)
    mask: Tensor | None,  # (...)
    row_temperature: Tensor | None,  # (...)
    temperature: float,
    logit_scale: float,
    softcap: float,
    vocab_size: int,
    outputs: int,
    inplace_backward: bool,
) -> tuple[Tensor, ...]:
    results = fake_stats(logits, targets, logits.shape[:-1], torch.float32, outputs)
    if logits.numel() == 0:
        return tuple(x.zero_() for x in results)
    (x,), inner, strides = dense_rows(logits)
    width = x.shape[-1]
    n_rows = x.numel() // width
    columns = width if vocab_size < 0 else vocab_size
    tile = tile_for(x, vectors_per_thread=2)
    tiles = triton.cdiv(n_rows, tile.rows)
    splits, blocks = splits_for(tiles, columns, tile.block, x.device)
    shape = shaping(temperature, logit_scale, softcap)
    *asked, parts = [y if outputs & (1 << bit) else None for bit, y in enumerate(results[:5])] + [results[5]]
    partials = parts.new_empty((tiles * tile.rows, splits, PARTIALS.value)) if splits > 1 else None
    pointers = (x, dense(targets), dense(mask), dense(row_temperature), *asked, parts, partials)
    layout = (n_rows, inner, *strides, columns, targets.numel() // n_rows if targets is not None else 0, splits)
    launch(_fold, tiles * splits, x, *pointers, *layout, blocks, *shape[:3], SHAPE=shape.shape, **tile.constants())
    if splits > 1:
        launch(_combine, n_rows, x, *pointers, *layout, *shape[:3], SHAPE=shape.shape, VEC=tile.vec, num_warps=2)
    return results


# ------------------------------------------------------------------------------------------- gradient


@triton.jit
def _row_gradients(
    targets_ptr, grad_logprobs_ptr, grad_entropy_ptr, grad_logsumexp_ptr, entropy_ptr, parts_ptr,
    rows, real, columns, targets_per_row, ROWS: tl.constexpr,
):  # fmt: skip
    """dz_j = p_j (constant - g_entropy (log p_j + entropy)) plus targets': the numbers that a row needs.

    Masked rows and rows of -inf keep nothing that could be NaN: with their logits unread, all becomes 0.
    """
    top = tl.load(parts_ptr + rows * 2, mask=real, other=float("-inf"))
    keep = real & (top != float("-inf"))
    top = tl.where(keep, top, 0.0)
    log_sum = tl.load(parts_ptr + rows * 2 + 1, mask=keep, other=0.0)
    constant = tl.zeros((ROWS,), tl.float32)
    if grad_logsumexp_ptr is not None:
        constant += tl.load(grad_logsumexp_ptr + rows, mask=keep, other=0.0)
    if grad_logprobs_ptr is not None:
        for k in range(targets_per_row):
            place = rows.to(tl.int64) * targets_per_row + k
            target = tl.load(targets_ptr + place, mask=keep, other=0).to(tl.int64)
            grad = tl.load(grad_logprobs_ptr + place, mask=keep, other=0.0)
            constant -= tl.where((target >= 0) & (target < columns), grad, float("nan"))
    grad_entropy = tl.zeros((ROWS,), tl.float32)
    entropy = grad_entropy
    if grad_entropy_ptr is not None:
        grad_entropy = tl.load(grad_entropy_ptr + rows, mask=keep, other=0.0)
        entropy = tl.load(entropy_ptr + rows, mask=keep, other=0.0)
    return keep, top, log_sum, constant, grad_entropy, entropy


@triton.jit
def _add_at_targets(
    dz, start, targets_ptr, grad_logprobs_ptr, rows, keep, targets_per_row, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Each target's own gradient, where the block holds it; equal targets of a row add up."""
    for k in range(targets_per_row):
        place = rows.to(tl.int64) * targets_per_row + k
        column = tl.load(targets_ptr + place, mask=keep, other=-1).to(tl.int64) - start
        here = (column >= 0) & (column < BLOCK)
        if tl.max(here.to(tl.int32), 0) > 0:
            grad = tl.load(grad_logprobs_ptr + place, mask=keep, other=0.0)
            at_target = here[:, None] & (column.to(tl.int32)[:, None] == tl.arange(0, BLOCK)[None, :])
            dz += tl.where(at_target, grad[:, None], 0.0)
    return dz


@triton.jit(do_not_specialize=["n_rows", "inner", "targets_per_row", "splits", "blocks"])
def _gradient(
    grad_logprobs_ptr, grad_entropy_ptr, grad_logsumexp_ptr, logits_ptr, out_ptr, targets_ptr, mask_ptr,
    temperature_ptr, entropy_ptr, parts_ptr,
    n_rows, inner, outer_stride, stride, out_outer_stride, out_stride, columns, width, targets_per_row, splits, blocks,
    factor, in_scale, cap,
    SHAPE: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of a share of a tile's columns; out_ptr may be logits_ptr."""
    tile = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    rows, exists, real = tile_rows(tile, n_rows, mask_ptr, ROWS)
    keep, top, log_sum, constant, grad_entropy, entropy = _row_gradients(
        targets_ptr, grad_logprobs_ptr, grad_entropy_ptr, grad_logsumexp_ptr, entropy_ptr, parts_ptr,
        rows, real, columns, targets_per_row, ROWS,
    )  # fmt: skip
    factors = row_factors(factor, temperature_ptr, rows, keep)
    slope = factors
    if SHAPE == NEGATED:
        slope = -factors
    if SHAPE == CAPPED:
        slope = factors * in_scale * cap
    column = tl.arange(0, BLOCK)[None, :]
    pointers = logits_ptr + row_offsets(rows, inner, outer_stride, stride)[:, None] + column
    out_pointers = out_ptr + row_offsets(rows, inner, out_outer_stride, out_stride)[:, None] + column
    begin = split * blocks * BLOCK
    end = tl.minimum(begin + blocks * BLOCK, width)

    in_range = keep[:, None] & (column < columns - begin)
    x = load_logits(pointers + begin, in_range, SHAPE)
    for start in range(begin, end, BLOCK):
        u = shaped(x, in_range, in_scale, cap, SHAPE)
        in_range = keep[:, None] & (column < tl.minimum(end, columns) - start - BLOCK)
        x = load_logits(pointers + start + BLOCK, in_range, SHAPE)  # on its way while this block is worked on
        exponent = (u - top[:, None]) * (factors * LOG2E)[:, None]
        p = tl.exp2(exponent - (log_sum * LOG2E)[:, None])
        dz = p * constant[:, None]
        if grad_entropy_ptr is not None:
            # log p + entropy from the small difference of the row's numbers; 0 * -inf = 0
            above_mean = tl.maximum(exponent, -200.0) + ((entropy - log_sum) * LOG2E)[:, None]
            dz = p * (constant[:, None] - (grad_entropy * LN2)[:, None] * above_mean)
        if grad_logprobs_ptr is not None:
            dz = _add_at_targets(
                dz, start, targets_ptr, grad_logprobs_ptr, rows, keep, targets_per_row, ROWS, BLOCK
            )  # fmt: skip
        if SHAPE == CAPPED:
            bent = tl.maximum(u / cap, -1.0)  # u is -inf where it was not read
            dz *= 1.0 - bent * bent
        dx = dz * slope[:, None]
        if PADDED:
            dx = tl.where(column < columns - start, dx, 0.0)
        tl.store(out_pointers + start, dx.to(out_ptr.dtype.element_ty), mask=exists[:, None] & (column < width - start))


def token_stats_backward(
    grad_logprobs: Tensor | None,  # as targets
    grad_entropy: Tensor | None,  # (...)
    grad_logsumexp: Tensor | None,  # (...)
    logits: Tensor,  # (..., V)
    *saved_and_options: Any,
) -> Tensor:
    """`saved_and_options` as `_write_gradient` has them."""
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _write_gradient(grad, grad_logprobs, grad_entropy, grad_logsumexp, logits, *saved_and_options)
    return grad


def token_stats_backward_(
    grad_logprobs: Tensor | None,  # as targets
    grad_entropy: Tensor | None,  # (...)
    grad_logsumexp: Tensor | None,  # (...)
    logits: Tensor,  # (..., V), overwritten
    *saved_and_options: Any,
) -> None:
    _write_gradient(logits, grad_logprobs, grad_entropy, grad_logsumexp, logits, *saved_and_options)


def _write_gradient(
    grad_logits: Tensor,  # (..., V), may be logits
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    grad_logsumexp: Tensor | None,
    logits: Tensor,
    targets: Tensor | None,  # (...) or (..., K)
    mask: Tensor | None,  # (...)
    row_temperature: Tensor | None,  # (...)
    entropy: Tensor | None,  # (...)
    parts: Tensor,  # (..., 2)
    temperature: float,
    logit_scale: float,
    softcap: float,
    vocab_size: int,
) -> None:
    if logits.numel() == 0:
        return
    (x, out), inner, strides = dense_rows(logits, grad_logits)
    width = x.shape[-1]
    n_rows = x.numel() // width
    columns = width if vocab_size < 0 else vocab_size
    tile = tile_for(x, vectors_per_thread=2)
    tiles = triton.cdiv(n_rows, tile.rows)
    splits, blocks = spans_for(width, tile.block)
    shape = shaping(temperature, logit_scale, softcap)
    launch(
        _gradient, tiles * splits, x, dense(grad_logprobs), dense(grad_entropy), dense(grad_logsumexp), x, out,
        dense(targets), dense(mask), dense(row_temperature), dense(entropy), dense(parts),
        n_rows, inner, *strides, columns, width, targets.numel() // n_rows if targets is not None else 0, splits, blocks,
        *shape[:3], SHAPE=shape.shape, PADDED=columns < width, **tile.flat_constants(),
    )  # fmt: skip
    if out.data_ptr() != grad_logits.data_ptr():  # its layout had to be copied
        grad_logits.copy_(out)
