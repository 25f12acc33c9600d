# SPDX-License-Identifier: Apache-2.0
"""Bundles of the linear family, and the checks of hidden states, head and memory budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.ops import _check
from rlhf_fast.ops.linear import shards
from rlhf_fast.ops.linear.row_selection import row_count
from rlhf_fast.ops.linear.tiles import budget_of

Lora = tuple[Tensor, Tensor, float]


class HeadTensors(NamedTuple):
    """Hidden states and the head that multiplies them: the first inputs of every op, and the ones it differentiates."""

    hidden: Tensor  # (..., H)
    weight: Tensor  # (V, H), or this rank's slice
    bias: Tensor | None  # (V,)
    lora_a: Tensor | None  # (r, H)
    lora_b: Tensor | None  # (V, r)


class Needs(NamedTuple):
    """Which of the HeadTensors need a gradient."""

    hidden: bool
    weight: bool
    bias: bool
    lora_a: bool
    lora_b: bool


class HeadGradientTensors(NamedTuple):
    """The gradients of HeadTensors, (0,) where not needed."""

    grad_hidden: Tensor
    grad_weight: Tensor
    grad_bias: Tensor
    grad_lora_a: Tensor
    grad_lora_b: Tensor


class LoopOptions(NamedTuple):
    """Options of the loop over tiles of logits."""

    lora_scale: float
    vocab_size: int  # columns in the vocabulary, of all ranks; -1: all
    float_logits: bool  # tiles in float32 whatever the operands
    group: int  # see shards.py
    budget: int  # bytes of logits that may be held
    rows_padded: bool  # row_index may hold -1


class LogitOptions(NamedTuple):
    """Temperature, scale and cap before the softmax, see `rlhf_fast/ops/logprob.py`; softcap 0: none."""

    temperature: float
    logit_scale: float
    softcap: float


class CheckedHead(NamedTuple):
    """Arguments of a public function, checked and converted by `check_head`."""

    tensors: HeadTensors
    options: LoopOptions
    vocabulary: int  # of all ranks

    @property
    def shape(self) -> torch.Size:
        """Of the rows."""
        return self.tensors.hidden.shape[:-1]


def check_head(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    lora: Lora | None = None,
    logits_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    process_group: Any = None,
    side: str = "",
) -> CheckedHead:
    """side: prefix of the names in messages, such as "ref_"."""
    names = {x: f"{side}{x}" for x in ("hidden", "weight", "bias")}
    _check.is_float(op, names["hidden"], hidden)
    if hidden.dim() == 0:
        raise ValueError(f"rlhf_fast.{op}: {names['hidden']} must be (..., H), got a tensor without dimensions")
    _check.is_group(op, process_group)
    weight = shards.local_part(op, names["weight"], weight, process_group)
    bias = shards.local_part(op, names["bias"], bias, process_group)
    lora_a, lora_b, lora_scale = _lora_tensors(op, lora, process_group)
    hidden, weight, bias, lora_a, lora_b = _under_autocast(hidden, weight, bias, lora_a, lora_b)
    _check.same_dtype(op, names["weight"], weight, names["hidden"], hidden)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"rlhf_fast.{op}: {names['weight']} must be (V, H) with H = {hidden.shape[-1]} as {names['hidden']}, "
            f"got {tuple(weight.shape)}"
        )
    _check.on_device(op, names["weight"], weight, names["hidden"], hidden)
    if bias is not None:
        _check.same_dtype(op, names["bias"], bias, names["hidden"], hidden)
        _check.shape_is(op, names["bias"], bias, weight.shape[:1], "the vocabulary")
    if lora_a is not None and lora_b is not None:
        _check_lora(op, lora_a, lora_b, hidden, weight)
    if logits_dtype is not None and not any(logits_dtype is x for x in (torch.float32, hidden.dtype)):
        raise ValueError(f"rlhf_fast.{op}: logits_dtype must be None, torch.float32 or hidden's, got {logits_dtype}")
    if memory_budget is not None and _check.whole_number(op, "memory_budget", memory_budget) < 0:
        raise ValueError(f"rlhf_fast.{op}: memory_budget must be at least 0 bytes, got {memory_budget}")
    float_logits = logits_dtype == torch.float32 and hidden.dtype != torch.float64
    handle = shards.handle_of(op, process_group, weight)
    ranks = 1 if process_group is None else torch.distributed.get_world_size(process_group)
    budget = budget_of(memory_budget, hidden.device)
    options = LoopOptions(lora_scale, -1, float_logits, handle, budget, rows_padded=False)
    return CheckedHead(HeadTensors(hidden, weight, bias, lora_a, lora_b), options, weight.shape[0] * ranks)


def needs_of(tensors: HeadTensors) -> Needs:
    """Which gradients a backward could be called for."""
    grad = torch.is_grad_enabled()
    return Needs(*[grad and x is not None and x.requires_grad for x in tensors])


def _lora_tensors(op: str, lora: Lora | None, process_group: Any) -> tuple[Any, Any, float]:
    if lora is None:
        return None, None, 0.0
    if not isinstance(lora, tuple) or len(lora) != 3:
        raise TypeError(f"rlhf_fast.{op}: lora must be (A (r, H), B (V, r), scale), got {type(lora).__name__}")
    a, b = (shards.local_part(op, "lora", x, process_group) for x in lora[:2])
    return a, b, _check.finite(op, "lora", lora[2])


def _check_lora(op: str, lora_a: Tensor, lora_b: Tensor, hidden: Tensor, weight: Tensor) -> None:
    for x in (lora_a, lora_b):
        _check.same_dtype(op, "lora", x, "hidden", hidden)
        _check.on_device(op, "lora", x, "hidden", hidden)
    wanted = (weight.shape[1], weight.shape[0])
    if lora_a.dim() != 2 or lora_b.dim() != 2 or (lora_a.shape[1], lora_b.shape[0]) != wanted:
        raise ValueError(
            f"rlhf_fast.{op}: lora must be (A (r, {wanted[0]}), B ({wanted[1]}, r), scale), "
            f"got A {tuple(lora_a.shape)}, B {tuple(lora_b.shape)}"
        )
    if lora_a.shape[0] != lora_b.shape[1]:
        raise ValueError(
            f"rlhf_fast.{op}: lora must have one rank, got A {tuple(lora_a.shape)}, B {tuple(lora_b.shape)}"
        )


def _under_autocast(*tensors: Any) -> list[Any]:
    """The tensors in autocast's dtype, as for the model's own head; float64 stays."""
    device = tensors[0].device.type
    if tensors[0].dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [None if x is None else x.to(dtype) for x in tensors]


def tile_dtype(hidden: Tensor, float_logits: bool) -> torch.dtype:
    return torch.float32 if float_logits else hidden.dtype


def buffer_elements(rows: Any, columns: int, dtype: torch.dtype, budget: int) -> Any:
    """Length of the buffer of tiles kept for the backward; it has room for masked rows, whose memory is never
    touched."""
    return torch.sym_min(rows * columns, budget // dtype.itemsize)


def selected_rows(hidden: Tensor, row_index: Tensor | None) -> int:
    """Upper bound of the number of selected rows, without reading a mask."""
    return row_count(hidden) if row_index is None else row_index.shape[0]


def fake_gradients(tensors: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """Empty tensors like the inputs where a gradient is needed, (0,) elsewhere."""
    first = tensors[0]
    assert first is not None
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if x is not None and needed else first.new_empty(0)
        for x, needed in zip(tensors, needs, strict=True)
    )
