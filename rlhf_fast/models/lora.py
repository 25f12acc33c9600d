# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters by peft (Hu et al. 2021, arXiv 2106.09685): the trunk is frozen, the adapters are trained."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.errors import UserError

from .dropout import keep_rates
from .fsdp import is_sharded, unsharded
from .qlora import is_quantised, plain_weight, unquantised


def add_lora(model: Any, rank: int, head: Any = None) -> Any:
    """Freeze `model` and add adapters to all linear layers of its trunk, in place. Returns the PeftModel around it.

    `head` is a layer to train in full, such as a scalar head. `model` itself is used as before.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UserError("lora_rank needs the package peft: pip install peft") from None
    targets = _linear_layers(model)
    handle = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=targets))
    if head is not None:
        head.requires_grad_(True)
    return handle


def _linear_layers(model: Any) -> list[str]:
    """Full names of the trunk's linear layers (Conv1D of GPT-2 included)."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    inside = {id(module) for module in model.base_model.modules()}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module) in inside
    ]


@contextmanager
def adapters_off(handle: Any) -> Iterator[None]:
    """Within it the model is the one before training."""
    with handle.disable_adapter():
        yield


def merged(handle: Any) -> Any:
    """A plain model with the adapters merged into its weights; `handle` cannot be used afterwards.

    Of a sharded model only the main process gets the weights, in memory of the CPU.
    """
    model = handle.get_base_model()
    if is_quantised(model):
        return unquantised(model, dict(merged_weights(model)))
    return _gathered(model) if is_sharded(model) else handle.merge_and_unload()


def merged_copy(handle: Any) -> Any:
    """The same, but `handle` is unchanged.

    A copy, because in bfloat16 subtracting the adapters again would not restore the exact weights.
    """
    model = handle.get_base_model()
    return merged(handle if is_quantised(model) or is_sharded(model) else copy.deepcopy(handle))


def _gathered(model: Any) -> Any:
    with unsharded(model):
        weights = {name: x.to("cpu", copy=True) for name, x in merged_weights(model)} if ranks().main else {}
    with torch.device("meta"):
        plain = type(model)(model.config)
    for name, buffer in model.named_buffers():
        if ranks().main and name in plain.state_dict():  # a persistent one
            weights.setdefault(name, buffer.to("cpu", copy=True))
    plain.load_state_dict(weights, strict=False, assign=True)
    plain.tie_weights()
    if ranks().main and (missing := [name for name, x in plain.state_dict().items() if x.is_meta]):
        raise UserError(f"the merged model lacks {', '.join(missing[:3])}; train without fsdp, or without lora_rank")
    plain.generation_config = getattr(model, "generation_config", None)
    keep_rates(model, plain)
    return plain


@torch.no_grad()
def merged_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The names that a plain model has, and its weights: adapters added in float32, NF4 dequantised.

    One layer after the other, where all weights are (`fsdp.unsharded`); without adapters the model's own weights.
    """
    for name, module in model.named_modules():
        base, delta = _lora_parts(module)
        if base is not None:
            yield f"{name}.weight", (plain_weight(base.weight).float() + delta.float()).to(model.dtype)
            if base.bias is not None:
                yield f"{name}.bias", base.bias.detach()
    for name, weight in model.named_parameters():
        if ".lora_" not in name and ".base_layer." not in name:
            yield name, weight.detach()


def _lora_parts(module: Any) -> tuple[Any, Tensor]:
    """The layer under an adapter and what the adapter adds to its weight; (None, nothing) for any other module."""
    if not hasattr(module, "lora_A"):
        return None, torch.empty(0)
    (adapter,) = module.active_adapters
    return module.get_base_layer(), module.get_delta_weight(adapter)
