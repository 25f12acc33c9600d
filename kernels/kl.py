# SPDX-License-Identifier: Apache-2.0
"""The family kl in Triton: token_kl, its gradient, and both at once; see rlhf_fast/ops/kl.py for the mathematics.

reverse and forward read each logits tensor once (kernels/kl_ratio.py). jsd and tv need normalised probabilities: each
side is reduced as for token_stats, then both are read a second time (kernels/kl_gradient.py). The gradient reads both
and writes the requested sides. approx_kl is in kernels/kl_estimators.py.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.kernels import logprob
from rlhf_fast.kernels.common import dense, launch
from rlhf_fast.kernels.kl_estimators import approx_kl, approx_kl_backward
from rlhf_fast.kernels.kl_gradient import TERMS, token_kl_gradient, token_kl_terms
from rlhf_fast.kernels.kl_ratio import PARTIALS, token_kl_combine, token_kl_fold
from rlhf_fast.kernels.rows import Rows, Tile, rows_of, shaping, spans_for, splits_for
from rlhf_fast.ops import codes

__all__ = ["approx_kl", "approx_kl_backward", "token_kl", "token_kl_and_grad", "token_kl_backward"]

LANES = 256  # vectors of each side in a block, one per thread
LANES_FUSED = 512  # with the gradient in the same program: fewer rows at once, so that more of them stay in the cache


class _Pair(NamedTuple):
    """The sides a and b of KL(a, b) for the kernels: forward is reverse with policy and reference swapped."""

    rows: Rows
    tensors: tuple[Tensor | None, ...]  # a, b, mask, both row temperatures
    factors: tuple[float, ...]  # both factors, in_scale, cap
    shape: Any
    swapped: int  # 1 for forward

    @property
    def layout(self) -> tuple[int, ...]:
        return self.rows.count, self.rows.inner, *self.rows.strides, self.rows.columns, self.rows.readable

    def in_order(self, policys: Any, references: Any) -> tuple[Any, Any]:
        return (references, policys) if self.swapped else (policys, references)


def _pair(
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    row_temperature: Tensor | None,
    ref_row_temperature: Tensor | None,
    temperature: float,
    ref_temperature: float,
    logit_scale: float,
    softcap: float,
    vocab_size: int,
    kind: int,
    beta: float,
) -> _Pair:
    policy, reference = shaping(temperature, logit_scale, softcap), shaping(ref_temperature, logit_scale, softcap)
    sides, temperatures = (logits, ref_logits), (dense(row_temperature), dense(ref_row_temperature))
    factors = (policy.factor, reference.factor)
    swapped = kind == codes.FORWARD
    if swapped:
        sides, temperatures, factors = sides[::-1], temperatures[::-1], factors[::-1]
    rows = rows_of(*sides, vocab_size=vocab_size)
    tensors = (*rows.tensors, dense(mask), *temperatures)
    return _Pair(rows, tensors, (*factors, policy.in_scale, policy.cap), policy.shape, int(swapped))


def token_kl(
    logits: Tensor,  # (..., V)
    ref_logits: Tensor,  # (..., V)
    *tensors_and_options: Any,
) -> tuple[Tensor, Tensor]:
    """The divergence (...) and its parts (..., 6); `tensors_and_options` as in `_pair`."""
    rows = logits.shape[:-1]
    kl, parts = (torch.empty(s, dtype=torch.float32, device=logits.device) for s in (rows, (*rows, 6)))
    if logits.numel() == 0:
        return kl.zero_(), parts.zero_()
    kind, beta = tensors_and_options[-2:]
    pair = _pair(logits, ref_logits, *tensors_and_options)
    if kind in (codes.JSD, codes.TV):
        _by_terms(pair, kind, beta, kl, parts, logits, ref_logits, *tensors_and_options)
        return kl, parts
    tile, tiles = pair.rows.tiles(LANES, 1)
    splits, blocks = splits_for(tiles, pair.rows.columns, tile.block, logits.device)
    partials = kl.new_empty((pair.rows.count, splits, PARTIALS.value)) if splits > 1 else None
    _fold(pair, tile, tiles, splits, blocks, kl, parts, partials)
    if splits > 1:
        launch(
            token_kl_combine, pair.rows.count, logits, *pair.tensors[2:], kl, parts, partials, pair.rows.count, splits,
            *pair.factors[:2], SWAPPED=pair.swapped, num_warps=2,
        )  # fmt: skip
    return kl, parts


def _fold(
    pair: _Pair, tile: Tile, tiles: int, splits: int, blocks: int, kl: Tensor, parts: Tensor | None,
    partials: Tensor | None, grad_kl: Tensor | None = None, grad: Tensor | None = None,
) -> None:  # fmt: skip
    """reverse or forward in one pass, per split, or with the gradient in a second pass."""
    launch(
        token_kl_fold, tiles * splits, kl, *pair.tensors, kl, parts, partials, grad_kl, *pair.in_order(grad, None),
        *pair.layout, pair.rows.width, splits, blocks, *pair.factors,
        SWAPPED=pair.swapped, SHAPE=pair.shape, PADDED=pair.rows.columns < pair.rows.width, **tile.constants(),
    )  # fmt: skip


def _by_terms(
    pair: _Pair, kind: int, beta: float, kl: Tensor, parts: Tensor,
    logits: Tensor, ref_logits: Tensor, mask: Tensor | None, row_temperature: Tensor | None,
    ref_row_temperature: Tensor | None, temperature: float, ref_temperature: float, *options: Any,
) -> None:  # fmt: skip
    """jsd and tv into `kl` and `parts`: normalise each side, read both again, and sum over the splits."""
    logit_scale, softcap, vocab_size = options[:3]
    norms = [
        logprob.token_stats(x, None, mask, rows, scalar, logit_scale, softcap, vocab_size, 0, False)[-1].view(-1, 2)
        for x, rows, scalar in (
            (logits, row_temperature, temperature), (ref_logits, ref_row_temperature, ref_temperature),
        )
    ]  # fmt: skip
    tile, tiles = pair.rows.tiles(LANES, 1)
    splits, blocks = splits_for(tiles, pair.rows.columns, tile.block, logits.device)
    sums = kl.new_empty((pair.rows.count, splits, TERMS.value))
    launch(
        token_kl_terms, tiles * splits, kl, *pair.tensors, *norms, sums, *pair.layout, splits, blocks,
        *pair.factors, beta,
        KIND=kind, SHAPE=pair.shape, PADDED=pair.rows.columns < pair.rows.readable, **tile.constants(),
    )  # fmt: skip
    totals = sums.sum(1)
    parts.view(-1, 6).copy_(torch.cat((*norms, totals[:, :2]), 1))
    kl.view(-1).copy_(totals[:, 2])


def token_kl_backward(
    grad_kl: Tensor,  # (...)
    logits: Tensor,  # (..., V)
    ref_logits: Tensor,  # (..., V)
    mask: Tensor | None,  # (...)
    row_temperature: Tensor | None,  # (...)
    ref_row_temperature: Tensor | None,  # (...)
    parts: Tensor,  # (..., 6): max, log-sum, ref max, ref log-sum, sum p s_p, sum q s_q
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """Gradients in logits and in ref_logits, each (..., V), empty where not needed (the last two options)."""
    *options, kind, beta, needs_grad, needs_ref_grad = options
    grads = [
        torch.empty(x.shape if needed else 0, dtype=x.dtype, device=x.device)
        for x, needed in ((logits, needs_grad), (ref_logits, needs_ref_grad))
    ]
    if logits.numel() == 0 or not (needs_grad or needs_ref_grad):
        return grads[0], grads[1]
    pair = _pair(logits, ref_logits, mask, row_temperature, ref_row_temperature, *options, kind, beta)
    tile, tiles = pair.rows.tiles(LANES, 1)
    splits, blocks = spans_for(tiles, pair.rows.width, tile.block, logits.device)
    launch(
        token_kl_gradient, tiles * splits, logits, *pair.tensors, dense(parts), dense(grad_kl),
        *pair.in_order(grads[0] if needs_grad else None, grads[1] if needs_ref_grad else None),
        *pair.layout, pair.rows.width, splits, blocks, *pair.factors, beta,
        KIND=codes.REVERSE if pair.swapped else kind, SWAPPED=pair.swapped, SHAPE=pair.shape,
        PADDED=pair.rows.columns < pair.rows.width, **tile.flat_constants(),
    )  # fmt: skip
    return grads[0], grads[1]


def token_kl_and_grad(
    grad_kl: Tensor,  # (...)
    logits: Tensor,  # (..., V)
    ref_logits: Tensor,  # (..., V)
    mask: Tensor | None,  # (...)
    row_temperature: Tensor | None,  # (...)
    ref_row_temperature: Tensor | None,  # (...)
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """The divergence (...) and the gradient in logits (..., V).

    After reducing its row a program goes back over it from the end, most of which is still in cache. With too few rows
    for that, and for jsd and tv, forward and backward run one after the other.
    """
    tensors = (logits, ref_logits, mask, row_temperature, ref_row_temperature)
    if logits.numel() > 0 and options[-2] in (codes.REVERSE, codes.FORWARD):
        pair = _pair(*tensors, *options)
        tile, tiles = pair.rows.tiles(LANES_FUSED, 1)
        splits, blocks = splits_for(tiles, pair.rows.columns, tile.block, logits.device)
        if splits == 1:
            kl = torch.empty(logits.shape[:-1], dtype=torch.float32, device=logits.device)
            grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
            _fold(pair, tile, tiles, 1, blocks, kl, None, None, dense(grad_kl), grad)
            return kl, grad
    kl, parts = token_kl(*tensors, *options)
    return kl, token_kl_backward(grad_kl, *tensors, parts, *options, True, False)[0]
