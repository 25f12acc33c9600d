# SPDX-License-Identifier: Apache-2.0
"""The definition of correctness: every op in plain PyTorch, no tricks.

Each function here is the kernel of the op of the same name in the torch backend, and the fallback of the
native one. The arguments are those of the op's schema (see the family's file), so shapes and ranges were
checked before; mathematics and sources stand in the docstrings of the public functions.

Arithmetic is float32, or float64 where the inputs are. Masked rows never reach a result: they are replaced,
not multiplied, so a NaN in a masked slot stays there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.ops import codes

# In the gradient of a KL that is +inf, a reference log-probability of -inf counts as this many nats:
# just under log(smallest float32), so the gradient still pushes mass off the forbidden token, finitely.
LOG_FLOOR = -104.0


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; everything else is computed and returned in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _zero_where_masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


# --------------------------------------------------------------------------------------------------------
# logprob


def _transform(
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


def _softmax_parts(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row max, log of the sum of exp(z - max), and log-probabilities; kept apart, a common offset costs nothing.

    A row of all -inf has max -inf, log-sum 0 and log-probabilities -inf.
    """
    row_max = z.amax(-1)
    dead = row_max == -torch.inf
    shifted = z - torch.where(dead, 0.0, row_max).unsqueeze(-1)
    log_sum = torch.where(dead, 0.0, shifted.exp().sum(-1).log())
    return row_max, log_sum, shifted - log_sum.unsqueeze(-1)


def _from_parts(z: Tensor, row_max: Tensor, log_sum: Tensor) -> Tensor:
    """Log-probabilities again, from saved row statistics."""
    safe_max = torch.where(row_max == -torch.inf, 0.0, row_max)
    return (z - safe_max.unsqueeze(-1)) - log_sum.unsqueeze(-1)


def _times(weight: Tensor, log_value: Tensor) -> Tensor:
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
    z, _ = _transform(logits, row_temperature, temperature, logit_scale, softcap, vocab_size)
    rows = z.shape[:-1]
    if z.shape[-1] == 0 or z.numel() == 0:
        return _empty_stats(z, targets, outputs)
    row_max, log_sum, logp = _softmax_parts(z)
    probs = logp.exp()

    logprobs, entropy, logsumexp, sum_sq_probs = (z.new_empty(0) for _ in range(4))
    argmax = torch.empty(0, dtype=torch.int64, device=z.device)
    if outputs & codes.LOGPROBS:
        assert targets is not None
        index, valid = _valid_targets(_with_k(targets, rows), z.shape[-1], mask)
        logprobs = torch.where(valid, logp.gather(-1, index), torch.nan)
        logprobs = _zero_where_masked(logprobs, None if mask is None else mask.unsqueeze(-1))
        logprobs = logprobs.view(targets.shape)
    if outputs & codes.ENTROPY:
        entropy = _zero_where_masked(-_times(probs, logp).sum(-1), mask)
    if outputs & codes.LOGSUMEXP:
        logsumexp = _zero_where_masked(row_max + log_sum, mask)
    if outputs & codes.SUM_SQ_PROBS:
        sum_sq_probs = _zero_where_masked(probs.square().sum(-1), mask)
    if outputs & codes.ARGMAX:
        argmax = _zero_where_masked(z.argmax(-1), mask)
    parts = _zero_where_masked(torch.stack([row_max, log_sum], -1), None if mask is None else mask.unsqueeze(-1))
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
    z, slope = _transform(logits, row_temperature, temperature, logit_scale, softcap, vocab_size)
    if z.numel() == 0:
        return torch.zeros_like(logits, memory_format=torch.contiguous_format)
    row_max = parts[..., 0]
    logp = _from_parts(z, row_max, parts[..., 1])
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
        grad -= grad_entropy.unsqueeze(-1) * _times(probs, logp + entropy.unsqueeze(-1))
    alive = row_max != -torch.inf
    grad = _zero_where_masked(grad * slope, (alive if mask is None else alive & mask).unsqueeze(-1))
    result = torch.zeros_like(logits, memory_format=torch.contiguous_format)
    result[..., : z.shape[-1]] = grad.to(logits.dtype)
    return result


