# SPDX-License-Identifier: Apache-2.0
"""vtrace in Triton: see rlhf_fast/ops/vtrace.py for the mathematics.

A program goes along its rows, or its packed sequence, tile by tile from the end, and carries two states: the next
value, and the gain v - V of the next token. Each is a scan of affine maps, as in scan.py, but a token that ends an
episode has the decay -1, since 0 is a legal decay here. A token's map of the gain contains the next value, so that is
scanned first. A scan includes the lane's own token and Triton has no shift, so the
lanes of a scan hold the tokens one or two places later, which are read again, from the L1 cache. Few long rows are not
divided.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast._triton import INTERPRETED
from rlhf_fast.kernels.common import launch
from rlhf_fast.kernels.scan import TINY, VEC, load_tokens, rows_of, store_tokens, strides_of
from rlhf_fast.ops import codes

TILE = 256 if INTERPRETED else 1024  # tokens
LANES_PER_WARP = 128  # four tokens a thread
CUT = tl.constexpr(-1.0)  # as a decay: the state after the token is ignored, even if it is infinite
LEAST_LOG_RATIO = tl.constexpr(codes.LEAST_LOG_RATIO)


@triton.jit
def _inside(row, rows, lane, start, end, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    left = tl.minimum(end - start, 2 * BLOCK).to(tl.int32)
    if ALIGNED:
        left = left // VEC * VEC
    return (lane < left) & (row < rows)


@triton.jit
def _load(ptr, stride, row, start, lane, inside, otherwise, ALIGNED: tl.constexpr):
    if ptr is None:
        return otherwise
    return load_tokens(ptr, stride, row, start, lane, inside, ALIGNED)


@triton.jit
def _values(inputs, strides, row, rows, start, end, lane, CARRY: tl.constexpr, ALIGNED: tl.constexpr,
            BLOCK: tl.constexpr):  # fmt: skip
    """Values, 0 where masked; which tokens exist; which are real; which the recurrence does not step over."""
    inside = _inside(row, rows, lane, start, end, ALIGNED, BLOCK)
    real = inside & (_load(inputs[3], strides[3], row, start, lane, inside, inside, ALIGNED) != 0)
    value = load_tokens(inputs[1], strides[1], row, start, lane, inside, ALIGNED).to(tl.float32)
    return tl.where(real, value, 0.0), inside, real, real if CARRY else inside


@triton.jit
def _tokens(inputs, strides, row, start, lane, inside, real, counts, value, next_value, numbers, ALIGNED: tl.constexpr):
    """Temporal differences, limited ratios, the factors of what follows, and where an episode ends."""
    gamma, decay, log_rho_limit, c_clip = numbers
    reward = load_tokens(inputs[0], strides[0], row, start, lane, inside, ALIGNED).to(tl.float32)
    log_ratio = load_tokens(inputs[2], strides[2], row, start, lane, inside, ALIGNED).to(tl.float32)
    log_ratio = tl.where(real, log_ratio, 0.0)
    no = real & (lane < 0)
    cut = real & (_load(inputs[4], strides[4], row, start, lane, inside, no, ALIGNED) != 0)
    following = tl.where(cut, 0.0, next_value)
    if inputs[5] is not None:
        stopped = real & (load_tokens(inputs[5], strides[5], row, start, lane, inside, ALIGNED) != 0) & ~cut
        bootstrap = load_tokens(inputs[6], strides[6], row, start, lane, stopped, ALIGNED).to(tl.float32)
        following = tl.where(stopped, bootstrap, following)
        cut = cut | stopped
    limited = tl.where(log_ratio > log_rho_limit, log_rho_limit, log_ratio)  # NaN stays
    ratio = tl.exp(tl.where(limited > float("-inf"), tl.maximum(limited, LEAST_LOG_RATIO), limited))
    factor = decay * tl.where(ratio > c_clip, c_clip, ratio)
    error = tl.where(real, reward, 0.0) - value + gamma * following
    return tl.where(counts, error, 0.0), ratio, factor, cut


@triton.jit
def _apply(decay, offset, state):
    """The state before the tokens of a map, from the state after them; 0 times infinity is NaN, as in the formula."""
    return tl.where(decay == CUT, offset, offset + decay * state)


@triton.jit
def _then(later_decay, later_offset, decay, offset):
    """A product is CUT if a factor is, else 0 only if a factor is."""
    least = tl.minimum(tl.minimum(later_decay, decay), TINY)
    product = tl.where(least == CUT, least, tl.maximum(later_decay * decay, least))
    return product, _apply(decay, offset, later_offset)


@triton.jit
def _states(decay, offset, state):
    """[ROWS, BLOCK] maps -> the state to the left of each lane's token; and that of the first lane, [ROWS, 1]."""
    d, o = tl.associative_scan((decay, offset), 1, _then, reverse=True)
    states = _apply(d, o, state)
    first = tl.arange(0, states.shape[1])[None, :] == 0
    return states, tl.sum(tl.where(first, states, 0.0), 1)[:, None]


