# SPDX-License-Identifier: Apache-2.0
"""token_kl, approx_kl and their gradients: the definition. The mathematics is in `rlhf_fast/ops/kl.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fast.ops import codes
from rlhf_fast.ops.reference.common import accumulate_dtype, zero_where_masked
from rlhf_fast.ops.reference.logprob import log_softmax, log_softmax_again, shape_logits, times

# In the gradient of a KL that is +inf, a reference log-probability of -inf counts as this many nats:
# just under log(smallest float32), so the gradient still pushes mass off the forbidden token, finitely.
LOG_FLOOR = -104.0


def token_kl(
    logits: Tensor,  # (..., V)
    ref_logits: Tensor,  # (..., V)
    mask: Tensor | None,  # (...)
    row_temperature: Tensor | None,  # (...)
    ref_row_temperature: Tensor | None,  # (...)
    temperature: float,
    ref_temperature: float,
    logit_scale: float,
    softcap: float,
    vocab_size: int,
    kind: int,
    beta: float,
) -> tuple[Tensor, Tensor]:
    policy = shape_logits(logits, row_temperature, temperature, logit_scale, softcap, vocab_size)
    ref = shape_logits(ref_logits, ref_row_temperature, ref_temperature, logit_scale, softcap, vocab_size)
    if policy.u.numel() == 0:
        return policy.u.new_zeros(policy.u.shape[:-1]), policy.u.new_zeros((*policy.u.shape[:-1], 6))
    row_max, log_sum, logp = log_softmax(policy)
    ref_max, ref_log_sum, logq = log_softmax(ref)
    p, q = logp.exp(), logq.exp()
    kl = kl_terms(logp, logq, kind, beta).sum(-1)
    slope_p, slope_q = kl_slopes(logp, logq, kind, beta)
    parts = torch.stack(
        [row_max, log_sum, ref_max, ref_log_sum, times(p, slope_p).sum(-1), times(q, slope_q).sum(-1)], -1
    )
    return zero_where_masked(kl, mask), zero_where_masked(parts, None if mask is None else mask.unsqueeze(-1))


def kl_terms(logp: Tensor, logq: Tensor, kind: int, beta: float) -> Tensor:
    """What each entry of the vocabulary adds to the divergence."""
    p, q = logp.exp(), logq.exp()
    if kind == codes.REVERSE:
        return times(p, _log_ratio(logp, logq))
    if kind == codes.FORWARD:
        return times(q, _log_ratio(logq, logp))
    if kind == codes.JSD:
        logm = ((1 - beta) * p + beta * q).log()
        return beta * times(q, logq - logm) + (1 - beta) * times(p, logp - logm)
    return 0.5 * (p - q).abs()


def _log_ratio(log_a: Tensor, log_b: Tensor) -> Tensor:
    """log a - log b, where a > 0 decides: (-inf) - (-inf) never matters, as it is weighed by a = 0."""
    return torch.where(log_a == -torch.inf, 0.0, log_a - log_b)


def kl_slopes(logp: Tensor, logq: Tensor, kind: int, beta: float) -> tuple[Tensor, Tensor]:
    """The s_p and s_q of the gradients p * (s_p - sum p s_p) and q * (s_q - sum q s_q); 0 where not of that form."""
    p, q, zero = logp.exp(), logq.exp(), torch.zeros_like(logp)
    if kind == codes.REVERSE:
        return torch.where(p > 0, logp - _floored(logq), zero), zero
    if kind == codes.FORWARD:
        return zero, torch.where(q > 0, logq - _floored(logp), zero)
    if kind == codes.JSD:
        logm = ((1 - beta) * p + beta * q).log()
        slope_p = torch.where(p > 0, (1 - beta) * (logp - logm), zero)
        return slope_p, torch.where(q > 0, beta * (logq - logm), zero)
    slope = 0.5 * torch.sign(p - q) + 0.0 * (p - q)  # sign(NaN) is 0; NaN must stay NaN
    return slope, -slope


def _floored(logp: Tensor) -> Tensor:
    return torch.where(logp == -torch.inf, LOG_FLOOR, logp)


def token_kl_backward(
    grad_kl: Tensor,  # (...)
    logits: Tensor,  # (..., V)
    ref_logits: Tensor,  # (..., V)
    mask: Tensor | None,  # (...)
    row_temperature: Tensor | None,  # (...)
    ref_row_temperature: Tensor | None,  # (...)
    parts: Tensor,  # (..., 6): max of u, log-sum, the same of the reference, sum p s_p, sum q s_q
    temperature: float,
    ref_temperature: float,
    logit_scale: float,
    softcap: float,
    vocab_size: int,
    kind: int,
    beta: float,
    needs_grad: bool,
    needs_ref_grad: bool,
) -> tuple[Tensor, Tensor]:
    policy = shape_logits(logits, row_temperature, temperature, logit_scale, softcap, vocab_size)
    ref = shape_logits(ref_logits, ref_row_temperature, ref_temperature, logit_scale, softcap, vocab_size)
    if policy.u.numel() == 0:
        logp, logq = policy.u, ref.u
    else:
        logp = log_softmax_again(policy, parts[..., 0], parts[..., 1])
        logq = log_softmax_again(ref, parts[..., 2], parts[..., 3])
    p, q = logp.exp(), logq.exp()
    slope_p, slope_q = kl_slopes(logp, logq, kind, beta)
    wrt_z = p - q if kind == codes.FORWARD else p * (slope_p - parts[..., 4:5])
    wrt_y = q - p if kind == codes.REVERSE else q * (slope_q - parts[..., 5:6])

    def finish(grad: Tensor, slope: Tensor, row_max: Tensor, like: Tensor) -> Tensor:
        keep = row_max != -torch.inf if mask is None else (row_max != -torch.inf) & mask
        result = torch.zeros_like(like, memory_format=torch.contiguous_format)
        scaled = zero_where_masked(grad_kl.unsqueeze(-1) * grad * slope, keep.unsqueeze(-1))
        result[..., : grad.shape[-1]] = scaled.to(like.dtype)
        return result

    return (
        finish(wrt_z, policy.slope, parts[..., 0], logits) if needs_grad else logits.new_empty(0),
        finish(wrt_y, ref.slope, parts[..., 2], ref_logits) if needs_ref_grad else logits.new_empty(0),
    )


def token_kl_and_grad(
    grad_kl: Tensor,  # (...)
    logits: Tensor,  # (..., V)
    ref_logits: Tensor,  # (..., V)
    mask: Tensor | None,  # (...)
    row_temperature: Tensor | None,  # (...)
    ref_row_temperature: Tensor | None,  # (...)
    *options: Any,
) -> tuple[Tensor, Tensor]:
    pair = (logits, ref_logits, mask, row_temperature, ref_row_temperature)
    kl, parts = token_kl(*pair, *options)
    return kl, token_kl_backward(grad_kl, *pair, parts, *options, True, False)[0]  # type: ignore[call-arg]


def _estimate(d: Tensor, estimator: int) -> tuple[Tensor, Tensor]:
    """Value and derivative of a KL estimator in d = logprobs - ref_logprobs."""
    if estimator == codes.K1:
        return d, torch.ones_like(d)
    if estimator == codes.K2:
        return 0.5 * d * d, d
    if estimator == codes.K3:
        return torch.expm1(-d) + d, -torch.expm1(-d)
    return d.abs(), torch.sign(d)


def approx_kl(
    logprobs: Tensor,  # (B, T)
    ref_logprobs: Tensor,  # (B, T)
    importance_ratio: Tensor | None,  # (B, T)
    mask: Tensor | None,  # (B, T)
    estimator: int,
    gradient: int,
    clamp: float,
) -> Tensor:
    dtype = accumulate_dtype(logprobs.dtype)
    value, _ = _estimate(logprobs.to(dtype) - ref_logprobs.to(dtype), estimator)
    value = value.clamp(-clamp, clamp)
    if importance_ratio is not None:
        value = value * importance_ratio.to(dtype)
    return zero_where_masked(value, mask).contiguous()


def approx_kl_backward(
    grad_kl: Tensor,  # (B, T)
    logprobs: Tensor,  # (B, T)
    ref_logprobs: Tensor,  # (B, T)
    importance_ratio: Tensor | None,  # (B, T)
    mask: Tensor | None,  # (B, T)
    estimator: int,
    gradient: int,
    clamp: float,
) -> tuple[Tensor, Tensor]:
    """Gradients in logprobs (that in ref_logprobs is its negative) and in the importance ratio."""
    dtype = accumulate_dtype(logprobs.dtype)
    d = logprobs.to(dtype) - ref_logprobs.to(dtype)
    value, slope = _estimate(d, estimator)
    if gradient == codes.STRAIGHT_THROUGH:
        slope = d
    grad_ratio = logprobs.new_empty(0, dtype=dtype)
    if importance_ratio is not None:
        slope = slope * importance_ratio.to(dtype)
        grad_ratio = zero_where_masked(grad_kl * value.clamp(-clamp, clamp), mask).contiguous()
    return zero_where_masked(grad_kl * slope, mask).contiguous(), grad_ratio
