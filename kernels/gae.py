# SPDX-License-Identifier: Apache-2.0
"""gae in Triton: see rlhf_fast/ops/gae.py for the mathematics and scan.py for the scan.

A float32 token with a mask moves 17 bytes (two float32 and a flag in, two float32 out) and takes about 80 instructions.
At 3 TB/s an H100 can issue twice as many: memory is the limit, and 256 rows of 131 072 tokens would take 0.19 ms.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels.common import launch
from rlhf_fast.kernels.scan import (
    MAPS,
    REST,
    VEC,
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


@triton.jit
def _ended(cu_seqlens_ptr, token, length, low, high, step):
    """How many sequences end at or before a token, by binary search between low and high; 2 * step > high - low.

    The values of cu_seqlens were not checked. Whatever they are, this terminates and reads only within cu_seqlens.
    """
    count = token * 0 + low
    while step > 0:
        probe = count + step
        known = probe <= high
        bound = tl.minimum(tl.load(cu_seqlens_ptr + probe, known, other=0), length)
        count = tl.where(known & (bound <= token), probe, count)
        step = step // 2
    return count


@triton.jit
def _share(part, part_length, length, cu_seqlens_ptr, sequences, step, SNAP: tl.constexpr):
    """A program's tokens [begin, end); low and high: how many packed sequences end before each; step: for _ended.

    SNAP: begin and end are moved back to boundaries of sequences: the program gets those that end within its part.
    """
    begin = part.to(tl.int64) * part_length
    end = tl.minimum(begin + part_length, length)
    low, high = begin * 0, end * 0
    if cu_seqlens_ptr is not None:
        low = _ended(cu_seqlens_ptr, begin, length, 0, sequences, step)
        high = _ended(cu_seqlens_ptr, end, length, 0, sequences, step)
        while step > tl.maximum(high - low, 0):
            step = step // 2
        if SNAP:
            begin = tl.maximum(tl.load(cu_seqlens_ptr + low), 0)
            end = tl.minimum(tl.load(cu_seqlens_ptr + high), length)
    return begin, end, low, high, step


@triton.jit
def _decay(lam_ptr, sequence, sequences, gamma, decay):
    """gamma * lam: per row or sequence if lam is given so, else the number from the host."""
    if lam_ptr is not None:
        decay = gamma * tl.load(lam_ptr + sequence, sequence < sequences, other=0.0)
    return decay


@triton.jit
def _gae_tokens(
    inputs, strides,  # of rewards, values, mask, dones, truncated, bootstrap_values
    packing,  # cu_seqlens, number of sequences or rows, number of tokens, and low, high, step of _share
    lams, factors,  # pointers to lam and value_lam; gamma, gamma * lam, gamma * value_lam
    row, start, lane, inside,
    CARRY: tl.constexpr, CUTS: tl.constexpr, DECOUPLED: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Rewards, including bootstrap values, and values, 0 where masked; which tokens are real; which end an episode or a
    packed sequence; the maps with lam and with value_lam."""
    cu_seqlens_ptr, sequences, length, low, high, step = packing
    gamma, decay, value_decay = factors
    real = inside
    if inputs[2] is not None:
        real = inside & (load_tokens(inputs[2], strides[2], row, start, lane, inside, ALIGNED) != 0)
    reward = load_tokens(inputs[0], strides[0], row, start, lane, inside, ALIGNED).to(tl.float32)
    value = load_tokens(inputs[1], strides[1], row, start, lane, inside, ALIGNED).to(tl.float32)
    reward = tl.where(real, reward, 0.0)
    value = tl.where(real, value, 0.0)
    cut = inside & (lane < 0)
    if inputs[3] is not None:
        cut = real & (load_tokens(inputs[3], strides[3], row, start, lane, inside, ALIGNED) != 0)
    if inputs[4] is not None:
        stopped = load_tokens(inputs[4], strides[4], row, start, lane, inside, ALIGNED) != 0
        stopped = real & stopped & ~cut
        following = load_tokens(inputs[5], strides[5], row, start, lane, inside, ALIGNED).to(tl.float32)
        reward += tl.where(stopped, gamma * following, 0.0)
        cut = cut | stopped
    sequence = row
    if cu_seqlens_ptr is not None:
        token = start + lane
        sequence = _ended(cu_seqlens_ptr, token, length, low, high, step)
        sequence_end = tl.load(cu_seqlens_ptr + sequence + 1, inside & (sequence < sequences), other=length)
        cut = cut | (inside & (tl.minimum(sequence_end, length) == token + 1))

    counts = real if CARRY else inside
    d, o = token_maps(reward, value, counts, cut, gamma, _decay(lams[0], sequence, sequences, gamma, decay), CUTS)
    value_d, value_o = d, o
    if DECOUPLED:
        value_decay = _decay(lams[1], sequence, sequences, gamma, value_decay)
        value_d, value_o = token_maps(reward, value, counts, cut, gamma, value_decay, CUTS)
    return reward, value, real, cut, d, o, value_d, value_o


