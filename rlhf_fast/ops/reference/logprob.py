# SPDX-License-Identifier: Apache-2.0
"""token_stats and its gradient: the definition. The mathematics is in `rlhf_fast/ops/logprob.py`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.ops import codes
from rlhf_fast.ops.reference.common import accumulate_dtype, zero_where_masked


class ShapedLogits(NamedTuple):
    """A row's logits x as the softmax takes them, z = u * factor, and how z depends on them.

    Where there is no softcap u is x, or -x for a negative logit_scale. The row's maximum is taken over u, in every
    backend: subtracting it before `factor` multiplies keeps the digits of logits that share a large offset.
    """

    u: Tensor  # (..., V)
    factor: float | Tensor  # > 0; (..., 1) where temperatures are per row
    slope: Tensor  # dz/dx, broadcasts to (..., V)

    @property
    def z(self) -> Tensor:
        return self.u * self.factor


def shape_logits(
    logits: Tensor,  # (..., V)
    row_temperature: Tensor | None,  # (...)
    temperature: float,
    logit_scale: float,
    softcap: float,
    vocab_size: int,
) -> ShapedLogits:
    """z = softcap * tanh(logit_scale * x / softcap) / temperature; softcap 0 leaves the tanh out."""
    x = (logits[..., :vocab_size] if vocab_size >= 0 else logits).to(accumulate_dtype(logits.dtype))
    slope = torch.full((), logit_scale, dtype=x.dtype, device=x.device)
    scale = abs(logit_scale)
    if softcap > 0:
        capped = torch.tanh(x * (logit_scale / softcap))
        u, slope, scale = softcap * capped, slope * (1 - capped * capped), 1.0
    else:
        u = -x if logit_scale < 0 else x
    divisor = temperature if row_temperature is None else row_temperature.to(x.dtype).unsqueeze(-1)
    return ShapedLogits(u, scale / divisor, slope / divisor)


def log_softmax(shaped: ShapedLogits) -> tuple[Tensor, Tensor, Tensor]:
    """Row max of u, log of the sum of exp((u - max) factor), and log-probabilities.

    The first two are what a row's `parts` hold. A row of all -inf has max -inf, log-sum 0 and log-probabilities -inf.
    """
    row_max = shaped.u.amax(-1)
    all_forbidden = row_max == -torch.inf
    below_max = (shaped.u - torch.where(all_forbidden, 0.0, row_max).unsqueeze(-1)) * shaped.factor
    log_sum = torch.where(all_forbidden, 0.0, below_max.exp().sum(-1).log())
    return row_max, log_sum, below_max - log_sum.unsqueeze(-1)


def log_softmax_again(shaped: ShapedLogits, row_max: Tensor, log_sum: Tensor) -> Tensor:
    """Log-probabilities from what the forward saved of each row."""
    safe_max = torch.where(row_max == -torch.inf, 0.0, row_max)
    return (shaped.u - safe_max.unsqueeze(-1)) * shaped.factor - log_sum.unsqueeze(-1)


def logsumexp_of(row_max: Tensor, log_sum: Tensor, factor: float | Tensor) -> Tensor:
    """The logsumexp of z that a row's max of u and its log-sum stand for; factor as in ShapedLogits."""
    return row_max * (factor.squeeze(-1) if isinstance(factor, Tensor) else factor) + log_sum


def times(weight: Tensor, log_value: Tensor) -> Tensor:
    """weight * log_value, with 0 * (-inf) = 0."""
    return torch.where(weight == 0, 0.0, weight * log_value)