# --------------------------------------------------------------------------------------------------------
# kl


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
    z, _ = _transform(logits, row_temperature, temperature, logit_scale, softcap, vocab_size)
    y, _ = _transform(ref_logits, ref_row_temperature, ref_temperature, logit_scale, softcap, vocab_size)
    if z.numel() == 0:
        return z.new_zeros(z.shape[:-1]), z.new_zeros((*z.shape[:-1], 6))
    row_max, log_sum, logp = _softmax_parts(z)
    ref_max, ref_log_sum, logq = _softmax_parts(y)
    p, q = logp.exp(), logq.exp()
    if kind == codes.REVERSE:
        kl = _times(p, _log_ratio(logp, logq)).sum(-1)
    elif kind == codes.FORWARD:
        kl = _times(q, _log_ratio(logq, logp)).sum(-1)
    elif kind == codes.JSD:
        logm = ((1 - beta) * p + beta * q).log()
        kl = (beta * _times(q, logq - logm) + (1 - beta) * _times(p, logp - logm)).sum(-1)
    else:
        kl = 0.5 * (p - q).abs().sum(-1)
    slope_p, slope_q = _kl_slopes(logp, logq, kind, beta)
    parts = torch.stack(
        [row_max, log_sum, ref_max, ref_log_sum, _times(p, slope_p).sum(-1), _times(q, slope_q).sum(-1)], -1
    )
    return _zero_where_masked(kl, mask), _zero_where_masked(parts, None if mask is None else mask.unsqueeze(-1))


def _log_ratio(log_a: Tensor, log_b: Tensor) -> Tensor:
    """log a - log b, where a > 0 decides: (-inf) - (-inf) never matters, as it is weighed by a = 0."""
    return torch.where(log_a == -torch.inf, 0.0, log_a - log_b)


def _kl_slopes(logp: Tensor, logq: Tensor, kind: int, beta: float) -> tuple[Tensor, Tensor]:
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
    return 0.5 * torch.sign(p - q), 0.5 * torch.sign(q - p)


def _floored(logp: Tensor) -> Tensor:
    return torch.where(logp == -torch.inf, LOG_FLOOR, logp)


def token_kl_backward(
    grad_kl: Tensor,  # (...)
    logits: Tensor,  # (..., V)
    ref_logits: Tensor,  # (..., V)
    mask: Tensor | None,  # (...)
    row_temperature: Tensor | None,  # (...)
    ref_row_temperature: Tensor | None,  # (...)
    parts: Tensor,  # (..., 6): max, log-sum, ref max, ref log-sum, sum p s_p, sum q s_q
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
    z, dz = _transform(logits, row_temperature, temperature, logit_scale, softcap, vocab_size)
    y, dy = _transform(ref_logits, ref_row_temperature, ref_temperature, logit_scale, softcap, vocab_size)
    if z.numel() == 0:
        logp, logq = z, y
    else:
        logp = _from_parts(z, parts[..., 0], parts[..., 1])
        logq = _from_parts(y, parts[..., 2], parts[..., 3])
    p, q = logp.exp(), logq.exp()
    slope_p, slope_q = _kl_slopes(logp, logq, kind, beta)
    wrt_z = p - q if kind == codes.FORWARD else p * (slope_p - parts[..., 4:5])
    wrt_y = q - p if kind == codes.REVERSE else q * (slope_q - parts[..., 5:6])

    def finish(grad: Tensor, slope: Tensor, row_max: Tensor, like: Tensor) -> Tensor:
        keep = row_max != -torch.inf if mask is None else (row_max != -torch.inf) & mask
        result = torch.zeros_like(like, memory_format=torch.contiguous_format)
        scaled = _zero_where_masked(grad_kl.unsqueeze(-1) * grad * slope, keep.unsqueeze(-1))
        result[..., : grad.shape[-1]] = scaled.to(like.dtype)
        return result

    return (
        finish(wrt_z, dz, parts[..., 0], logits) if needs_grad else logits.new_empty(0),
        finish(wrt_y, dy, parts[..., 2], ref_logits) if needs_ref_grad else logits.new_empty(0),
    )


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
    return _zero_where_masked(value, mask).contiguous()


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
        grad_ratio = _zero_where_masked(grad_kl * value.clamp(-clamp, clamp), mask).contiguous()
    return _zero_where_masked(grad_kl * slope, mask).contiguous(), grad_ratio


# --------------------------------------------------------------------------------------------------------
# gae


def gae(
    rewards: Tensor,  # (B, T) or (total,)
    values: Tensor,
    mask: Tensor | None,
    dones: Tensor | None,
    truncated: Tensor | None,
    bootstrap_values: Tensor | None,
    cu_seqlens: Tensor | None,  # (S + 1,)
    row_lam: Tensor | None,  # (B,) or (S,)
    row_value_lam: Tensor | None,  # (B,) or (S,)
    gamma: float,
    lam: float,
    value_lam: float,
    carry: bool,
) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(rewards.dtype)
    if cu_seqlens is not None:
        return _gae_packed(
            rewards, values, mask, dones, truncated, bootstrap_values, cu_seqlens, row_lam, row_value_lam,
            gamma, lam, value_lam, carry,
        )  # fmt: skip
    real = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    r, v = (torch.where(real, x.to(dtype), 0.0) for x in (rewards, values))
    done = torch.zeros_like(real) if dones is None else dones & real
    cut = torch.zeros_like(real) if truncated is None else truncated & real & ~done
    boot = r if bootstrap_values is None else torch.where(cut, bootstrap_values.to(dtype), 0.0)
    lam_rows = lam if row_lam is None else row_lam.to(dtype)
    value_lam_rows = value_lam if row_value_lam is None else row_value_lam.to(dtype)

    advantages, value_advantages = torch.zeros_like(r), torch.zeros_like(r)
    next_value = running = value_running = r.new_zeros(r.shape[0])
    for t in range(r.shape[1] - 1, -1, -1):
        goes_on = ~(done[:, t] | cut[:, t])
        following = torch.where(goes_on, next_value, torch.where(cut[:, t], boot[:, t], 0.0))
        delta = r[:, t] + gamma * following - v[:, t]
        a = delta + gamma * lam_rows * torch.where(goes_on, running, 0.0)
        b = delta + gamma * value_lam_rows * torch.where(goes_on, value_running, 0.0)
        advantages[:, t] = torch.where(real[:, t], a, 0.0)
        value_advantages[:, t] = torch.where(real[:, t], b, 0.0)
        if carry:
            running = torch.where(real[:, t], a, running)
            value_running = torch.where(real[:, t], b, value_running)
            next_value = torch.where(real[:, t], v[:, t], next_value)
        else:
            running, value_running, next_value = a, b, v[:, t]
    return advantages, value_advantages + v


def _gae_packed(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    dones: Tensor | None,
    truncated: Tensor | None,
    bootstrap_values: Tensor | None,
    cu_seqlens: Tensor,
    row_lam: Tensor | None,
    row_value_lam: Tensor | None,
    gamma: float,
    lam: float,
    value_lam: float,
    carry: bool,
) -> tuple[Tensor, Tensor]:
    """Every packed sequence is a batch of one row."""
    dtype = accumulate_dtype(rewards.dtype)
    advantages = torch.zeros(rewards.shape, dtype=dtype, device=rewards.device)
    returns = torch.zeros_like(advantages)
    bounds = cu_seqlens.tolist()
    for s, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):

        def of_row(x: Tensor | None, s: int = s) -> Tensor | None:
            return None if x is None else x[s : s + 1]

        def of_tokens(x: Tensor | None, start: int = start, end: int = end) -> Tensor | None:
            return None if x is None else x[start:end].unsqueeze(0)

        flags = [of_tokens(x) for x in (mask, dones, truncated, bootstrap_values)]
        a, ret = gae(
            rewards[None, start:end], values[None, start:end], flags[0], flags[1], flags[2], flags[3], None,
            of_row(row_lam), of_row(row_value_lam), gamma, lam, value_lam, carry,
        )  # fmt: skip
        advantages[start:end], returns[start:end] = a[0], ret[0]
    return advantages, returns


