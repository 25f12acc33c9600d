# SPDX-License-Identifier: Apache-2.0
"""KL between a tile of the policy and one of the reference, each of whole rows: `token_kl`, and two cases that it
lacks.

If the heads differ in scale or softcap, both are applied first, in float32. If the vocabulary is sharded over ranks,
the softmaxes are normalised over all ranks, and the ranks' parts of the divergence are summed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.ops.linear.shards import Shard
from rlhf_fast.ops.linear.slices import Shaping, Slices, fold
from rlhf_fast.ops.reference import accumulate_dtype
from rlhf_fast.ops.reference.kl import kl_slopes, kl_terms
from rlhf_fast.ops.reference.logprob import log_softmax_again, shape_logits


class Pair(NamedTuple):
    """The logits of the same rows under two heads."""

    tile: Tensor  # (n, V)
    ref_tile: Tensor  # (n, V)
    shaping: Shaping
    ref_shaping: Shaping


def pair_kl(ops: Any, pair: Pair, kind: int, beta: float, shard: Shard) -> tuple[Tensor, Tensor]:
    """The divergence (n,) and its parts (n, 6) for the backward."""
    pair = _shaped_alike(pair)
    if shard.group is None:
        return ops.token_kl(pair.tile, pair.ref_tile, None, *_kernel_options(pair), -1, kind, beta)
    dtype = accumulate_dtype(pair.tile.dtype)
    logp, parts = _global_logprobs(ops, pair.tile, pair.shaping, shard, dtype)
    logq, ref_parts = _global_logprobs(ops, pair.ref_tile, pair.ref_shaping, shard, dtype)
    slope_p, slope_q = kl_slopes(logp, logq, kind, beta)
    sums = torch.stack([
        kl_terms(logp, logq, kind, beta).sum(-1), (logp.exp() * slope_p).sum(-1), (logq.exp() * slope_q).sum(-1)
    ], -1)  # fmt: skip
    sums = shard.sum(sums)
    return sums[:, 0], torch.cat([parts, ref_parts, sums[:, 1:]], -1)


def pair_kl_backward(
    ops: Any,
    grad_kl: Tensor,  # (n,)
    pair: Pair,
    kind: int,
    beta: float,
    parts: Tensor,  # (n, 6)
    needed: bool,
    ref_needed: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of the two tiles, (0,) where not needed."""
    alike = _shaped_alike(pair)
    policy, ref = alike.shaping, alike.ref_shaping
    grads = ops.token_kl_backward(
        grad_kl, alike.tile, alike.ref_tile, None, policy.row_temperature, ref.row_temperature, parts,
        policy.temperature, ref.temperature, policy.logit_scale, policy.softcap, -1, kind, beta, needed, ref_needed,
    )  # fmt: skip
    if alike is not pair:
        for grad, capped, shaping in zip(
            grads, (alike.tile, alike.ref_tile), (pair.shaping, pair.ref_shaping), strict=True
        ):
            if grad.numel():
                grad *= shaping.logit_scale * (1 - (capped / shaping.softcap).square() if shaping.softcap > 0 else 1)
    return grads


def _kernel_options(pair: Pair) -> tuple[Any, ...]:
    """The arguments of `token_kl` from the row temperatures to the softcap."""
    policy, ref = pair.shaping, pair.ref_shaping
    return (
        policy.row_temperature, ref.row_temperature, policy.temperature, ref.temperature, policy.logit_scale,
        policy.softcap,
    )  # fmt: skip


def _shaped_alike(pair: Pair) -> Pair:
    """The pair itself if scale and softcap agree, else a pair of tiles to which both are already applied."""
    policy, ref = pair.shaping, pair.ref_shaping
    if (policy.logit_scale, policy.softcap) == (ref.logit_scale, ref.softcap):
        return pair
    dtype = accumulate_dtype(pair.tile.dtype)

    def shaped(x: Tensor, shaping: Shaping) -> Tensor:
        z = x.to(dtype) * shaping.logit_scale
        return torch.tanh(z / shaping.softcap) * shaping.softcap if shaping.softcap > 0 else z

    return Pair(
        shaped(pair.tile, policy), shaped(pair.ref_tile, ref),
        policy._replace(logit_scale=1.0, softcap=0.0), ref._replace(logit_scale=1.0, softcap=0.0),
    )  # fmt: skip


def _global_logprobs(
    ops: Any, tile: Tensor, shaping: Shaping, shard: Shard, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """This rank's columns of the log-probabilities (n, V / ranks), and the rows' max and log-sum (n, 2) over all."""
    slices = Slices.empty(1, tile.shape[0], 0, 0, tile, dtype)
    fold(ops, slices, 0, slice(0, tile.shape[0]), tile, None, None, shaping, 0, 0)
    parts = shard.merge(slices, shaping.factor).row_statistics(shaping.factor, dtype, 0).parts
    return log_softmax_again(shape_logits(tile, *shaping, -1), parts[:, 0], parts[:, 1]), parts