def _valid_targets(targets: Tensor, columns: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Targets (..., K) that can be gathered, and where they were in range; masked rows may hold anything."""
    if mask is not None:
        targets = torch.where(mask.unsqueeze(-1), targets, 0)
    valid = (targets >= 0) & (targets < columns)
    return torch.where(valid, targets, 0).long(), valid


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
    shaped = shape_logits(logits, row_temperature, temperature, logit_scale, softcap, vocab_size)
    u = shaped.u
    rows = u.shape[:-1]
    if u.shape[-1] == 0 or u.numel() == 0:
        return _empty_stats(u, targets, outputs)
    row_max, log_sum, logp = log_softmax(shaped)
    probs = logp.exp()

    logprobs, entropy, logsumexp, sum_sq_probs = (u.new_empty(0) for _ in range(4))
    argmax = torch.empty(0, dtype=torch.int64, device=u.device)
    if outputs & codes.LOGPROBS:
        assert targets is not None
        index, valid = _valid_targets(_with_k(targets, rows), u.shape[-1], mask)
        logprobs = torch.where(valid, logp.gather(-1, index), torch.nan)
        logprobs = zero_where_masked(logprobs, None if mask is None else mask.unsqueeze(-1))
        logprobs = logprobs.view(targets.shape)
    if outputs & codes.ENTROPY:
        entropy = zero_where_masked(-times(probs, logp).sum(-1), mask)
    if outputs & codes.LOGSUMEXP:
        logsumexp = zero_where_masked(logsumexp_of(row_max, log_sum, shaped.factor), mask)
    if outputs & codes.SUM_SQ_PROBS:
        sum_sq_probs = zero_where_masked(probs.square().sum(-1), mask)
    if outputs & codes.ARGMAX:
        argmax = zero_where_masked(u.argmax(-1), mask)
    parts = zero_where_masked(torch.stack([row_max, log_sum], -1), None if mask is None else mask.unsqueeze(-1))
    assert parts.shape == (*rows, 2)
    return logprobs, entropy, logsumexp, sum_sq_probs, argmax, parts


def _with_k(targets: Tensor, rows: torch.Size) -> Tensor:
    return targets.unsqueeze(-1) if targets.shape == rows else targets


def _empty_stats(u: Tensor, targets: Tensor | None, outputs: int) -> tuple[Tensor, ...]:
    """Results of a batch without rows."""
    rows = u.shape[:-1]
    shapes = [targets.shape if targets is not None else rows, rows, rows, rows, rows]
    dtypes = [u.dtype] * 4 + [torch.int64]
    results = [
        torch.zeros(shape if outputs & (1 << bit) else (0,), dtype=dtype, device=u.device)
        for bit, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    ]
    return (*results, u.new_zeros((*rows, 2)))


def token_stats_backward(
    grad_logprobs: Tensor | None,  # as targets
    grad_entropy: Tensor | None,  # (...)
    grad_logsumexp: Tensor | None,  # (...)
    logits: Tensor,  # (..., V)
    targets: Tensor | None,  # (...) or (..., K)
    mask: Tensor | None,  # (...)
    row_temperature: Tensor | None,  # (...)
    entropy: Tensor | None,  # (...)
    parts: Tensor,  # (..., 2): row max of u, log-sum
    temperature: float,
    logit_scale: float,
    softcap: float,
    vocab_size: int,
) -> Tensor:
    shaped = shape_logits(logits, row_temperature, temperature, logit_scale, softcap, vocab_size)
    u = shaped.u
    if u.numel() == 0:
        return torch.zeros_like(logits, memory_format=torch.contiguous_format)
    row_max = parts[..., 0]
    logp = log_softmax_again(shaped, row_max, parts[..., 1])
    probs = logp.exp()
    grad = torch.zeros_like(u)
    if grad_logsumexp is not None:
        grad += probs * grad_logsumexp.unsqueeze(-1)
    if grad_logprobs is not None:
        assert targets is not None
        index, valid = _valid_targets(_with_k(targets, row_max.shape), u.shape[-1], mask)
        picked = torch.where(valid, grad_logprobs.to(u.dtype).reshape(index.shape), torch.nan)
        grad -= probs * picked.sum(-1, keepdim=True)
        grad.scatter_add_(-1, index, picked)
    if grad_entropy is not None:
        assert entropy is not None
        grad -= grad_entropy.unsqueeze(-1) * times(probs, logp + entropy.unsqueeze(-1))
    alive = row_max != -torch.inf
    grad = zero_where_masked(grad * shaped.slope, (alive if mask is None else alive & mask).unsqueeze(-1))
    result = torch.zeros_like(logits, memory_format=torch.contiguous_format)
    result[..., : u.shape[-1]] = grad.to(logits.dtype)
    return result
