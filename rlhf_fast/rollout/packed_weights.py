# SPDX-License-Identifier: Apache-2.0
"""Weights in oneDNN's packed layout while sampling on a CPU; else a matmul of few rows packs its weight each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast.integrations.lm_head import LanguageModelHead

Linear = Callable[[Tensor], Tensor]


@contextmanager
def packed_weights(model: Any, head: LanguageModelHead, rows: int) -> Iterator[Linear]:
    """Within it the trunk's linear layers use packed copies of their weights; yields the head's linear map.

    For bfloat16 on a CPU; elsewhere nothing is packed. The products are the same to the bit. Takes the memory of the
    weights once more. `rows` is how many tokens a step reads, for which oneDNN picks the order.
    """
    if not _serves(head.weight):
        yield lambda hidden: nn.functional.linear(hidden, head.weight, head.bias)
        return
    layers = [x for x in model.base_model.modules() if type(x) is nn.Linear and _serves(x.weight)]
    for layer in layers:
        layer.forward = _packed(layer.weight, layer.bias, rows)  # type: ignore[method-assign, assignment]
    try:
        yield _packed(head.weight, head.bias, rows)
    finally:
        for layer in layers:
            del layer.forward


def _serves(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _packed(weight: Tensor, bias: Tensor | None, rows: int) -> Linear:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
    return partial(_linear, packed, None if bias is None else bias.detach())


def _linear(packed: Tensor, bias: Tensor | None, hidden: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(hidden, packed, bias, "none", [], "")  # type: ignore[no-any-return]
