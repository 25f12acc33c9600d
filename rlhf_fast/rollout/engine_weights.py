# SPDX-License-Identifier: Apache-2.0
"""The weights of a policy under the names of a transformers checkpoint, for an engine to load."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def policy_weights(model: Any) -> dict[str, Tensor]:
    """Name -> weight: adapters merged, NF4 dequantised, the head always included, tied or not.

    A tied head is sent because an engine may have its own copy of it, in its kernels' order: with new embeddings and
    the old head it would sample from another policy. Call it where all weights are (`models.fsdp.unsharded`).
    """
    weights = dict(_merged(model))
    for name, weight in model.named_parameters():
        if ".lora_" not in name and ".base_layer." not in name:
            weights.setdefault(name, weight.detach())
    head = model.get_output_embeddings()
    (name,) = [name for name, module in model.named_modules() if module is head]
    if f"{name}.weight" not in weights:
        weights[f"{name}.weight"] = head.weight.detach().clone()  # safetensors refuses a tensor twice
    return weights


def _merged(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Weights with adapters, added in float32, one layer after the other; Conv1D's are as it keeps them."""
    try:
        from peft.tuners.lora import LoraLayer
    except ImportError:
        return
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            layer: Any = module
            base, (adapter,) = layer.get_base_layer(), layer.active_adapters
            weight = _plain(base.weight)
            yield f"{name}.weight", (weight.float() + layer.get_delta_weight(adapter).float()).to(model.dtype)
            if base.bias is not None:
                yield f"{name}.bias", base.bias.detach()


def _plain(weight: Tensor) -> Tensor:
    """An NF4 weight dequantised; any other unchanged."""
    if getattr(weight, "quant_state", None) is None:
        return weight.detach()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[no-any-return, attr-defined]
