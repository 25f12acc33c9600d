# SPDX-License-Identifier: Apache-2.0
"""Devices without float64 (MPS, some Intel GPUs): the reference makes no tensor of it from float32 inputs there."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from helpers.samples import SAMPLES, build
from helpers.tools import named_outputs, with_gradients
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rlhf_fast as rf
from rlhf_fast import _triton
from rlhf_fast.ops.linear import slices
from rlhf_fast.ops.reference import common


class NoFloat64(TorchDispatchMode):
    """Raises like a device that has none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace.startswith("rlhf_fast"):  # the kernel itself, with the mode on: its own operators count
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in tree_leaves((args, kwargs, result))):
            raise TypeError(f"{func}: this device has no float64")
        return result


@pytest.mark.parametrize("name", SAMPLES)
def test_the_reference_needs_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (common, sys.modules["rlhf_fast.ops.reference.gae"], slices):
        monkeypatch.setattr(module, "wide_dtype", lambda device: torch.float32)
    sample = build(name, torch.float32)
    with rf.use_backend("torch"):
        wanted = named_outputs(sample.call(**sample.inputs))
        with NoFloat64():
            got = (
                with_gradients(sample.call, sample.inputs)[0]
                if sample.differentiable
                else named_outputs(sample.call(**sample.inputs))
            )
    for key in got:
        torch.testing.assert_close(got[key], wanted[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_far_from_zero(shift_mean: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of squares in float32 would give a variance of 0.0029 for 0.0025."""
    monkeypatch.setattr(sys.modules["rlhf_fast.ops.reference.gae"], "wide_dtype", lambda device: torch.float32)
    values = 100 + 0.05 * torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(values, dtype=torch.bool)
    with rf.use_backend("torch"):
        got = rf.masked_whiten(values, mask, shift_mean=shift_mean).double()
    true = (values.double() - values.double().mean()) / (values.double().var() + 1e-8).sqrt()
    if not shift_mean:
        true += values.double().mean()
    assert (got - true).abs().max().item() < 1e-3  # half a float32 step of 100, over 0.05


def test_which_devices_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert common.wide_dtype(torch.device("cpu")) == torch.float64 == common.wide_dtype(torch.device("cuda"))
    assert common.wide_dtype(torch.device("mps")) == torch.float32
    for has, dtype in ((True, torch.float64), (False, torch.float32)):
        monkeypatch.setattr(torch.xpu, "get_device_capability", lambda _, has=has: {"has_fp64": has})
        assert common.wide_dtype(torch.device("xpu", 0)) == dtype


def test_triton_passes_over_intel_gpus_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each GPU is asked once, by its index; only the kernels that sum in float64 are passed over."""
    asked = []

    def capability(index: int) -> dict[str, bool]:
        asked.append(index)
        return {"has_fp64": index == 1}

    monkeypatch.setattr(_triton, "installed", True)
    monkeypatch.setattr(_triton, "_float64", {})
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "get_device_capability", capability)
    for _ in range(2):
        assert "no float64" in _triton.why_not("whiten", "xpu", 0)
        assert _triton.why_not("whiten", "xpu", 1) == "" == _triton.why_not("token_stats", "xpu", 0)
    assert asked == [0, 1]
    for current in (1, 0):  # the current one, whichever that is now
        monkeypatch.setattr(torch.xpu, "current_device", lambda current=current: current)
        assert bool(_triton.why_not("whiten", "xpu")) == (current == 0)
