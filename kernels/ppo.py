# SPDX-License-Identifier: Apache-2.0
"""ppo_advantages in Triton: KL, rewards, advantages, returns and their sums in one launch; see scan.py for the scan.

The score is the state after a row's end: masked tokens pass it on to the last real one; a row of masked tokens drops
it. A float32 token moves 29 bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels.common import launch, limit_of
from rlhf_fast.kernels.scan import (
    MAPS,
    REST,
    VEC,
    any_after,
    load_tokens,
    next_states,
    plan_for,
    rows_of,
    state_after,
    store_map,
    store_tokens,
    strides_of,
    tile_lanes,
    token_maps,
    tokens_inside,
    with_tile,
)
from rlhf_fast.kernels.whiten import store_moments
from rlhf_fast.ops import codes

K2, K3, ABS = tl.constexpr(codes.K2), tl.constexpr(codes.K3), tl.constexpr(codes.ABS)


@triton.jit
def _exp_past_line(x):
    """e^x - 1 - x, accurate near 0: e^x = 2^n e^f with |f| <= log(2) / 2, and a series for e^f - 1 - f."""
    near = tl.minimum(tl.maximum(x, -87.0), 89.0)
    n = tl.floor(near * 1.4426950408889634 + 0.5)
    f = near - n * 0.693145751953125 - n * 1.428606820309417e-06  # log(2) in two pieces (Cody and Waite)
    series = 1.984126984e-4 + f * (2.480158730e-5 + f * 2.755731922e-6)
    series = 4.166666667e-2 + f * (8.333333333e-3 + f * (1.388888889e-3 + f * series))
    series = f * f * (0.5 + f * (1.666666667e-1 + f * series))
    half_power = ((n.to(tl.int32) + 126) << 23).to(tl.float32, bitcast=True)  # 2^(n-1), as 2^128 would overflow
    return tl.where(n == 0, series, half_power * (2.0 * (1.0 + f + series)) - 1.0 - x)


@triton.jit
def _ppo_tokens(
    inputs, strides,  # of logprobs, ref_logprobs, values, mask
    row, start, lane, inside, kl_coef,
    ESTIMATOR: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The KL estimate, the reward without the score, and the value, 0 where masked; and which tokens are real."""
    real = inside & (load_tokens(inputs[3], strides[3], row, start, lane, inside, ALIGNED) != 0)
    logprob = load_tokens(inputs[0], strides[0], row, start, lane, inside, ALIGNED).to(tl.float32)
    ref_logprob = load_tokens(inputs[1], strides[1], row, start, lane, inside, ALIGNED).to(tl.float32)
    value = load_tokens(inputs[2], strides[2], row, start, lane, inside, ALIGNED).to(tl.float32)
    kl = logprob - ref_logprob
    if ESTIMATOR == K2:
        kl = 0.5 * kl * kl
    elif ESTIMATOR == K3:
        kl = _exp_past_line(-kl)
    elif ESTIMATOR == ABS:
        kl = tl.abs(kl)
    kl = tl.where(real, kl, 0.0)
    return kl, tl.where(real, -kl_coef * kl, 0.0), tl.where(real, value, 0.0), real


