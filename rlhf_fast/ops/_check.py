# SPDX-License-Identifier: Apache-2.0
"""Argument checks of the public ops; each message names op and argument, what was expected and what was given."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Float32 can represent both the number and its reciprocal within these bounds.
SMALLEST_FACTOR, LARGEST_FACTOR = 2.0**-126, 2.0**126
FACTOR_RANGE = "between 1.2e-38 and 8.5e37 in size"


def is_float(op: str, name: str, x: Tensor | None) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"rlhf_fast.{op}: {name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"rlhf_fast.{op}: {name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
    is_dense(op, name, x)


def is_dense(op: str, name: str, x: Tensor) -> None:
    """Refuse sparse, nested and distributed tensors, on which kernels and reference would fail with unclear errors."""
    if hasattr(x, "placements"):
        raise TypeError(
            f"rlhf_fast.{op}: {name} must be a plain tensor, got a DTensor with placements {x.placements}; give its "
            "to_local(), if the op needs no other rank's part, or its full_tensor()"
        )
    if x.is_nested or x.layout != torch.strided:
        came = "a nested tensor" if x.is_nested else x.layout
        raise TypeError(f"rlhf_fast.{op}: {name} must be a dense tensor, got {came}; convert it, with .to_dense() say")


def same_dtype(op: str, name: str, x: Tensor, first_name: str, first: Tensor) -> None:
    is_float(op, name, x)
    if x.dtype != first.dtype:
        raise TypeError(
            f"rlhf_fast.{op}: {name} must have the dtype of {first_name}, {first.dtype}, got {x.dtype}; "
            f"convert one of the two with .to()"
        )


def shape_is(op: str, name: str, x: Tensor, wanted: tuple[int, ...], of: str) -> None:
    if x.shape != wanted:
        raise ValueError(f"rlhf_fast.{op}: {name} must have the shape of {of}, {tuple(wanted)}, got {tuple(x.shape)}")


def on_device(op: str, name: str, x: Tensor, first_name: str, first: Tensor) -> None:
    is_dense(op, name, x)
    if x.device != first.device:
        raise ValueError(
            f"rlhf_fast.{op}: {name} must be on the device of {first_name}, {first.device}, got {x.device}"
        )


def is_mask(op: str, name: str, mask: Tensor | None, wanted: tuple[int, ...], of: str, first: Tensor) -> None:
    """A bool tensor of the wanted shape, or None."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        came = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"rlhf_fast.{op}: {name} must be a bool tensor (True = real token), got {came}")
    is_dense(op, name, mask)
    shape_is(op, name, mask, wanted, of)
    on_device(op, name, mask, of, first)


def number(op: str, name: str, value: Any) -> float:
    """A Python or NumPy number, or a tensor of one element."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    try:
        if isinstance(value, (bool, str)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"rlhf_fast.{op}: {name} must be a number, got {_named(value)}") from None


def whole_number(op: str, name: str, value: Any) -> int:
    """Returned unconverted, since torch.compile may have made it a symbol."""
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value  # type: ignore[return-value]
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"rlhf_fast.{op}: {name} must be an integer, got {_named(value)}") from None


def flag(op: str, name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"rlhf_fast.{op}: {name} must be True or False, got {_named(value)}")
    return value


def is_group(op: str, value: Any) -> None:
    """A process group, or None."""
    if value is not None and not hasattr(value, "group_name"):
        raise TypeError(f"rlhf_fast.{op}: process_group must be a process group or None, got {_named(value)}")


def _named(value: Any) -> str:
    if isinstance(value, Tensor) and value.is_nested:
        return "a nested tensor"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    return "None" if value is None else f"{str(value)[:60]} ({type(value).__name__})"


def choice(op: str, name: str, value: str, allowed: Mapping[str, int]) -> int:
    if not isinstance(value, str):
        raise TypeError(f"rlhf_fast.{op}: {name} must be one of {', '.join(allowed)}, got {_named(value)}")
    if value not in allowed:
        raise ValueError(f"rlhf_fast.{op}: {name} must be one of {', '.join(allowed)}, got {value!r}")
    return allowed[value]


def positive(op: str, name: str, value: float) -> float:
    value = number(op, name, value)
    if not value > 0:
        raise ValueError(f"rlhf_fast.{op}: {name} must be greater than 0, got {value}")
    return value


def finite(op: str, name: str, value: Any) -> float:
    value = number(op, name, value)
    if not -torch.inf < value < torch.inf:
        raise ValueError(f"rlhf_fast.{op}: {name} must be finite, got {value}")
    return value


def factor(op: str, name: str, value: Any) -> float:
    """A factor of the logits; one that is 0 or infinite in float32 would turn logits into 0 * inf."""
    value = number(op, name, value)
    if not SMALLEST_FACTOR <= abs(value) <= LARGEST_FACTOR:
        raise ValueError(f"rlhf_fast.{op}: {name} must be {FACTOR_RANGE}, got {value}")
    return value


def positive_factor(op: str, name: str, value: Any) -> float:
    return factor(op, name, positive(op, name, value))


def in_unit_interval(op: str, name: str, value: float) -> float:
    value = number(op, name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"rlhf_fast.{op}: {name} must be between 0 and 1, got {value}")
    return value


def can_look(x: Tensor) -> bool:
    """Whether values may be read: not on a device (which would have to be waited for), while tracing, or under vmap."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter):
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(x)


def temperature(
    op: str, name: str, value: float | Tensor, rows: tuple[int, ...], first: Tensor, mask: Tensor | None
) -> tuple[Tensor | None, float]:
    """A temperature as the operators take it: a tensor per row in the dtype of the arithmetic, or None and a float.

    Masked rows may hold any value.
    """
    if not isinstance(value, Tensor):
        return None, positive_factor(op, name, value)
    if value.dtype == torch.bool or value.is_complex():
        raise TypeError(f"rlhf_fast.{op}: {name} must hold numbers, got {value.dtype}")
    is_dense(op, name, value)
    if value.dim() != 0:
        shape_is(op, name, value, rows, "the rows")
    if value.device.type == "meta":
        on_device(op, name, value, "the rows", first)
    if value.requires_grad and torch.is_grad_enabled():
        value = value.detach()  # by contract the temperature is a constant
    if can_look(value):
        bad = ~((value >= SMALLEST_FACTOR) & (value <= LARGEST_FACTOR))
        bad = bad if mask is None or value.dim() == 0 else mask & bad
        if bool(bad.any()):
            came = value[bad][0].item() if value.dim() else value.item()
            raise ValueError(f"rlhf_fast.{op}: {name} must be greater than 0 and {FACTOR_RANGE} everywhere, got {came}")
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    return value.to(device=first.device, dtype=dtype).expand(rows).contiguous(), 1.0


def targets_in_range(op: str, targets: Tensor, columns: int, mask: Tensor | None, k_per_row: bool) -> None:
    """Check the targets of real rows on CPU. Elsewhere an invalid one gives NaN, since checking would wait for the
    device."""
    if not can_look(targets) or targets.numel() == 0:
        return
    if mask is not None:
        targets = targets.masked_fill(~(mask.unsqueeze(-1) if k_per_row else mask), 0)
    low, high = torch.aminmax(targets)
    if low.item() < 0 or high.item() >= columns:
        bad = low.item() if low.item() < 0 else high.item()
        raise ValueError(
            f"rlhf_fast.{op}: targets must be between 0 and {columns - 1}, got {bad}; "
            "mask rows that have no target, or clamp them"
        )
