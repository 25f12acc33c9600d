# SPDX-License-Identifier: Apache-2.0
"""gae, ppo_advantages and whitening: the definition. The mathematics is in `rlhf_fast/ops/gae.py`."""

from __future__ import annotations

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
    done = torch.zeros_like(real) if dones is None else dones & real
    is_truncated = torch.zeros_like(real) if truncated is None else truncated & real & ~done
    boot = r if bootstrap_values is None else torch.where(is_truncated, bootstrap_values.to(dtype), 0.0)
    lam_rows = lam if row_lam is None else row_lam.to(dtype)
    value_lam_rows = value_lam if row_value_lam is None else row_value_lam.to(dtype)

    advantages, value_advantages = torch.zeros_like(r), torch.zeros_like(r)
    next_value = running = value_running = r.new_zeros(r.shape[0])
    for t in range(r.shape[1] - 1, -1, -1):
        goes_on = ~(done[:, t] | is_truncated[:, t])
        following = torch.where(goes_on, next_value, torch.where(is_truncated[:, t], boot[:, t], 0.0))
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
