# SPDX-License-Identifier: Apache-2.0
"""gae, ppo_advantages and whitening. The mathematics is in `rlhf_fast/ops/gae.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.ops import codes
from rlhf_fast.ops.reference.blocks import TOKEN_ENTRIES, row_blocks
from rlhf_fast.ops.reference.common import accumulate_dtype, wide_dtype, zero_masked_
from rlhf_fast.ops.reference.kl import approx_kl

FACTOR_TOKENS = 128  # columns of (B, T) whose factors are in memory at a time


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
    if cu_seqlens is not None:
        return _gae_packed(
            rewards, values, mask, dones, truncated, bootstrap_values, cu_seqlens, row_lam, row_value_lam,
            gamma, lam, value_lam, carry,
        )  # fmt: skip
    real = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    masked = None if mask is None else ~mask
    v = zeroed(values, masked)
    ends, following = following_values(v, real, dones, truncated, bootstrap_values, carry)
    deltas = zeroed(rewards, masked).add_(following, alpha=gamma).sub_(v)
    del following
    columns = deltas.t().contiguous()
    del deltas  # at the peak there are three tensors of this size
    decay = gamma * (lam if row_lam is None else row_lam.to(v.dtype))
    if row_value_lam is row_lam and value_lam == lam:
        advantages = _discounted(columns, masked, carry, ends, decay)
        return advantages, v.add_(advantages)
    advantages = _discounted(columns.clone(), masked, carry, ends, decay)
    value_decay = gamma * (value_lam if row_value_lam is None else row_value_lam.to(v.dtype))
    return advantages, v.add_(_discounted(columns, masked, carry, ends, value_decay))


def zeroed(x: Tensor, masked: Tensor | None) -> Tensor:
    """A dense copy in the dtype of the arithmetic, 0 where masked (masked_fill_ needs no temporary)."""
    wide = x.to(accumulate_dtype(x.dtype), copy=True).contiguous()
    return wide if masked is None else wide.masked_fill_(masked, 0)


def following_values(
    v: Tensor,  # (B, T), 0 at masked tokens
    real: Tensor,
    dones: Tensor | None,
    truncated: Tensor | None,
    bootstrap_values: Tensor | None,
    carry: bool,
) -> tuple[Tensor | None, Tensor]:
    """Where an episode ends (None: nowhere), and the next value of each token."""
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
    """Writes the value of the next real token to `out`, 0 if there is none.

    The values of the real tokens are packed; the index of the next one is the number of real tokens so far.
    """
    width = v.shape[1]
    blocks = (row_blocks(x, 0, TOKEN_ENTRIES // 4) for x in (v, real))
    for (at, values), (_, is_real) in zip(*blocks, strict=True):
        so_far = is_real.cumsum(1)
        side_by_side = v.new_zeros(values.shape[0], width + 1)
        side_by_side.scatter_(1, torch.where(is_real, so_far - 1, width), values)
        torch.gather(side_by_side, 1, so_far, out=out[at])


def _discounted(
    a: Tensor,  # (T, B), the deltas; written over, from the last token on
    masked: Tensor | None,  # (B, T)
    carry: bool,
    ends: Tensor | None,  # (B, T)
    decay: float | Tensor,  # (B,) where given per row
) -> Tensor:  # (B, T)
    """a_t = delta_t + decay a_(t + 1); masked tokens give 0, and with carry pass a on; a is 0 after an episode ends.

    One fused operator a token, on contiguous columns.
    """
    skipped = masked if carry else None
    if skipped is not None:
        a.masked_fill_(skipped.t(), 0)
    over = None if ends is None else ends.t().contiguous()
    running = a.new_zeros(a.shape[1])
    for stop in range(a.shape[0], 0, -FACTOR_TOKENS):
        start = max(0, stop - FACTOR_TOKENS)
        factors = None if skipped is None else _factors(skipped[:, start:stop], decay, a)
        for t in range(stop - 1, start - 1, -1):
            if over is not None:
                running = running.masked_fill(over[t], 0)
            now, factor = a[t], decay if factors is None else factors[t - start]
            running = now.addcmul_(factor, running) if isinstance(factor, Tensor) else now.add_(running, alpha=factor)
    advantages = a.t().contiguous()
    return advantages if masked is None else advantages.masked_fill_(masked, 0)


def _factors(skipped: Tensor, decay: float | Tensor, like: Tensor) -> Tensor:
    """(tokens, B): the decay at each token, 1 at skipped ones."""
    decays = decay if isinstance(decay, Tensor) else torch.full((), decay, dtype=like.dtype, device=like.device)
    return torch.where(skipped.t(), 1.0, decays)


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
    packed = in_rows(cu_seqlens, rewards, values, mask, dones, truncated, bootstrap_values)
    if packed is None:
        empty = torch.zeros(rewards.shape, dtype=accumulate_dtype(rewards.dtype), device=rewards.device)
        return empty, empty.clone()
    inside, (rewards, values, mask, dones, truncated, bootstrap_values) = packed
    real = inside if mask is None else inside & mask
    of_rows = gae(rewards, values, real, dones, truncated, bootstrap_values, None, *options)
    advantages, returns = (x[inside] for x in of_rows)
    return advantages, returns


def in_rows(cu_seqlens: Tensor, *tensors: Tensor | None) -> tuple[Tensor, list[Any]] | None:
    """Packed sequences as the rows of (S, longest): which slots are theirs, and the tensors; None without a token."""
    starts, lengths = cu_seqlens[:-1], cu_seqlens.diff()
    longest = int(lengths.max()) if lengths.numel() > 0 else 0
    if longest == 0:
        return None
    steps = torch.arange(longest, device=cu_seqlens.device)
    inside = steps < lengths.unsqueeze(-1)
    index = torch.where(inside, starts.unsqueeze(-1) + steps, 0)
    return inside, [None if x is None else x[index] for x in tensors]


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
    """Count, sum and sum of squares of the real entries, in float64 if the device has it; summed over ranks."""
    dtype = wide_dtype(values.device)
    moments = torch.zeros(3, dtype=dtype, device=values.device)
    for x, real in _token_blocks(values, mask):
        x = zero_masked_(x.to(dtype, copy=True), real)
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
        out.copy_(zero_masked_(y if shift_mean else y.add_(mean), real))
    return whitened


def _token_blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Blocks of the tensors, all of one shape: views of the same entries of each."""
    if tensors[0].numel() > 0:
        for blocks in zip(*(row_blocks(torch.atleast_1d(x), 0, TOKEN_ENTRIES) for x in tensors), strict=True):
            yield tuple(block for _, block in blocks)
