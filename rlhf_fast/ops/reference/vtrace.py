# SPDX-License-Identifier: Apache-2.0
"""vtrace. The mathematics is in `rlhf_fast/ops/vtrace.py`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_fast.ops import codes
from rlhf_fast.ops.reference.common import accumulate_dtype
from rlhf_fast.ops.reference.gae import following_values, in_rows, zeroed


def vtrace(
    rewards: Tensor,  # (B, T) or (total,)
    values: Tensor,
    log_ratios: Tensor,
    mask: Tensor | None,
    dones: Tensor | None,
    truncated: Tensor | None,
    bootstrap_values: Tensor | None,
    cu_seqlens: Tensor | None,  # (S + 1,)
    gamma: float,
    lam: float,
    rho_clip: float,
    c_clip: float,
    carry: bool,
) -> tuple[Tensor, Tensor]:
    options = gamma, lam, rho_clip, c_clip, carry
    tokens = (rewards, values, log_ratios, mask, dones, truncated, bootstrap_values)
    if cu_seqlens is None:
        return _of_rows(*tokens, *options)
    packed = in_rows(cu_seqlens, *tokens)
    if packed is None:
        empty = torch.zeros(rewards.shape, dtype=accumulate_dtype(rewards.dtype), device=rewards.device)
        return empty, empty.clone()
    inside, (rewards, values, log_ratios, mask, dones, truncated, bootstrap_values) = packed
    real = inside if mask is None else inside & mask
    tokens = rewards, values, log_ratios, real, dones, truncated, bootstrap_values
    advantages, returns = _of_rows(*tokens, *options)
    return advantages[inside], returns[inside]


def _of_rows(
    rewards: Tensor,  # (B, T)
    values: Tensor,
    log_ratios: Tensor,
    mask: Tensor | None,
    dones: Tensor | None,
    truncated: Tensor | None,
    bootstrap_values: Tensor | None,
    gamma: float,
    lam: float,
    rho_clip: float,
    c_clip: float,
    carry: bool,
) -> tuple[Tensor, Tensor]:
    real = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    masked = None if mask is None else ~mask
    r, v, ratios = zeroed(rewards, masked), zeroed(values, masked), zeroed(log_ratios, masked)
    none = ratios == -math.inf
    ratios.clamp_(codes.LEAST_LOG_RATIO, math.log(rho_clip)).exp_().masked_fill_(none, 0)
    flags = dones, truncated, bootstrap_values, carry
    ends, following = following_values(v, real, *flags)
    errors = ((r - v).add_(following, alpha=gamma)).mul_(ratios)
    factors = ratios.clamp(max=c_clip).mul_(gamma * lam)
    if masked is not None and carry:
        errors.masked_fill_(masked, 0)
        factors.masked_fill_(masked, 1)
    returns = _sums(errors, factors, ends).add_(v)
    _, following = following_values(returns, real, *flags)
    advantages = (r - v).add_(following, alpha=gamma).mul_(ratios)
    if masked is None:
        return advantages, returns
    return advantages.masked_fill_(masked, 0), returns.masked_fill_(masked, 0)


def _sums(errors: Tensor, factors: Tensor, ends: Tensor | None) -> Tensor:
    """(B, T): a_t = error_t + factor_t a_(t + 1), where an episode ends without the second term."""
    a, columns = errors.t().contiguous(), factors.t().contiguous()
    over = None if ends is None else ends.t().contiguous()
    running = a.new_zeros(a.shape[1])
    for t in range(a.shape[0] - 1, -1, -1):
        if over is not None:
            running = running.masked_fill(over[t], 0)
        running = a[t].addcmul_(columns[t], running)
    return a.t().contiguous()
