# SPDX-License-Identifier: Apache-2.0
"""Shared by the Triton kernels of all families: launching, and conversions that the interpreter gets wrong."""

import functools
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast import _triton

INTERPRETED = tl.constexpr(_triton.INTERPRETED)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


def launch(kernel: Any, programs: int, near: Tensor, *args: Any, **constants: Any) -> None:
    """Runs `programs` programs on the device that holds `near`, whichever is the current one.

    num_warps counts warps of 32 lanes: of 64, as AMD's data-centre GPUs have them, half as many are launched, so that a
    thread's share stays 16 bytes.
    """
    constants["num_warps"] = max(1, constants["num_warps"] * 32 // warp_lanes(near.device))
    with _on_device(near.device):
        kernel[(programs,)](*args, enable_fp_fusion=True, **constants)


def _on_device(device: torch.device) -> AbstractContextManager[Any]:
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


@functools.cache
def processors(device: torch.device) -> int:
    """Number of streaming multiprocessors, or of the vendor's equivalent."""
    properties = _properties(device)
    return getattr(properties, "multi_processor_count", None) or properties.max_compute_units


@functools.cache
def warp_lanes(device: torch.device) -> int:
    """Lanes of a warp: 32 unless the device says otherwise."""
    return 32 if device.type == "cpu" else getattr(_properties(device), "warp_size", 32)


def _properties(device: torch.device) -> Any:
    return torch.get_device_module(device).get_device_properties(device)


def limit_of(limit: float | None) -> float:
    """A limit as the kernels take it: infinity where there is none."""
    return math.inf if limit is None else limit


def dense(x: Tensor | None) -> Tensor | None:
    """Contiguous; for tensors with one or a few entries per row."""
    return None if x is None else x.contiguous()


@triton.jit
def widen(x):
    """x in float32. The interpreter's own conversion loses subnormal bfloat16 numbers."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 x in `dtype`, rounded to nearest, ties to even. The interpreter's own conversion to bf16 truncates."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
        return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)
