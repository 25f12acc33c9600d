# SPDX-License-Identifier: Apache-2.0
"""Runs the tests' calls on a GPU: every public op takes CPU tensors there and back, layout and gradients included.

So one test file serves every device: it makes its inputs on the CPU, and only the op itself runs elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import rlhf_fast as rf
from rlhf_fast import _dispatch


class _There(torch.autograd.Function):
    """A tensor with the same values, strides and storage offset on the device; its gradient comes back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, device: str) -> Tensor:
        storage = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())  # type: ignore[call-overload]
        there = torch.empty(0, dtype=x.dtype, device=device)
        return there.set_(storage.to(device).untyped_storage(), x.storage_offset(), x.shape, x.stride())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad.cpu(), None


def _map(value: Any, move: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every tensor in it moved; named tuples stay what they are."""
    if isinstance(value, Tensor):
        return move(value)
    if isinstance(value, tuple):
        moved = [_map(v, move) for v in value]
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    return value


def _there_and_back(op: Callable[..., Any], device: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        def there(x: Tensor) -> Tensor:
            if torch.compiler.is_compiling():  # which cannot follow storages
                return x.to(device)
            return _There.apply(x, device) if x.device.type == "cpu" else x

        moved = {name: _map(value, there) for name, value in kwargs.items()}
        return _map(op(*_map(args, there), **moved), lambda x: x.cpu())

    return call


def run_ops_on(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the rest of the test, `rf.<op>(...)` runs on `device`."""
    for name in _dispatch.KERNEL_OF:
        monkeypatch.setattr(rf, name, _there_and_back(getattr(rf, name), device))
