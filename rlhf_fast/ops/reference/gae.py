# SPDX-License-Identifier: Apache-2.0
"""gae, ppo_advantages and whitening. The mathematics is in `rlhf_fast/ops/gae.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fast.ops import codes
from rlhf_fast.ops.reference.common import accumulate_dtype, wide_dtype
from rlhf_fast.ops.reference.kl import approx_kl


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
    ends, following = _following(v, real, dones, truncated, bootstrap_values, carry)
    deltas = r.add_(following, alpha=gamma).sub_(v)
    skipped = ~real if carry else None
    advantages = _discounted(deltas, real, skipped, ends, gamma * (lam if row_lam is None else row_lam.to(dtype)))
    if row_value_lam is row_lam and value_lam == lam:
        return advantages, v.add_(advantages)
    value_decay = gamma * (value_lam if row_value_lam is None else row_value_lam.to(dtype))
    return advantages, v.add_(_discounted(deltas, real, skipped, ends, value_decay))


def _following(
    v: Tensor,  # (B, T), 0 at masked tokens
    real: Tensor,
    dones: Tensor | None,
    truncated: Tensor | None,
    bootstrap_values: Tensor | None,
    carry: bool,
) -> tuple[Tensor | None, Tensor]:
    """Where an episode ends (None: nowhere), and the value that follows each token."""
    width = v.shape[1]
    if carry:  # of the next real token: the values of the real ones side by side, then as many on as are real so far
        so_far = real.cumsum(1)
        side_by_side = v.new_zeros(v.shape[0], width + 1).scatter_(1, torch.where(real, so_far - 1, width), v)
        following = side_by_side.gather(1, so_far)
    else:
        following = torch.zeros_like(v)
        following[:, :-1] = v[:, 1:]
    if dones is None and truncated is None:
        return None, following
    done = torch.zeros_like(real) if dones is None else dones & real
    is_truncated = torch.zeros_like(real) if truncated is None else truncated & real & ~done
    ends = done | is_truncated
    following.masked_fill_(ends, 0)
    if bootstrap_values is not None:
        following = torch.where(is_truncated, bootstrap_values.to(v.dtype), following)
    return ends, following


def _discounted(
    deltas: Tensor,  # (B, T)
    real: Tensor,
    skipped: Tensor | None,
    ends: Tensor | None,
    decay: float | Tensor,  # (B,) where given per row
) -> Tensor:
    """a_t = delta_t + decay a_(t + 1); skipped tokens hand a on, episodes that end start anew, masked tokens give 0.

    One fused operator a token, on contiguous columns.
    """
    a = deltas.t().clone(memory_format=torch.contiguous_format)  # (T, B); written over, from the last token on
    if skipped is None:
        factors: Any = [decay] * a.shape[0]
    else:
        a.masked_fill_(skipped.t(), 0)
        columns = decay if isinstance(decay, Tensor) else torch.full((), decay, dtype=a.dtype, device=a.device)
        factors = torch.where(skipped.t(), 1.0, columns.expand(a.shape)).unbind(0)
    over = None if ends is None else ends.t().contiguous().unbind(0)
    running = a.new_zeros(a.shape[1])
    for t in range(a.shape[0] - 1, -1, -1):
        if over is not None:
            running = running.masked_fill(over[t], 0)
        now = a[t]
        if isinstance(factors[t], Tensor):
            now.addcmul_(factors[t], running)
        else:
            now.add_(running, alpha=factors[t])
        running = now
    return a.t().masked_fill(~real, 0).contiguous()


def _gae_packed(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    dones: Tensor | None,
    truncated: Tensor | None,
    bootstrap_values: Tensor | None,
    cu_seqlens: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """Packed sequences as rows, masked beyond the end of each."""
    starts, lengths = cu_seqlens[:-1], cu_seqlens.diff()
    longest = int(lengths.max()) if lengths.numel() > 0 else 0
    if longest == 0:
        empty = torch.zeros(rewards.shape, dtype=accumulate_dtype(rewards.dtype), device=rewards.device)
        return empty, empty.clone()
    steps = torch.arange(longest, device=rewards.device)
    inside = steps < lengths.unsqueeze(-1)  # (S, longest)
    index = torch.where(inside, starts.unsqueeze(-1) + steps, 0)

    def padded(x: Any) -> Any:
        return None if x is None else x[index]

    flags = padded(dones), padded(truncated), padded(bootstrap_values)
    real = inside if mask is None else inside & padded(mask)
    of_rows = gae(padded(rewards), padded(values), real, *flags, None, *options)
    advantages, returns = (x[inside] for x in of_rows)
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
    """Count, sum and sum of squares of the real entries, in float64 where there is one: what ranks add up."""
    x = torch.where(mask, values.to(wide_dtype(values.device)), 0.0)
    return torch.stack([mask.sum().to(x.dtype), x.sum(), x.square().sum()])


def whiten(values: Tensor, mask: Tensor, moments: Tensor, shift_mean: bool) -> Tensor:
    dtype = accumulate_dtype(values.dtype)
    count, total, squares = moments.unbind()
    mean = total / count.clamp(min=1)
    variance = ((squares - count * mean * mean) / (count - 1).clamp(min=1)).clamp(min=0)
    whitened = (values.to(moments.dtype) - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, 0.0).to(dtype).contiguous()
