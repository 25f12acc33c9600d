# SPDX-License-Identifier: Apache-2.0
"""Shared by the reference of all families."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64; all other dtypes are computed and returned in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def zero_where_masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


def zero_masked_(x: Tensor, mask: Tensor | None) -> Tensor:
    """Sets masked entries of x to 0, in place.

    Multiplies the bits by 0 or 1, since NaN * 0 is NaN: on a CPU in half the time of masked_fill_, a third of
    torch.where's.
    """
    if mask is not None:
        x.view(torch.int64 if x.dtype == torch.float64 else torch.int32).mul_(mask)
    return x


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64 for sums and offsets that need its precision; float32 on devices without float64."""
    if device.type == "mps":
        return torch.float32
    if device.type == "xpu" and not torch.compiler.is_compiling():
        return torch.float64 if torch.xpu.get_device_capability(device).get("has_fp64", True) else torch.float32
    return torch.float64
