# SPDX-License-Identifier: Apache-2.0
"""The weights of a policy under the names of a transformers checkpoint, for an engine to load."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rlhf_fast.models.lora import merged_weights


def policy_weights(model: Any) -> dict[str, Tensor]:
    """Name -> weight: adapters merged, NF4 dequantised, the head always included, tied or not.

    A tied head is sent because an engine may have its own copy of it, in its kernels' order: with new embeddings and
    the old head it would sample from another policy. Call it where all weights are (`models.fsdp.unsharded`).
    """
    weights = dict(merged_weights(model))
    head = model.get_output_embeddings()
    (name,) = [name for name, module in model.named_modules() if module is head]
    if f"{name}.weight" not in weights:
        weights[f"{name}.weight"] = head.weight.detach().clone()  # safetensors refuses a tensor twice
    return weights
