# SPDX-License-Identifier: Apache-2.0
"""gae, ppo_advantages and whitening. The mathematics is in `rlhf_fast/ops/gae.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.ops import codes
from rlhf_fast.ops.reference.blocks import TOKEN_ENTRIES, row_blocks
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
    v = torch.where(real, values.to(dtype), 0.0).contiguous()
    ends, following = _following(v, real, dones, truncated, bootstrap_values, carry)
    deltas = torch.where(real, rewards.to(dtype), 0.0).contiguous().add_(following, alpha=gamma).sub_(v)
    del following
    skipped = ~real if carry and mask is not None else None
    decay = gamma * (lam if row_lam is None else row_lam.to(dtype))
    if row_value_lam is row_lam and value_lam == lam:
        advantages = _discounted(deltas, real, skipped, ends, decay, deltas)
        return advantages, v.add_(advantages)
    advantages = _discounted(deltas, real, skipped, ends, decay, torch.empty_like(deltas))
    value_decay = gamma * (value_lam if row_value_lam is None else row_value_lam.to(dtype))
    return advantages, v.add_(_discounted(deltas, real, skipped, ends, value_decay, deltas))


def _following(
    v: Tensor,  # (B, T), 0 at masked tokens
    real: Tensor,
    dones: Tensor | None,
    truncated: Tensor | None,
    bootstrap_values: Tensor | None,
    carry: bool,
) -> tuple[Tensor | None, Tensor]:
    """Where an episode ends (None: nowhere), and the value that follows each token."""
    following = torch.zeros_like(v)
    if v.numel() == 0:
        return None, following
    if carry:
        _next_real(v, real, following)
    else:
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


def _next_real(v: Tensor, real: Tensor, out: Tensor) -> None:
    """Writes the value of the next real token to `out`, 0 where none follows.

    The values of the real ones stand side by side; the next one is as many places on as tokens are real so far.
    """
    width = v.shape[1]
    blocks = (row_blocks(x, 0, TOKEN_ENTRIES) for x in (v, real))
    for (at, values), (_, is_real) in zip(*blocks, strict=True):
        so_far = is_real.cumsum(1)
        side_by_side = v.new_zeros(values.shape[0], width + 1)
        side_by_side.scatter_(1, torch.where(is_real, so_far - 1, width), values)
        torch.gather(side_by_side, 1, so_far, out=out[at])


def _discounted(
    deltas: Tensor,  # (B, T)
    real: Tensor,
    skipped: Tensor | None,
    ends: Tensor | None,
    decay: float | Tensor,  # (B,) where given per row
    out: Tensor,  # (B, T), may be deltas
) -> Tensor:
    """a_t = delta_t + decay a_(t + 1); skipped tokens hand a on, episodes that end start anew, masked tokens give 0.

    One fused operator a token, on contiguous columns.
    """
    a = deltas.t().clone(memory_format=torch.contiguous_format)  # (T, B); written over, from the last token on
    factors: Tensor | None = None
    if skipped is not None:
        a.masked_fill_(skipped.t(), 0)
        columns = decay if isinstance(decay, Tensor) else torch.full((), decay, dtype=a.dtype, device=a.device)
        factors = torch.where(skipped.t(), 1.0, columns)
    over = None if ends is None else ends.t().contiguous()
    running = a.new_zeros(a.shape[1])
    for t in range(a.shape[0] - 1, -1, -1):
        if over is not None:
            running = running.masked_fill(over[t], 0)
        now, factor = a[t], decay if factors is None else factors[t]
        running = now.addcmul_(factor, running) if isinstance(factor, Tensor) else now.add_(running, alpha=factor)
    return out.copy_(a.t()).masked_fill_(~real, 0)


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
    score_clip: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulate_dtype(logprobs.dtype)
    kl = approx_kl(logprobs, ref_logprobs, None, mask, estimator, codes.VALUE, None)
    rewards = kl * -kl_coef
    if rewards.numel() > 0:
        last = mask.shape[1] - 1 - mask.flip(-1).byte().argmax(-1, keepdim=True)  # (B, 1); none real: any
        score = torch.where(mask.any(-1), scores.to(dtype), 0.0)
        score = score if score_clip is None else score.clamp_(-score_clip, score_clip)
        rewards.scatter_add_(-1, last, score.unsqueeze(-1))
    advantages, returns = gae(
        rewards, values.to(dtype), mask, None, None, None, None, None, None, gamma, lam, lam, True
    )
    return kl, rewards, advantages, returns, whiten_moments(advantages, mask)


def whiten_moments(values: Tensor, mask: Tensor) -> Tensor:
    """Count, sum and sum of squares of the real entries, in float64 where there is one: what ranks add up."""
    dtype = wide_dtype(values.device)
    moments = torch.zeros(3, dtype=dtype, device=values.device)
    for x, real in _token_blocks(values, mask):
        x = torch.where(real, x, 0.0).to(dtype)
        moments += torch.stack([real.sum().to(dtype), x.sum(), x.square().sum()])
    return moments


def whiten(values: Tensor, mask: Tensor, moments: Tensor, shift_mean: bool) -> Tensor:
    count, total, squares = moments.unbind()
    mean = total / count.clamp(min=1)
    variance = ((squares - count * mean * mean) / (count - 1).clamp(min=1)).clamp(min=0)
    scale = torch.rsqrt(variance + 1e-8)
    whitened = torch.empty(values.shape, dtype=accumulate_dtype(values.dtype), device=values.device)
    for x, real, out in _token_blocks(values, mask, whitened):
        y = (x.to(moments.dtype) - mean).mul_(scale)
        out.copy_(torch.where(real, y if shift_mean else y.add_(mean), 0.0))
    return whitened


def _token_blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of the same entries of each tensor, all of one shape."""
    if tensors[0].numel() > 0:
        for blocks in zip(*(row_blocks(torch.atleast_1d(x), 0, TOKEN_ENTRIES) for x in tensors), strict=True):
            yield tuple(block for _, block in blocks)
