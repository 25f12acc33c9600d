# SPDX-License-Identifier: Apache-2.0
"""token_stats and its gradient: the definition. The mathematics is in `rlhf_fast/ops/logprob.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.ops import codes
from rlhf_fast.ops.reference.common import accumulate_dtype, zero_where_masked


def transform(
    logits: Tensor,  # (..., V)
    row_temperature: Tensor | None,  # (...)
    temperature: float,
    logit_scale: float,
    softcap: float,
    vocab_size: int,
) -> tuple[Tensor, Tensor]:
    """z = softcap * tanh(logit_scale * x / softcap) / temperature, and dz/dx; softcap 0 leaves the tanh out."""
    x = logits[..., :vocab_size] if vocab_size >= 0 else logits
    z = x.to(accumulate_dtype(logits.dtype)) * logit_scale
    slope = torch.full((), logit_scale, dtype=z.dtype, device=z.device)
    if softcap > 0:
        capped = torch.tanh(z / softcap)
        z, slope = softcap * capped, slope * (1 - capped * capped)
    divisor = temperature if row_temperature is None else row_temperature.to(z.dtype).unsqueeze(-1)
    return z / divisor, slope / divisor


def softmax_parts(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row max, log of the sum of exp(z - max), and log-probabilities; kept apart, a common offset costs nothing.

    A row of all -inf has max -inf, log-sum 0 and log-probabilities -inf.
    """
    row_max = z.amax(-1)
    dead = row_max == -torch.inf
    shifted = z - torch.where(dead, 0.0, row_max).unsqueeze(-1)
    log_sum = torch.where(dead, 0.0, shifted.exp().sum(-1).log())
    return row_max, log_sum, shifted - log_sum.unsqueeze(-1)


def from_parts(z: Tensor, row_max: Tensor, log_sum: Tensor) -> Tensor:
    """Log-probabilities again, from saved row statistics."""
    safe_max = torch.where(row_max == -torch.inf, 0.0, row_max)
    return (z - safe_max.unsqueeze(-1)) - log_sum.unsqueeze(-1)


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
    z, _ = transform(logits, row_temperature, temperature, logit_scale, softcap, vocab_size)
    rows = z.shape[:-1]
    if z.shape[-1] == 0 or z.numel() == 0:
        return _empty_stats(z, targets, outputs)
    row_max, log_sum, logp = softmax_parts(z)
    probs = logp.exp()

    logprobs, entropy, logsumexp, sum_sq_probs = (z.new_empty(0) for _ in range(4))
    argmax = torch.empty(0, dtype=torch.int64, device=z.device)
    if outputs & codes.LOGPROBS:
        assert targets is not None
        index, valid = _valid_targets(_with_k(targets, rows), z.shape[-1], mask)
        logprobs = torch.where(valid, logp.gather(-1, index), torch.nan)
        logprobs = zero_where_masked(logprobs, None if mask is None else mask.unsqueeze(-1))
        logprobs = logprobs.view(targets.shape)
    if outputs & codes.ENTROPY:
        entropy = zero_where_masked(-times(probs, logp).sum(-1), mask)
    if outputs & codes.LOGSUMEXP:
        logsumexp = zero_where_masked(row_max + log_sum, mask)
    if outputs & codes.SUM_SQ_PROBS:
        sum_sq_probs = zero_where_masked(probs.square().sum(-1), mask)
    if outputs & codes.ARGMAX:
        argmax = zero_where_masked(z.argmax(-1), mask)
    parts = zero_where_masked(torch.stack([row_max, log_sum], -1), None if mask is None else mask.unsqueeze(-1))
    assert parts.shape == (*rows, 2)
    return logprobs, entropy, logsumexp, sum_sq_probs, argmax, parts


def _with_k(targets: Tensor, rows: torch.Size) -> Tensor:
    return targets.unsqueeze(-1) if targets.shape == rows else targets


def _empty_stats(z: Tensor, targets: Tensor | None, outputs: int) -> tuple[Tensor, ...]:
    """Results of a batch without rows."""
    rows = z.shape[:-1]
    shapes = [targets.shape if targets is not None else rows, rows, rows, rows, rows]
    dtypes = [z.dtype] * 4 + [torch.int64]
    results = [
        torch.zeros(shape if outputs & (1 << bit) else (0,), dtype=dtype, device=z.device)
        for bit, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    ]
    return (*results, z.new_zeros((*rows, 2)))


def token_stats_backward(
    grad_logprobs: Tensor | None,  # as targets
    grad_entropy: Tensor | None,  # (...)
    grad_logsumexp: Tensor | None,  # (...)
    logits: Tensor,  # (..., V)
    targets: Tensor | None,  # (...) or (..., K)
    mask: Tensor | None,  # (...)
    row_temperature: Tensor | None,  # (...)
    entropy: Tensor | None,  # (...)
    parts: Tensor,  # (..., 2): row max, log-sum
    temperature: float,
    logit_scale: float,
    softcap: float,
    vocab_size: int,
) -> Tensor:
    z, slope = transform(logits, row_temperature, temperature, logit_scale, softcap, vocab_size)
    if z.numel() == 0:
        return torch.zeros_like(logits, memory_format=torch.contiguous_format)
    row_max = parts[..., 0]
    logp = from_parts(z, row_max, parts[..., 1])
    probs = logp.exp()
    grad = torch.zeros_like(z)
    if grad_logsumexp is not None:
        grad += probs * grad_logsumexp.unsqueeze(-1)
    if grad_logprobs is not None:
        assert targets is not None
        index, valid = _valid_targets(_with_k(targets, row_max.shape), z.shape[-1], mask)
        picked = torch.where(valid, grad_logprobs.to(z.dtype).reshape(index.shape), torch.nan)
        grad -= probs * picked.sum(-1, keepdim=True)
        grad.scatter_add_(-1, index, picked)
    if grad_entropy is not None:
        assert entropy is not None
        grad -= grad_entropy.unsqueeze(-1) * times(probs, logp + entropy.unsqueeze(-1))
    alive = row_max != -torch.inf
    grad = zero_where_masked(grad * slope, (alive if mask is None else alive & mask).unsqueeze(-1))
    result = torch.zeros_like(logits, memory_format=torch.contiguous_format)
    result[..., : z.shape[-1]] = grad.to(logits.dtype)
    return result
