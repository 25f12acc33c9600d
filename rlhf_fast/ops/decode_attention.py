# SPDX-License-Identifier: Apache-2.0
"""Attention of one new token per row over a cache of keys and values, on the CPU: for the sampler, not public.

PyTorch's fused kernel is written for many queries. For one query it packs all keys and values anew, and without a mask
it reads them once for every head that shares them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast import _dispatch, _ext

from ._register import define


def decode_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """(B, H, D') softmax(scale * query @ key.T) @ value; head h reads key head h // (H / K). No gradient.

    query (B, H, D), key (B, K, T, D), value (B, K, T, D'): one dtype. mask (B, T) bool, False where a key is not seen;
    a row that sees none gets 0. Keys and values are read in place if their last dimension is dense. Scores and sums are
    float32.
    """
    return torch.ops.rlhf_fast.decode_attention(query, key, value, mask, scale)  # type: ignore[no-any-return]


def has_decode_kernel(query: Tensor) -> bool:
    """Whether a kernel of ours serves such a query; else PyTorch's attention is the better choice, also where another
    backend than the native one was requested."""
    on_cpu = query.device.type == "cpu" and query.dtype in _dispatch.KERNEL_DTYPES
    return on_cpu and _dispatch.may_be("native") and _ext.has_kernel("decode_attention", "cpu")


def _reference(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    wide = torch.promote_types(query.dtype, torch.float32)
    queries = query.to(wide).unflatten(1, (key.shape[1], -1))  # (B, K, H / K, D)
    scores = queries @ key.to(wide).transpose(2, 3) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    weights = scores.softmax(-1)
    if mask is not None:
        weights = weights.masked_fill(~mask[:, None, None], 0)  # NaN in a row that sees nothing
    return (weights @ value.to(wide)).flatten(1, 2).to(query.dtype)


def _fake(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[1], value.shape[3])


define(
    "decode_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale) -> Tensor",
    reference=_reference,
    fake=_fake,
)
