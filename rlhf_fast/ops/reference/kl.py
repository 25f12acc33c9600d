# SPDX-License-Identifier: Apache-2.0
"""token_kl a block of rows at a time, approx_kl, and their gradients. The mathematics is in `rlhf_fast/ops/kl.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.ops import codes
from rlhf_fast.ops.reference.blocks import Buffers, row_blocks
from rlhf_fast.ops.reference.common import accumulate_dtype, zero_masked_, zero_where_masked
from rlhf_fast.ops.reference.logprob import (
    LOWEST,
    ShapedLogits,
    below_max,
    flat_temperature,
    shaped_block,
    sum_and_log,
    times,
)

# In the gradient of a KL that is +inf, a reference log-probability of -inf is taken as this many nats, just under
# log(smallest float32): the gradient still moves mass off the forbidden token, and is finite.
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
    t, ref_t = flat_temperature(row_temperature, temperature), flat_temperature(ref_row_temperature, ref_temperature)
    pair = _Pair(logits, ref_logits, t, ref_t).columns(vocab_size)
    rows, dtype = logits.shape[:-1], accumulate_dtype(logits.dtype)
    kl = torch.zeros(rows, dtype=dtype, device=logits.device)
    parts = torch.zeros((*rows, 6), dtype=dtype, device=logits.device)
    if pair.logits.numel() == 0:
        return kl, parts
    buffers = Buffers()
    for at, policy, ref in pair.blocks(logit_scale, softcap, buffers):
        row_max, log_sum, logp, p = _normalised(policy, buffers, "p")
        ref_max, ref_log_sum, logq, q = _normalised(ref, buffers, "q")
        value, sum_p, sum_q = _divergence(_Both(p, q, logp, logq), kind, beta)
        kl.view(-1)[at] = value
        parts.view(-1, 6)[at] = torch.stack([row_max, log_sum, ref_max, ref_log_sum, sum_p, sum_q], -1)
    return zero_where_masked(kl, mask), zero_where_masked(parts, None if mask is None else mask.unsqueeze(-1))


class _Pair(NamedTuple):
    """Two logits tensors of one shape, and the temperatures of their rows."""

    logits: Tensor  # (..., V)
    ref_logits: Tensor  # (..., V)
    temperature: float | Tensor  # (N,) where given per row
    ref_temperature: float | Tensor

    def columns(self, vocab_size: int) -> _Pair:
        """The first vocab_size columns; all if that is negative."""
        if vocab_size < 0:
            return self
        return self._replace(logits=self.logits[..., :vocab_size], ref_logits=self.ref_logits[..., :vocab_size])

    def blocks(
        self, logit_scale: float, softcap: float, buffers: Buffers
    ) -> Iterator[tuple[slice, ShapedLogits, ShapedLogits]]:
        def of(rows: slice, block: Tensor, temperature: float | Tensor, name: str) -> ShapedLogits:
            t = temperature[rows] if isinstance(temperature, Tensor) else temperature
            return shaped_block(block, t, logit_scale, softcap, buffers, name)

        for (rows, block), (_, ref_block) in zip(row_blocks(self.logits), row_blocks(self.ref_logits), strict=True):
            yield rows, of(rows, block, self.temperature, "x"), of(rows, ref_block, self.ref_temperature, "y")


class _Both(NamedTuple):
    """Probabilities and log-probabilities (n, V) of both distributions; functions may overwrite them."""

    p: Tensor
    q: Tensor
    logp: Tensor
    logq: Tensor


def _normalised(shaped: ShapedLogits, buffers: Buffers, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row max of u, log-sum, log-probabilities and probabilities of a block."""
    row_max = shaped.u.amax(-1)
    logp = below_max(shaped, row_max, buffers.like(shaped.u, f"log {name}"))
    p = torch.exp(logp, out=buffers.like(logp, name))
    total, log_sum = sum_and_log(p, row_max)
    return row_max, log_sum, logp.sub_(log_sum.unsqueeze(-1)), p.div_(total.unsqueeze(-1))


