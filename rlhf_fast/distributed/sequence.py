# SPDX-License-Identifier: Apache-2.0
"""Rows whose tokens are divided over ranks: rank k of a process group holds the k-th part of each row.

Log-probabilities, KL and the losses are per token, so each rank calls those ops on its part as it is; whitening and
token counts take the process group. Only `gae` runs along a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fast.ops.gae import GAE, gae


@torch.no_grad()
def gae_over_ranks(
    rewards: Tensor,  # (B, T of this rank)
    values: Tensor,
    process_group: Any,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    mask_mode: str = "carry",
    **flags: Tensor | None,  # mask, dones, truncated, bootstrap_values: (B, T)
) -> GAE:
    """`rf.gae` of rows divided over the ranks of `process_group` by their tokens, in order of rank. No gradient.

    With X = V + lam A of the first real token of the later ranks, the advantages of this rank are linear in X:

        A_t = a_t + w_t X      a_t: `gae` of this part alone;  w_t: gamma^n lam^(n-1), n real tokens to the part's end

    So every rank scans its part, the ranks exchange two numbers a row, and each adds w_t X.

    Args:
        rewards, values: `(B, T)`, this rank's part, of one float dtype; T may differ between ranks, B may not.
        process_group: its ranks hold the parts.
        gamma, lam, mask_mode: as of `rf.gae`.
        **flags: `mask`, `dones`, `truncated` (bool) and `bootstrap_values`, as of `rf.gae`, of the shape of rewards.

    Returns:
        `GAE(advantages, returns)` of this rank's part, float32 (float64 for float64); both 0 at masked tokens.

    Raises:
        TypeError, ValueError: as `rf.gae`, naming the argument; on a flag that is not of the shape of rewards.
    """
    for name, flag in flags.items():
        if flag is not None and flag.shape != rewards.shape:
            raise ValueError(
                f"rlhf_fast.gae_over_ranks: {name} must have the shape of rewards {tuple(rewards.shape)}, got "
                f"{tuple(flag.shape)}"
            )
    mask, scale = flags.get("mask"), {"gamma": gamma, "lam": lam}
    if mask is not None and mask_mode == "zero":
        return _zeroed(rewards, values, process_group, mask, scale, flags)
    options: dict[str, Any] = {"mask": mask, "mask_mode": mask_mode, **scale}
    own = gae(rewards, values, **{**flags, **options})
    # The weights are the advantages of a part without rewards and values that is cut off before a value of 1.
    no, one = torch.zeros_like(rewards), torch.ones_like(rewards)
    ends = torch.zeros_like(rewards, dtype=torch.bool)
    for name in ("dones", "truncated"):
        if (flag := flags.get(name)) is not None:
            ends = ends | flag
    last, first = (_edge(rewards, mask, at_end) for at_end in (True, False))
    weights = gae(no, no, dones=ends, truncated=last, bootstrap_values=one, **options).advantages
    later = _later(own.advantages, values, weights, first, lam, process_group)
    shift = _times(weights, later[:, None])
    return GAE(own.advantages + shift, own.returns + shift)


def _edge(rewards: Tensor, mask: Tensor | None, at_end: bool) -> Tensor:
    """(B, T) bool: the last (or first) real token of each row; nowhere in a row without any."""
    real = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    seen = real.flip(1).cumsum(1).flip(1) if at_end else real.cumsum(1)
    return real & (seen == 1)


def _later(advantages: Tensor, values: Tensor, weights: Tensor, first: Tensor, lam: float, group: Any) -> Tensor:
    """(B,) X of each row: what the ranks behind this one make of the advantages here."""
    empty = ~first.any(1)
    level = torch.where(first, values.to(advantages.dtype) + lam * advantages, 0.0).sum(1)
    decay = torch.where(first, lam * weights, 0.0).sum(1) + empty  # a part without tokens hands on what it gets
    mine = torch.stack([decay, level])
    parts = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, mine, group)
    later = torch.zeros_like(level)
    for decay, level in reversed(parts[torch.distributed.get_rank(group) + 1 :]):
        later = level + _times(decay, later)
    return later


def _times(weights: Tensor, later: Tensor) -> Tensor:
    """Their product, 0 where the weight is: an infinite reward does not reach what ends before it."""
    return torch.where(weights == 0, 0.0, weights * later)


def _zeroed(
    rewards: Tensor,
    values: Tensor,
    group: Any,
    mask: Tensor,
    scale: dict[str, float],
    flags: dict[str, Tensor | None],
) -> GAE:
    """mask_mode "zero": a masked token is a real one with reward and value 0, whose flags are ignored."""
    rest = {name: flag for name, flag in flags.items() if name != "mask" and flag is not None}
    rest |= {name: rest[name] & mask for name in ("dones", "truncated") if name in rest}
    zero = rewards.new_zeros(())
    masked = torch.where(mask, rewards, zero), torch.where(mask, values, zero)
    found = gae_over_ranks(*masked, group, gamma=scale["gamma"], lam=scale["lam"], mask_mode="carry", **rest)
    return GAE(*(torch.where(mask, x, 0.0) for x in found))
