# SPDX-License-Identifier: Apache-2.0
"""The KL of a policy's tile and a reference's, each of whole rows: `token_kl`, and the two cases that it does not know.

Heads that differ in scale or softcap are brought to the softmax's own logits first, in float32. A vocabulary sharded
over ranks takes the laws' normalisers from all ranks, and sums every rank's share of the divergence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fast.ops.linear.shards import Shard
from rlhf_fast.ops.linear.slices import RowOptions, Slices, fold
from rlhf_fast.ops.reference import accumulate_dtype
from rlhf_fast.ops.reference.kl import kl_slopes, kl_terms
from rlhf_fast.ops.reference.logprob import log_softmax_again, shape_logits


def pair_kl(
    ops: Any,
    tile: Tensor,  # (n, V)
    ref_tile: Tensor,  # (n, V)
    options: RowOptions,
    ref_options: RowOptions,
    kind: int,
    beta: float,
    shard: Shard,
) -> tuple[Tensor, Tensor]:
    """The divergence (n,) and what its gradient needs (n, 6)."""
    (tile, options), (ref_tile, ref_options) = _alike(tile, options, ref_tile, ref_options)
    if shard.group is None:
        return ops.token_kl(tile, ref_tile, None, *_row_options(options, ref_options), -1, kind, beta)
    dtype = accumulate_dtype(tile.dtype)
    (logp, parts), (logq, ref_parts) = (
        _global_logprobs(ops, x, o, shard, dtype) for x, o in ((tile, options), (ref_tile, ref_options))
    )
    slope_p, slope_q = kl_slopes(logp, logq, kind, beta)
    sums = torch.stack([
        kl_terms(logp, logq, kind, beta).sum(-1), (logp.exp() * slope_p).sum(-1), (logq.exp() * slope_q).sum(-1)
    ], -1)  # fmt: skip
    sums = shard.sum(sums)
    return sums[:, 0], torch.cat([parts, ref_parts, sums[:, 1:]], -1)


def pair_kl_backward(
    ops: Any,
    grad_kl: Tensor,  # (n,)
    tile: Tensor,
    ref_tile: Tensor,
    options: RowOptions,
    ref_options: RowOptions,
    kind: int,
    beta: float,
    parts: Tensor,  # (n, 6)
    needed: bool,
    ref_needed: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients to the two tiles, (0,) where not needed."""
    (z, own), (y, ref_own) = _alike(tile, options, ref_tile, ref_options)
    grads = ops.token_kl_backward(
        grad_kl, z, y, None, own.row_temperature, ref_own.row_temperature, parts, own.temperature,
        ref_own.temperature, own.logit_scale, own.softcap, -1, kind, beta, needed, ref_needed,
    )  # fmt: skip
    if z is not tile:
        for grad, logits, shape in zip(grads, (z, y), (options, ref_options), strict=True):
            if grad.numel():
                grad *= shape.logit_scale * (1 - (logits / shape.softcap).square() if shape.softcap > 0 else 1)
    return grads


def _row_options(options: RowOptions, ref: RowOptions) -> tuple[Any, ...]:
    return (
        options.row_temperature, ref.row_temperature, options.temperature, ref.temperature, options.logit_scale,
        options.softcap,
    )  # fmt: skip


def _alike(
    tile: Tensor, options: RowOptions, ref_tile: Tensor, ref_options: RowOptions
) -> tuple[tuple[Tensor, RowOptions], tuple[Tensor, RowOptions]]:
    """Both as they are where scale and softcap agree, else both scaled and capped, with neither left to do."""
    if options[2:] == ref_options[2:]:
        return (tile, options), (ref_tile, ref_options)
    dtype = accumulate_dtype(tile.dtype)

    def shaped(x: Tensor, o: RowOptions) -> tuple[Tensor, RowOptions]:
        z = x.to(dtype) * o.logit_scale
        if o.softcap > 0:
            z = torch.tanh(z / o.softcap) * o.softcap
        return z, o._replace(logit_scale=1.0, softcap=0.0)

    return shaped(tile, options), shaped(ref_tile, ref_options)


def _global_logprobs(
    ops: Any, tile: Tensor, options: RowOptions, shard: Shard, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """This rank's columns of the log-probabilities (n, V / ranks), and the rows' max and log-sum (n, 2) over all."""
    slices = Slices.dead(1, tile.shape[0], 0, 0, tile, dtype)
    fold(ops, slices, 0, slice(0, tile.shape[0]), tile, None, None, options, 0, 0)
    parts = shard.merge(slices, options.factor).results(options.factor, dtype, False)[-1]
    assert parts is not None
    return log_softmax_again(shape_logits(tile, *options, -1), parts[:, 0], parts[:, 1]), parts
