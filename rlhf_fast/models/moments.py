# SPDX-License-Identifier: Apache-2.0
"""An optimizer's moments as a checkpoint holds them, and back: sharded by rows like the weights, for any optimizer.

Moments of 8 bits are codes and one scale for each 256 numbers of this rank's shard, in order. Such blocks do not end
where rows do, so each row is saved with the scales of the blocks that it touches and the number of its first place
in its block: any other number of ranks can read it. Where the blocks are the same again, codes and scales are restored
bit for bit; elsewhere, and from moments of 32 bits, they are rounded anew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fast.distributed.dtensors import as_dtensor, local_shard, shard_like

from .optimizers import MOMENTS, OffloadedAdamW, Pairs, copy_to_host, eight_bit_package

BLOCK = 256  # numbers with a common scale, by bitsandbytes


def saved_moments(optimizer: torch.optim.Optimizer, pairs: Pairs) -> dict[str, dict[str, Any]]:
    """By number of the weight, for `save_state`: step, exp_avg and exp_avg_sq, with the scales of those of 8 bits."""
    found = {}
    for i, (weight, stepped) in enumerate(pairs):
        if state := optimizer.state.get(stepped):
            found[str(i)] = {
                name: as_dtensor(x, weight) if isinstance(x, Tensor) and x.dim() else x
                for name, x in _rows(state, stepped).items()
            }
    return found


@torch.no_grad()
def restore_moments(optimizer: torch.optim.Optimizer, pairs: Pairs, saved: dict[str, dict[str, Any]]) -> None:
    """Put back what `saved_moments` returned, of this optimizer or of another kind.

    Raises:
        UserError: 8-bit moments without bitsandbytes, or with an old one.
    """
    for i, values in saved.items():
        weight, stepped = pairs[int(i)]
        rows = {
            name: local_shard(shard_like(x, weight)) if isinstance(x, Tensor) and x.dim() else x
            for name, x in values.items()
        }
        optimizer.state[stepped] = _state(optimizer, stepped, rows)


def _rows(state: dict[str, Any], stepped: Tensor) -> dict[str, Any]:
    if "exp_avg" in state:
        return {name: state[name] for name in ("step", *MOMENTS)}
    rows = {"step": torch.tensor(float(state["step"]))}
    for name, k in zip(MOMENTS, "12", strict=True):
        rows[name] = state[f"state{k}"].view(stepped.shape)
        if f"absmax{k}" in state:
            rows[f"{name}_scales"] = _scales_by_row(state[f"absmax{k}"], stepped)
    return rows


def _state(optimizer: Any, stepped: Tensor, rows: dict[str, Any]) -> dict[str, Any]:
    """The optimizer's state of one weight."""
    step, device = float(rows["step"]), stepped.device
    if not hasattr(optimizer, "name2qmap"):
        moments = {name: _numbers(rows, name) for name in MOMENTS}
        if isinstance(optimizer, OffloadedAdamW):
            moments = {name: copy_to_host(x, pin=stepped.is_cuda) for name, x in moments.items()}
        else:
            moments = {name: x.to(device, torch.float32) for name, x in moments.items()}
        return {"step": torch.tensor(step, device=device), **moments}
    (gindex, pindex, group) = next(
        (g, p, group)
        for g, group in enumerate(optimizer.param_groups)
        for p, one in enumerate(group["params"])
        if one is stepped
    )
    optimizer.init_state(group, stepped, gindex, pindex)
    state = optimizer.state[stepped]
    for name, k in zip(MOMENTS, "12", strict=True):
        if f"absmax{k}" not in state:
            state[f"state{k}"].copy_(_numbers(rows, name))
        elif stepped.numel():
            codes, scales = _codes(rows, name, state[f"qmap{k}"])
            state[f"state{k}"].copy_(codes.view(stepped.shape))
            state[f"absmax{k}"].copy_(scales)
    state["step"] = int(step)
    return state


def _scales_by_row(scales: Tensor, stepped: Tensor) -> Tensor:
    """(rows, 1 + most blocks of a row) float32: the place of the row's first number in its block, then the scales."""
    rows, width = stepped.shape[0], _width(stepped)
    starts = torch.arange(rows, device=scales.device) * width
    blocks = starts[:, None] // BLOCK + torch.arange((width + BLOCK - 2) // BLOCK + 1, device=scales.device)
    touched = scales[blocks.clamp(max=max(len(scales) - 1, 0))] if len(scales) else scales.new_zeros(blocks.shape)
    return torch.cat([(starts % BLOCK)[:, None].float(), touched], dim=1)


def _width(weight: Tensor) -> int:
    """Numbers in a row."""
    return int(torch.Size(weight.shape[1:]).numel())


def _spread(codes: Tensor, by_row: Tensor) -> Tensor:
    """The scale of each number, flat."""
    places = by_row[:, :1].long() + torch.arange(_width(codes), device=codes.device)
    return by_row[:, 1:].gather(1, places // BLOCK).flatten()


def _numbers(rows: dict[str, Any], name: str) -> Tensor:
    """A moment in float32."""
    codes, by_row = rows[name], rows.get(f"{name}_scales")
    if by_row is None:
        return codes.float()
    package = eight_bit_package("this checkpoint has 8-bit moments, which need the package bitsandbytes")
    table = package.functional.create_dynamic_map(signed=name == MOMENTS[0]).to(codes.device)
    return table[codes.long()] * _spread(codes, by_row).view(codes.shape)


def _codes(rows: dict[str, Any], name: str, table: Tensor) -> tuple[Tensor, Tensor]:
    """Flat codes of 8 bits, and the scale of each block of them."""
    from bitsandbytes.functional import quantize_blockwise

    by_row = rows.get(f"{name}_scales")
    if by_row is not None:
        codes, scales = rows[name].flatten(), _spread(rows[name], by_row)
        firsts = scales[::BLOCK]
        if torch.equal(firsts.repeat_interleave(BLOCK)[: len(scales)], scales):
            return codes, firsts
    numbers = _numbers(rows, name).flatten().to(table.device).contiguous()
    codes, state = quantize_blockwise(numbers, code=table, blocksize=BLOCK)
    return codes, state.absmax
