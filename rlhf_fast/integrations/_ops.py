# SPDX-License-Identifier: Apache-2.0
"""Calls of the ops that the three integrations share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import rlhf_fast as rf


def served(*tensors: Tensor) -> bool:
    """Whether the ops take these tensors: dense, on CPU or CUDA. Others (DTensor, nested, NPU) go to the original."""
    return all(
        type(x) in (Tensor, nn.Parameter) and x.device.type in ("cpu", "cuda") and not x.is_nested for x in tensors
    )


def row_entropy(logits: Tensor) -> Tensor:
    """(..., V) -> (...), float32."""
    entropy = rf.token_stats(logits, outputs=("entropy",)).entropy
    assert entropy is not None
    return entropy


def logprobs_and_entropy(stats: rf.TokenStats) -> tuple[Tensor, Tensor]:
    assert stats.logprobs is not None and stats.entropy is not None
    return stats.logprobs, stats.entropy


def as_one_dtype(*tensors: Tensor) -> list[Tensor]:
    """The tensors, converted to the widest dtype among them."""
    dtype = tensors[0].dtype
    for x in tensors[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    return [x.to(dtype) for x in tensors]