def ppo_advantages(
    scores: Tensor,  # (B,)
    logprobs: Tensor,  # (B, T)
    ref_logprobs: Tensor,  # (B, T)
    values: Tensor,  # (B, T)
    mask: Tensor,  # (B, T)
    kl_coef: float,
    estimator: int,
    gamma: float,
    lam: float,
    score_clip: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulate_dtype(logprobs.dtype)
    kl = approx_kl(logprobs, ref_logprobs, None, mask, estimator, codes.VALUE, torch.inf)
    rewards = -kl_coef * kl
    steps = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    if rewards.numel() > 0:
        last = (mask * steps).argmax(-1, keepdim=True)  # (B, 1), 0 where no token is real
        score = torch.where(mask.any(-1), scores.to(dtype).clamp(-score_clip, score_clip), 0.0)
        rewards.scatter_add_(-1, last, score.unsqueeze(-1))
    advantages, returns = gae(
        rewards, values.to(dtype), mask, None, None, None, None, None, None, gamma, lam, lam, True
    )
    return kl, rewards, advantages, returns, whiten_moments(advantages, mask)


def whiten_moments(values: Tensor, mask: Tensor) -> Tensor:
    """Count, sum and sum of squares of the real entries, in float64: what ranks add up."""
    x = torch.where(mask, values.double(), 0.0)
    return torch.stack([mask.sum().double(), x.sum(), x.square().sum()])


def whiten(values: Tensor, mask: Tensor, moments: Tensor, shift_mean: bool) -> Tensor:
    dtype = accumulate_dtype(values.dtype)
    count, total, squares = moments.unbind()
    mean = total / count.clamp(min=1)
    variance = ((squares - count * mean * mean) / (count - 1).clamp(min=1)).clamp(min=0)
    whitened = (values.double() - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, 0.0).to(dtype).contiguous()
