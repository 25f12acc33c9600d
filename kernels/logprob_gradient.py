# SPDX-License-Identifier: Apache-2.0
"""The gradient of token_stats: reads the logits once and writes once, possibly over them."""

import triton
import triton.language as tl

from rlhf_fast.kernels.common import LN2, LOG2E, narrow
from rlhf_fast.kernels.rows import (
    CAPPED,
    NEGATED,
    load_logits,
    row_factors,
    row_offsets,
    shaped,
    tile_rows,
)


@triton.jit
def _row_gradients(
    targets_ptr, grad_logprobs_ptr, grad_entropy_ptr, grad_logsumexp_ptr, entropy_ptr, parts_ptr,
    rows, real, columns, targets_per_row, ROWS: tl.constexpr,
):  # fmt: skip
    """The numbers of a row in dz_j = p_j (constant - g_entropy (log p_j + entropy)), without the targets' part.

    For masked rows and rows of -inf, values that could be NaN are replaced; their logits are not read, so all becomes
    0.
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
    """Adds the gradients of the targets in this block; equal targets of a row add up."""
    for k in range(targets_per_row):
        place = rows.to(tl.int64) * targets_per_row + k
        column = tl.load(targets_ptr + place, mask=keep, other=-1).to(tl.int64) - start
        here = (column >= 0) & (column < BLOCK)
        if tl.max(here.to(tl.int32), 0) > 0:
            grad = tl.load(grad_logprobs_ptr + place, mask=keep, other=0.0)
            at_target = here[:, None] & (column.to(tl.int32)[:, None] == tl.arange(0, BLOCK)[None, :])
            dz += tl.where(at_target, grad[:, None], 0.0)
    return dz


@triton.jit(do_not_specialize=["n_rows", "inner", "splits", "blocks"])
def token_stats_gradient(
    grad_logprobs_ptr, grad_entropy_ptr, grad_logsumexp_ptr, logits_ptr, out_ptr, targets_ptr, mask_ptr,
    temperature_ptr, entropy_ptr, parts_ptr,
    n_rows, inner, outer_stride, stride, out_outer_stride, out_stride, columns, readable, width,
    targets_per_row, splits, blocks, factor, in_scale, cap,
    SHAPE: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of a split of a tile's columns; out_ptr may be logits_ptr."""
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
    column = tl.arange(0, BLOCK)[None, :]  # added to the block's begin first: sums of 64 bits take more registers
    pointers = logits_ptr + row_offsets(rows, inner, outer_stride, stride)[:, None]
    out_pointers = out_ptr + row_offsets(rows, inner, out_outer_stride, out_stride)[:, None]
    begin = split * blocks * BLOCK
    end = tl.minimum(begin + blocks * BLOCK, width)

    in_range = keep[:, None] & (column < readable - begin)
    x = load_logits(pointers + (column + begin), in_range, SHAPE)
    for start in range(begin, end, BLOCK):
        counts = in_range & (column < columns - start)
        u = shaped(x, counts, in_scale, cap, SHAPE, PADDED)
        in_range = keep[:, None] & (column < tl.minimum(end, readable) - start - BLOCK)
        # prefetched while this block is computed
        x = load_logits(pointers + (column + (start + BLOCK)), in_range, SHAPE)
        exponent = (u - top[:, None]) * (factors * LOG2E)[:, None]
        p = tl.exp2(exponent - (log_sum * LOG2E)[:, None])
        dz = p * constant[:, None]
        if grad_entropy_ptr is not None:
            # log p + entropy, from the small difference entropy - log_sum; 0 * -inf = 0
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
        inside = exists[:, None] & (column < width - start)
        tl.store(out_pointers + (column + start), narrow(dx, out_ptr.dtype.element_ty), mask=inside)
