# SPDX-License-Identifier: Apache-2.0
"""How `gae`, `vtrace` and `retrace` get their tokens: rows or packed sequences, with flags per token or per row."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.ops import _check


def check_like(op: str, name: str, x: Tensor, first: Tensor, first_name: str = "rewards") -> None:
    """Raises unless x has the dtype, shape and device of the first tensor."""
    _check.same_dtype(op, name, x, first_name, first)
    _check.shape_is(op, name, x, first.shape, first_name)
    _check.on_device(op, name, x, first_name, first)


def checked_layout(
    op: str, rewards: Tensor, values: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor | None:
    """Checks the tensors that every op over episodes has; cu_seqlens as the operators take it."""
    _check.is_float(op, "rewards", rewards)
    packed = cu_seqlens is not None
    if rewards.dim() != (1 if packed else 2):
        wanted = "(total,) with cu_seqlens" if packed else "(B, T)"
        raise ValueError(f"rlhf_fast.{op}: rewards must be {wanted}, got shape {tuple(rewards.shape)}")
    check_like(op, "values", values, rewards)
    _check.is_mask(op, "mask", mask, rewards.shape, "rewards", rewards)
    return None if cu_seqlens is None else _checked_cu_seqlens(op, cu_seqlens, rewards)


def rows_of(rewards: Tensor, cu_seqlens: Tensor | None) -> int:
    """The number of rows, or of packed sequences."""
    return rewards.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1  # no int(): torch.export leaves it open


def _checked_cu_seqlens(op: str, cu_seqlens: Tensor, rewards: Tensor) -> Tensor:
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        came = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"rlhf_fast.{op}: cu_seqlens must be an int32 or int64 tensor, got {came}")
    _check.is_dense(op, "cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"rlhf_fast.{op}: cu_seqlens must be (S + 1,), got shape {tuple(cu_seqlens.shape)}")
    if cu_seqlens.shape[0] == 1 and rewards.shape[0] > 0:
        raise ValueError(
            f"rlhf_fast.{op}: cu_seqlens must be (S + 1,) with S > 0 for {rewards.shape[0]} tokens, got shape (1,)"
        )
    _check.on_device(op, "cu_seqlens", cu_seqlens, "rewards", rewards)
    if _check.can_look(cu_seqlens):
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != rewards.shape[0] or bounds != sorted(bounds):
            raise ValueError(
                f"rlhf_fast.{op}: cu_seqlens must rise from 0 to the number of tokens, {rewards.shape[0]}, got {bounds}"
            )
    return cu_seqlens.to(torch.int64).contiguous()


def _check_given_together(op: str, truncated: Tensor | None, bootstrap_values: Tensor | None) -> None:
    if (truncated is None) != (bootstrap_values is None):
        raise ValueError(f"rlhf_fast.{op}: truncated and bootstrap_values must be given together, got one of them")


def token_flags(
    op: str,
    rewards: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    dones: Tensor | None,
    truncated: Tensor | None,
    bootstrap_values: Tensor | None,
) -> list[Tensor | None]:
    """dones, truncated, bootstrap_values with an entry for each token; those given per row go to the last real one."""
    _check_given_together(op, truncated, bootstrap_values)
    rows = rows_of(rewards, cu_seqlens)
    _check_per_token_or_per_row(op, rewards, cu_seqlens, dones, truncated)
    flags: list[Tensor | None] = []
    given = (("dones", dones), ("truncated", truncated), ("bootstrap_values", bootstrap_values))
    for name, x in given:
        if x is not None and not isinstance(x, Tensor):
            raise TypeError(f"rlhf_fast.{op}: {name} must be a tensor, got {type(x).__name__}")
        if x is not None:
            _check.is_dense(op, name, x)
    per_row = {
        name: x is not None and x.dim() == 1 and x.shape != rewards.shape and x.shape[0] == rows for name, x in given
    }
    if per_row["truncated"] != per_row["bootstrap_values"]:
        raise ValueError(f"rlhf_fast.{op}: truncated and bootstrap_values must both be per token or both per row")
    last = _is_last_real(rewards, mask, cu_seqlens) if any(per_row.values()) else None
    for name, x in given:
        if x is None:
            flags.append(None)
            continue
        if name == "bootstrap_values":
            _check.same_dtype(op, name, x, "rewards", rewards)
        elif x.dtype != torch.bool:
            raise TypeError(f"rlhf_fast.{op}: {name} must be bool, got {x.dtype}")
        _check.on_device(op, name, x, "rewards", rewards)
        if per_row[name]:
            assert last is not None
            x = torch.where(last, _spread(x, rewards, cu_seqlens), torch.zeros((), dtype=x.dtype, device=x.device))
        _check.shape_is(op, name, x, rewards.shape, "rewards (or one per row)")
        flags.append(x)
    return flags


def _check_per_token_or_per_row(op: str, rewards: Tensor, cu_seqlens: Tensor | None, *flags: Tensor | None) -> None:
    """Refuse flags that could be either: as many sequences as tokens, some empty.

    Where the bounds cannot be seen they are per token. Nothing but `can_look` is asked there: torch.export would keep
    a comparison of sizes as a condition of the graph.
    """
    if cu_seqlens is None or all(x is None for x in flags) or not _check.can_look(cu_seqlens):
        return
    if cu_seqlens.shape[0] - 1 == rewards.shape[0] and bool((cu_seqlens.diff() == 0).any()):
        raise ValueError(
            f"rlhf_fast.{op}: dones, truncated and bootstrap_values may be per token or per row, and with "
            f"{rewards.shape[0]} tokens in as many sequences, some of them empty, they cannot be told apart; leave the "
            "empty sequences out of cu_seqlens"
        )


def _spread(per_row: Tensor, rewards: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """One entry per row -> one per token."""
    if cu_seqlens is None:
        return per_row.unsqueeze(-1).expand(rewards.shape)
    return per_row[sequence_of_token(rewards, cu_seqlens)]


def sequence_of_token(rewards: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Of each packed token, the number of its sequence; one past the last sequence's end has the number after."""
    tokens = torch.arange(rewards.shape[0], device=rewards.device)
    return torch.bucketize(tokens, cu_seqlens[1:], right=True)


def _is_last_real(rewards: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """True at the last real token of each row or sequence."""
    position = torch.arange(1, rewards.shape[-1] + 1, device=rewards.device).expand(rewards.shape)
    if mask is not None:
        position = torch.where(mask, position, 0)
    if cu_seqlens is None:
        highest = position.amax(-1, keepdim=True) if rewards.shape[-1] else position
    else:
        sequence = sequence_of_token(rewards, cu_seqlens)
        per_sequence = position.new_zeros(cu_seqlens.shape[0] - 1)
        highest = per_sequence.scatter_reduce(0, sequence, position, "amax")[sequence]
    return (position == highest) & (position > 0)