@triton.jit(do_not_specialize=[
    "rewards_stride", "values_stride", "log_ratios_stride", "mask_stride", "dones_stride", "truncated_stride",
    "bootstrap_stride", "rows", "length",
])  # fmt: skip
def vtrace_rows(
    rewards_ptr, values_ptr, log_ratios_ptr, mask_ptr, dones_ptr, truncated_ptr, bootstrap_ptr,  # (rows, length)
    cu_seqlens_ptr,  # (sequences + 1,), for one row of packed tokens; else None
    advantages_ptr, returns_ptr,  # (rows, length), dense
    rewards_stride, values_stride, log_ratios_stride, mask_stride, dones_stride, truncated_stride, bootstrap_stride,
    rows, length, gamma, decay, log_rho_limit, c_clip,
    CARRY: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    begin, end = length.to(tl.int64) * 0, length.to(tl.int64)
    if cu_seqlens_ptr is not None:  # whatever the bounds are, the tokens exist
        begin = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + tl.program_id(0)), 0), end)
        end = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + tl.program_id(0) + 1), 0), end)
        row = row * 0
    inputs = (rewards_ptr, values_ptr, log_ratios_ptr, mask_ptr, dones_ptr, truncated_ptr, bootstrap_ptr)
    strides = (rewards_stride, values_stride, log_ratios_stride, mask_stride, dones_stride, truncated_stride,
               bootstrap_stride)  # fmt: skip
    numbers = (gamma, decay, log_rho_limit, c_clip)
    lane = tl.arange(0, BLOCK)[None, :]
    value_state = tl.zeros([ROWS, 1], tl.float32)
    gain_state = tl.zeros([ROWS, 1], tl.float32)

    for block in range(tl.cdiv(end - begin, BLOCK) - 1, -1, -1):
        start = begin + block * BLOCK
        # The value after the next token: of the tokens two places later.
        value2, _, _, counts2 = _values(inputs, strides, row, rows, start, end, lane + 2, CARRY, False, BLOCK)
        next_value1, value_state = _states(tl.where(counts2, CUT, 1.0), value2, value_state)
        # The gain after each token: of the tokens one place later.
        value1, inside1, real1, counts1 = _values(inputs, strides, row, rows, start, end, lane + 1, CARRY, False, BLOCK)
        error1, ratio1, factor1, cut1 = _tokens(
            inputs, strides, row, start, lane + 1, inside1, real1, counts1, value1, next_value1, numbers, False
        )
        factor1 = tl.where(cut1, CUT, factor1)
        gain, gain_state = _states(tl.where(counts1, factor1, 1.0), ratio1 * error1, gain_state)
        # And the tokens themselves.
        value, inside, real, counts = _values(inputs, strides, row, rows, start, end, lane, CARRY, ALIGNED, BLOCK)
        next_value = tl.where(counts1, value1, next_value1)
        error, ratio, factor, cut = _tokens(
            inputs, strides, row, start, lane, inside, real, counts, value, next_value, numbers, ALIGNED
        )
        gain = tl.where(cut, 0.0, gain)
        advantage = tl.where(real, ratio * (error + gamma * gain), 0.0)
        target = tl.where(real, value + (ratio * error + factor * gain), 0.0)
        store_tokens(advantages_ptr, length, row, start, lane, inside, advantage, ALIGNED)
        store_tokens(returns_ptr, length, row, start, lane, inside, target, ALIGNED)


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
    """Advantages and returns, float32, of the shape of rewards."""
    advantages = rewards.new_empty(rewards.shape, dtype=torch.float32)
    returns = torch.empty_like(advantages)
    if rewards.numel() == 0:
        return advantages, returns
    inputs = [rows_of(x) for x in (rewards, values, log_ratios, mask, dones, truncated, bootstrap_values)]
    rows, length = (1, rewards.shape[0]) if rewards.dim() == 1 else rewards.shape
    strides = strides_of(*inputs)
    block = min(TILE, max(VEC.value, triton.next_power_of_2(length)))
    tile_rows = min(TILE // block, triton.next_power_of_2(rows))
    lanes = LANES_PER_WARP
    programs = triton.cdiv(rows, tile_rows)
    aligned = all(n % VEC.value == 0 for n in (length, *strides))
    if cu_seqlens is not None:
        block = min(block, TILE // 4)  # a token a thread: four that are read one by one take too many registers
        tile_rows, programs, aligned, lanes = 1, cu_seqlens.shape[0] - 1, False, LANES_PER_WARP // 4
    launch(
        vtrace_rows, programs, rewards,
        *inputs, cu_seqlens, advantages, returns, *strides, rows, length,
        gamma, gamma * lam, math.log(rho_clip), c_clip,
        CARRY=carry, ALIGNED=aligned, ROWS=tile_rows, BLOCK=block,
        num_warps=max(1, tile_rows * block // lanes),
    )  # fmt: skip
    return advantages, returns