@triton.jit(do_not_specialize=[
    "logprobs_stride", "ref_logprobs_stride", "values_stride", "mask_stride",
    "rows", "length", "part_length", "parts",
])  # fmt: skip
def ppo_rows(
    scores_ptr,  # (rows,)
    logprobs_ptr, ref_logprobs_ptr, values_ptr, mask_ptr,  # (rows, length)
    kl_ptr, rewards_ptr, advantages_ptr, returns_ptr,  # (rows, length), dense
    moments_ptr,  # (programs, 3)
    maps_ptr,  # (rows, parts, 4), the parts' maps and whether they hold a real token
    logprobs_stride, ref_logprobs_stride, values_stride, mask_stride,
    rows, length, part_length, parts, kl_coef, gamma, decay, score_clip,
    ESTIMATOR: tl.constexpr, PASS: tl.constexpr,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = GROUPS * VEC
    inputs = (logprobs_ptr, ref_logprobs_ptr, values_ptr, mask_ptr)
    strides = (logprobs_stride, ref_logprobs_stride, values_stride, mask_stride)
    tile, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    row = (tile.to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None, None]
    begin = part.to(tl.int64) * part_length
    end = tl.minimum(begin + part_length, length)
    lane = tile_lanes(GROUPS)
    score = tl.load(scores_ptr + tl.reshape(row, [ROWS]), tl.reshape(row, [ROWS]) < rows, other=0).to(tl.float32)
    score = tl.where(score > score_clip, score_clip, tl.where(score < -score_clip, -score_clip, score))
    state = score
    if PASS == MAPS:
        state = tl.zeros([ROWS], tl.float32)
    part_decay = tl.full([ROWS], 1.0, tl.float32)
    later_real = tl.zeros([ROWS], tl.int32)
    if PASS == REST:
        row_maps_ptr = maps_ptr + tile.to(tl.int64) * parts * 4
        state = state_after(row_maps_ptr, part, parts, state, False, PARTS)
        later_real = any_after(row_maps_ptr + 2, part, parts, PARTS)
    count = tl.zeros([ROWS, GROUPS], tl.int32)
    total = tl.zeros([ROWS, GROUPS], tl.float64)
    squares = tl.zeros([ROWS, GROUPS], tl.float64)

    for block in range(tl.cdiv(end, BLOCK) - 1, begin // BLOCK - 1, -1):
        start = block * BLOCK
        inside = tokens_inside(row, rows, lane, start, begin, end, False, ALIGNED, ROWS, BLOCK)
        kl, reward, value, real = _ppo_tokens(inputs, strides, row, start, lane, inside, kl_coef, ESTIMATOR, ALIGNED)
        d, o = token_maps(reward, value, real, real, gamma, decay, False)
        last_real = tl.max(tl.max(tl.where(real, lane, -1), 2), 1)
        is_last = real & ((lane == last_real[:, None, None]) & (later_real == 0)[:, None, None])
        later_real = tl.maximum(later_real, (last_real >= 0).to(tl.int32))
        if PASS == MAPS:
            part_decay, state = with_tile(part_decay, state, d, o, False, ROWS, GROUPS)
        else:
            later_inside = tokens_inside(row, rows, lane + VEC, start, begin, end, False, ALIGNED, ROWS, BLOCK)
            _, next_reward, next_value, next_real = _ppo_tokens(
                inputs, strides, row, start, lane + VEC, later_inside, kl_coef, ESTIMATOR, ALIGNED
            )
            later_d, later_o = token_maps(next_reward, next_value, next_real, next_real, gamma, decay, False)
            after, state = next_states(d, o, later_d, later_o, state, False, ROWS, GROUPS)
            advantage = tl.where(real, reward - value + after, 0.0)
            reward += tl.where(is_last, score[:, None, None], 0.0)
            store_tokens(kl_ptr, length, row, start, lane, inside, kl, ALIGNED)
            store_tokens(rewards_ptr, length, row, start, lane, inside, reward, ALIGNED)
            store_tokens(advantages_ptr, length, row, start, lane, inside, advantage, ALIGNED)
            store_tokens(returns_ptr, length, row, start, lane, inside, advantage + value, ALIGNED)
            count += tl.sum(real.to(tl.int32), 2)
            total += tl.sum(advantage.to(tl.float64), 2)
            squares += tl.sum(advantage.to(tl.float64) * advantage.to(tl.float64), 2)

    if PASS == MAPS:
        store_map(maps_ptr, row, parts, part, 0, part_decay, state, ROWS)
        store_map(maps_ptr, row, parts, part, 2, later_real.to(tl.float32), state, ROWS)
    else:
        store_moments(moments_ptr, count, total, squares)


def ppo_advantages(
    scores: Tensor,  # (B,)
    logprobs: Tensor,  # (B, T)
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    kl_coef: float,
    estimator: int,
    gamma: float,
    lam: float,
    score_clip: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """kl, rewards, advantages and returns, (B, T) float32, and the moments of the advantages for whitening, (3,)
    float64.

    The same launch computes moments per program; PyTorch sums them over programs in a second, tiny one.
    """
    kl = logprobs.new_empty(logprobs.shape, dtype=torch.float32)
    rewards, advantages, returns = (torch.empty_like(kl) for _ in range(3))
    if kl.numel() == 0:
        return kl, rewards, advantages, returns, kl.new_zeros(3, dtype=torch.float64)
    inputs = [rows_of(x) for x in (logprobs, ref_logprobs, values, mask)]
    strides = strides_of(*inputs)
    plan = plan_for(*logprobs.shape, strides)
    maps = plan.maps(logprobs)
    moments = kl.new_empty((plan.programs, 3), dtype=torch.float64)
    for which in plan.passes:
        launch(
            ppo_rows, plan.programs, logprobs,
            scores.contiguous(), *inputs, kl, rewards, advantages, returns, moments, maps,
            *strides, *logprobs.shape, plan.part, plan.parts, kl_coef, gamma, gamma * lam, limit_of(score_clip),
            ESTIMATOR=estimator, PASS=which, **plan.constants,
        )  # fmt: skip
    return kl, rewards, advantages, returns, moments.sum(0)
