# SPDX-License-Identifier: Apache-2.0
"""The Triton backend: the launch functions of `kernels/<family>.py` as GPU kernels of the namespace `rlhf_fast_triton`.

A family's file, and Triton with it, is imported at the first call of one of its ops. With TRITON_INTERPRET=1 the
kernels run on CPU tensors, in Triton's interpreter: for tests, far too slow for anything else.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

from rlhf_fast import _ext

NAMESPACE = "rlhf_fast_triton"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ("cuda", "xpu", "cpu") if INTERPRETED else ("cuda", "xpu")  # ROCm's tensors call themselves cuda

# File of kernels/ -> operators for which it has launch functions of the same name and arguments. Filled by the ops.
FAMILIES: dict[str, tuple[str, ...]] = {}


def launched_from(family: str, *operators: str) -> None:
    """`kernels/<family>.py` holds the launch functions of these operators."""
    FAMILIES[family] = operators


# Operators that sum in float64, for whitening.
FLOAT64_KERNELS = ("ppo_advantages", "whiten_moments", "whiten")
_float64: dict[int, bool] = {}

left_out = _ext.LEFT_OUT.get("triton", "")
installed = importlib.util.find_spec("triton") is not None and not left_out


def register() -> None:
    """Registers every launch function; without Triton the namespace uses the reference."""
    if not installed:
        return
    for family, names in FAMILIES.items():
        for name in names:
            for device in DEVICES:
                torch.library.impl(f"{NAMESPACE}::{name}", device, _launcher(family, name))


def _launcher(family: str, name: str) -> Callable[..., Any]:
    def launch(*args: Any) -> Any:
        return getattr(importlib.import_module(f"rlhf_fast.kernels.{family}"), name)(*args)

    return launch


def why_not(kernel: str, device_type: str, index: int | None = None) -> str:
    """Empty if the Triton kernel of this name serves the device, else the reason why not."""
    if left_out:
        return f"this installation holds no Triton kernels ({left_out})"
    if not installed:
        return "Triton is not installed (pip install 'rlhf-fast[triton]')"
    if device_type not in DEVICES:
        return f"Triton kernels run on GPUs, not on {device_type}"
    if device_type == "xpu" and kernel in FLOAT64_KERNELS and not _has_float64(index):
        return "this Intel GPU has no float64, in which the kernel sums"
    return _ext.why_not_gpu(device_type, index)


@_ext.constant_in_graphs
def _has_float64(index: int | None) -> bool:
    """Queried once for each Intel GPU."""
    if not torch.xpu.is_available():  # the tensor is a fake one
        return True
    index = torch.xpu.current_device() if index is None else index
    if index not in _float64:
        _float64[index] = bool(torch.xpu.get_device_capability(index).get("has_fp64", True))
    return _float64[index]