def _divergence(both: _Both, kind: int, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """The divergence (n,), and the sums of p s_p and q s_q with the slopes of `kl_slopes`."""
    p, q, logp, logq = both
    zero = torch.zeros_like(p[:, 0])
    if kind == codes.REVERSE:
        value, floored = _relative_entropy(p, logp, logq)
        return value, floored, zero
    if kind == codes.FORWARD:
        value, floored = _relative_entropy(q, logq, logp)
        return value, zero, floored
    if kind == codes.JSD:
        _log_mixture_subtracted(both, beta)
        sum_p = (1 - beta) * logp.mul_(p).sum(-1)
        sum_q = beta * logq.mul_(q).sum(-1)
        return sum_p + sum_q, sum_p, sum_q
    difference = torch.sub(p, q, out=logp)
    value = 0.5 * torch.abs(difference, out=logq).sum(-1)
    sign = difference.sign_()
    spoilt = 0.0 * value  # sign(NaN) is 0; NaN must stay NaN
    return value, 0.5 * p.mul_(sign).sum(-1) + spoilt, -0.5 * q.mul_(sign).sum(-1) + spoilt


def _relative_entropy(a: Tensor, log_a: Tensor, log_b: Tensor) -> tuple[Tensor, Tensor]:
    """sum a (log a - log b), +inf where b forbids what a allows; and the same sum with LOG_FLOOR as that log b."""
    infinite = _floor(log_b, a)
    floored = log_a.clamp_(min=LOWEST).sub_(log_b).mul_(a).sum(-1)
    return floored if infinite is None else torch.where(infinite, torch.inf, floored), floored


def _floor(log_b: Tensor, a: Tensor | None = None) -> Tensor | None:
    """Replaces -inf in log_b by LOG_FLOOR, in place; returns the rows where a > 0 had one, or None if there are
    none."""
    if log_b.device.type == "cpu" and not bool((log_b.amin(-1) == -torch.inf).any()):
        return None
    forbidden = log_b == -torch.inf
    log_b.masked_fill_(forbidden, LOG_FLOOR)
    return None if a is None else (forbidden & (a > 0)).any(-1)


def _log_mixture_subtracted(both: _Both, beta: float) -> None:
    """Both log-probabilities minus log m, m = (1 - beta) p + beta q, in place; finite where p, q or m are 0."""
    logm = torch.lerp(both.p, both.q, beta).log_().clamp_(min=LOWEST)
    both.logp.clamp_(min=LOWEST).sub_(logm)
    both.logq.clamp_(min=LOWEST).sub_(logm)


def kl_terms(logp: Tensor, logq: Tensor, kind: int, beta: float) -> Tensor:
    """The term of each vocabulary entry in the divergence."""
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
    """log a - log b, for a sum weighted by a: 0 instead of (-inf) - (-inf), where the weight is 0."""
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
    results = [
        torch.empty_like(x, memory_format=torch.contiguous_format) if needed else None
        for x, needed in ((logits, needs_grad), (ref_logits, needs_ref_grad))
    ]
    t, ref_t = flat_temperature(row_temperature, temperature), flat_temperature(ref_row_temperature, ref_temperature)
    pair = _Pair(logits, ref_logits, t, ref_t).columns(vocab_size)
    columns = pair.logits.shape[-1]
    flat_parts, rows_grad = parts.reshape(-1, 6), grad_kl.to(parts.dtype).reshape(-1, 1)
    outputs = [None if x is None else x.view(flat_parts.shape[0], x.shape[-1]) for x in results]
    for output in outputs:
        if output is not None:
            output[:, columns:] = 0
    buffers = Buffers()
    if pair.logits.numel() > 0:
        for at, policy, ref in pair.blocks(logit_scale, softcap, buffers):
            saved, keep = flat_parts[at], None if mask is None else mask.reshape(-1, 1)[at]
            p, logp = _normalised_again(policy, saved[:, :2], buffers, "p")
            q, logq = _normalised_again(ref, saved[:, 2:4], buffers, "q")
            gradients = _kl_gradients(_Both(p, q, logp, logq), saved[:, 4:], kind, beta)
            for output, gradient, shaped, column in zip(outputs, gradients, (policy, ref), (0, 2), strict=True):
                if output is None or gradient is None:
                    continue
                alive = saved[:, column : column + 1] != -torch.inf
                gradient.mul_(rows_grad[at] * shaped.slope)
                output[at, :columns] = gradient.masked_fill_(~(alive if keep is None else alive & keep), 0)
    return tuple(logits.new_empty(0) if x is None else x for x in results)  # type: ignore[return-value]


def _normalised_again(shaped: ShapedLogits, saved: Tensor, buffers: Buffers, name: str) -> tuple[Tensor, Tensor]:
    """Probabilities and log-probabilities of a block, from the row max and log-sum (n, 2) that the forward saved."""
    logp = below_max(shaped, saved[:, 0], buffers.like(shaped.u, f"log {name}")).sub_(saved[:, 1:])
    return torch.exp(logp, out=buffers.like(logp, name)), logp


def _kl_gradients(both: _Both, sums: Tensor, kind: int, beta: float) -> tuple[Tensor, Tensor]:
    """The gradients in z and y, with the sums (n, 2) of p s_p and q s_q that the forward saved."""
    p, q, logp, logq = both
    sum_p, sum_q = sums[:, :1], sums[:, 1:]
    if kind == codes.REVERSE:
        _floor(logq)
        wrt_z = logp.clamp_(min=LOWEST).sub_(logq).sub_(sum_p).mul_(p)
        return wrt_z, q.sub_(p)
    if kind == codes.FORWARD:
        _floor(logp)
        wrt_y = logq.clamp_(min=LOWEST).sub_(logp).sub_(sum_q).mul_(q)
        return p.sub_(q), wrt_y
    if kind == codes.JSD:
        _log_mixture_subtracted(both, beta)
        return logp.mul_(1 - beta).sub_(sum_p).mul_(p), logq.mul_(beta).sub_(sum_q).mul_(q)
    half_sign = torch.sub(p, q, out=logp).sign_().mul_(0.5)
    wrt_y = torch.add(half_sign, sum_q, out=logq).mul_(q).neg_()
    return half_sign.sub_(sum_p).mul_(p), wrt_y


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


def approx_kl(
    logprobs: Tensor,  # (B, T)
    ref_logprobs: Tensor,  # (B, T)
    importance_ratio: Tensor | None,  # (B, T)
    mask: Tensor | None,  # (B, T)
    estimator: int,
    gradient: int,
    clamp: float | None,
) -> Tensor:
    value = _estimate(logprobs, ref_logprobs, estimator, clamp)
    return _weighted(value, importance_ratio, mask)


def approx_kl_and_slope(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    importance_ratio: Tensor | None,
    mask: Tensor | None,
    estimator: int,
    gradient: int,
    clamp: float | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """approx_kl; the estimate before weighting; and its derivative in logprobs, None if that is 1.

    exp is taken once for both; each is in memory of its own.
    """
    slope: Tensor | None
    if estimator == codes.K3 and gradient != codes.STRAIGHT_THROUGH:
        dtype = accumulate_dtype(logprobs.dtype)
        minus_d = ref_logprobs.to(dtype) - logprobs.to(dtype)
        excess = minus_d.expm1()
        value, slope = _clamped(torch.sub(excess, minus_d, out=minus_d), clamp), excess.neg_()
    else:
        value = _estimate(logprobs, ref_logprobs, estimator, clamp)
        slope = _slope(logprobs, ref_logprobs, estimator, gradient)
    return _weighted(value, importance_ratio, mask), value, slope


def approx_kl_backward(
    grad_kl: Tensor,  # (B, T)
    logprobs: Tensor,  # (B, T)
    ref_logprobs: Tensor,  # (B, T)
    importance_ratio: Tensor | None,  # (B, T)
    mask: Tensor | None,  # (B, T)
    estimator: int,
    gradient: int,
    clamp: float | None,
) -> tuple[Tensor, Tensor]:
    """Gradients in logprobs (that in ref_logprobs is its negative) and in the importance ratio."""
    slope = _slope(logprobs, ref_logprobs, estimator, gradient)
    value = None if importance_ratio is None else _estimate(logprobs, ref_logprobs, estimator, clamp)
    return approx_kl_gradients(grad_kl, value, slope, importance_ratio, mask)


def approx_kl_gradients(
    grad_kl: Tensor,  # (B, T)
    value: Tensor | None,  # (B, T)
    slope: Tensor | None,  # (B, T)
    importance_ratio: Tensor | None,  # (B, T)
    mask: Tensor | None,  # (B, T)
) -> tuple[Tensor, Tensor]:
    """approx_kl_backward from what `approx_kl_and_slope` returns; value None: without the ratio's gradient."""
    grad = grad_kl.clone() if slope is None else slope * grad_kl
    grad_ratio = grad.new_empty(0) if value is None else zero_masked_(value * grad_kl, mask).contiguous()
    if importance_ratio is not None:
        grad.mul_(importance_ratio)
    return zero_masked_(grad, mask).contiguous(), grad_ratio


def _estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: int, clamp: float | None) -> Tensor:
    """A KL estimator, in new memory."""
    dtype = accumulate_dtype(logprobs.dtype)
    logprobs, ref_logprobs = logprobs.to(dtype), ref_logprobs.to(dtype)
    if estimator == codes.K3:
        minus_d = ref_logprobs - logprobs
        return _clamped(minus_d.expm1().sub_(minus_d), clamp)
    d = logprobs - ref_logprobs
    if estimator == codes.K2:
        d = (0.5 * d).mul_(d)
    return _clamped(d.abs_() if estimator == codes.ABS else d, clamp)


def _slope(logprobs: Tensor, ref_logprobs: Tensor, estimator: int, gradient: int) -> Tensor | None:
    """The derivative in logprobs, in new memory; None for 1."""
    straight_through = gradient == codes.STRAIGHT_THROUGH
    if estimator == codes.K1 and not straight_through:
        return None
    dtype = accumulate_dtype(logprobs.dtype)
    d = logprobs.to(dtype) - ref_logprobs.to(dtype)
    if straight_through or estimator == codes.K2:
        return d
    if estimator == codes.K3:
        return d.neg_().expm1_().neg_()
    return torch.where(d == d, d.sign(), d)  # sign(NaN) would be 0, and NaN must stay NaN


def _clamped(value: Tensor, clamp: float | None) -> Tensor:
    return value if clamp is None else value.clamp_(-clamp, clamp)


def _weighted(value: Tensor, importance_ratio: Tensor | None, mask: Tensor | None) -> Tensor:
    """value * importance_ratio, 0 at masked tokens; overwrites value if there is no ratio."""
    weighted = value if importance_ratio is None else value * importance_ratio
    return zero_masked_(weighted, mask).contiguous()