@triton.jit(do_not_specialize=[
    "rewards_stride", "values_stride", "mask_stride", "dones_stride", "truncated_stride", "bootstrap_stride",
    "rows", "length", "part_length", "parts", "sequences", "step",
])  # fmt: skip
def gae_rows(
    rewards_ptr, values_ptr, mask_ptr, dones_ptr, truncated_ptr, bootstrap_ptr,  # (rows, length)
    cu_seqlens_ptr,  # (sequences + 1,), for one row of packed tokens; else None, and sequences = rows
    lam_ptr, value_lam_ptr,  # (sequences,)
    advantages_ptr, returns_ptr,  # (rows, length), dense
    maps_ptr,  # (rows, parts, 4), the parts' maps with both lambdas
    rewards_stride, values_stride, mask_stride, dones_stride, truncated_stride, bootstrap_stride,
    rows, length, part_length, parts, sequences, step, gamma, decay, value_decay,
    PASS: tl.constexpr, CARRY: tl.constexpr, CUTS: tl.constexpr, DECOUPLED: tl.constexpr, SNAP: tl.constexpr,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = GROUPS * VEC
    tile, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    row = (tile.to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None, None]
    begin, end, low, high, step = _share(part, part_length, length, cu_seqlens_ptr, sequences, step, SNAP)
    lane = tile_lanes(GROUPS)
    inputs = (rewards_ptr, values_ptr, mask_ptr, dones_ptr, truncated_ptr, bootstrap_ptr)
    strides = (rewards_stride, values_stride, mask_stride, dones_stride, truncated_stride, bootstrap_stride)
    packing = (cu_seqlens_ptr, sequences, length, low, high, step)
    lams = (lam_ptr, value_lam_ptr)
    factors = (gamma, decay, value_decay)
    state = tl.zeros([ROWS], tl.float32)
    value_state = tl.zeros([ROWS], tl.float32)
    part_decay = tl.full([ROWS], 1.0, tl.float32)
    value_part_decay = part_decay
    if PASS == REST:
        row_maps_ptr = maps_ptr + tile.to(tl.int64) * parts * 4
        state = state_after(row_maps_ptr, part, parts, state, CUTS, PARTS)
        if DECOUPLED:
            value_state = state_after(row_maps_ptr + 2, part, parts, value_state, CUTS, PARTS)

    for block in range(tl.cdiv(end, BLOCK) - 1, begin // BLOCK - 1, -1):
        start = block * BLOCK
        inside = tokens_inside(row, rows, lane, start, begin, end, SNAP, ALIGNED, ROWS, BLOCK)
        reward, value, real, cut, d, o, value_d, value_o = _gae_tokens(
            inputs, strides, packing, lams, factors, row, start, lane, inside, CARRY, CUTS, DECOUPLED, ALIGNED
        )
        if PASS == MAPS:
            part_decay, state = with_tile(part_decay, state, d, o, CUTS, ROWS, GROUPS)
            if DECOUPLED:
                value_part_decay, value_state = with_tile(
                    value_part_decay, value_state, value_d, value_o, CUTS, ROWS, GROUPS
                )
        else:
            later_inside = tokens_inside(row, rows, lane + VEC, start, begin, end, SNAP, ALIGNED, ROWS, BLOCK)
            _, _, _, _, later_d, later_o, later_value_d, later_value_o = _gae_tokens(
                inputs, strides, packing, lams, factors, row, start, lane + VEC, later_inside,
                CARRY, CUTS, DECOUPLED, ALIGNED,
            )  # fmt: skip
            after, state = next_states(d, o, later_d, later_o, state, CUTS, ROWS, GROUPS)
            advantage = reward - value + tl.where(cut, 0.0, after)
            value_advantage = advantage
            if DECOUPLED:
                after, value_state = next_states(
                    value_d, value_o, later_value_d, later_value_o, value_state, CUTS, ROWS, GROUPS
                )
                value_advantage = reward - value + tl.where(cut, 0.0, after)
            store_tokens(advantages_ptr, length, row, start, lane, inside, tl.where(real, advantage, 0.0), ALIGNED)
            returns = tl.where(real, value_advantage + value, 0.0)
            store_tokens(returns_ptr, length, row, start, lane, inside, returns, ALIGNED)

    if PASS == MAPS:
        store_map(maps_ptr, row, parts, part, 0, part_decay, state, ROWS)
        store_map(maps_ptr, row, parts, part, 2, value_part_decay, value_state, ROWS)


def gae(
    rewards: Tensor,  # (B, T) or (total,)
    values: Tensor,
    mask: Tensor | None,
    dones: Tensor | None,
    truncated: Tensor | None,
    bootstrap_values: Tensor | None,
    cu_seqlens: Tensor | None,  # (S + 1,)
    row_lam: Tensor | None,  # (B,) or (S,)
    row_value_lam: Tensor | None,
    gamma: float,
    lam: float,
    value_lam: float,
    carry: bool,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, float32, of the shape of rewards."""
    advantages = rewards.new_empty(rewards.shape, dtype=torch.float32)
    returns = torch.empty_like(advantages)
    if rewards.numel() == 0:
        return advantages, returns
    inputs = [rows_of(x) for x in (rewards, values, mask, dones, truncated, bootstrap_values)]
    rows, length = (1, rewards.shape[0]) if rewards.dim() == 1 else rewards.shape
    strides = strides_of(*inputs)
    packed = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    sequences = rows if packed is None else packed
    cuts = not (dones is None and truncated is None and packed is None)
    decoupled = lam != value_lam or row_lam is not row_value_lam
    light = rewards.dtype == torch.float32 and not (cuts or decoupled)
    plan = plan_for(rows, length, strides, light, packed)
    maps = plan.maps(rewards)
    for which in plan.passes:
        launch(
            gae_rows, plan.programs, rewards,
            *inputs, cu_seqlens, row_lam, row_value_lam, advantages, returns, maps,
            *strides, rows, length, plan.part, plan.parts, sequences, 1 << sequences.bit_length() - 1,
            gamma, gamma * lam, gamma * value_lam,
            PASS=which, CARRY=carry, CUTS=cuts, DECOUPLED=decoupled, SNAP=packed is not None and not plan.cut,
            **plan.constants,
        )  # fmt: skip
    return advantages, returns
