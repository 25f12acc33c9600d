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

# File of kernels/ -> the operators that it launches, by functions with their names and arguments. The ops fill it.
FAMILIES: dict[str, tuple[str, ...]] = {}


def launched_from(family: str, *operators: str) -> None:
    """`kernels/<family>.py` holds the launch functions of these operators."""
    FAMILIES[family] = operators


installed = importlib.util.find_spec("triton") is not None


def register() -> None:
    """Registers every launch function; without Triton the namespace keeps the reference."""
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


def why_not(device_type: str, index: int | None = None) -> str:
    """Empty when Triton kernels serve this kind of device, else the reason that they do not."""
    if not installed:
        return "Triton is not installed (pip install 'rlhf-fast[triton]')"
    if device_type not in DEVICES:
        return f"Triton kernels run on GPUs, not on {device_type}"
    return _ext.why_not_gpu(device_type, index)
