# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters by peft (Hu et al. 2021, arXiv 2106.09685): the trunk is frozen, the adapters are trained."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rlhf_fast.errors import UserError

from .qlora import is_quantised, unquantised


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
    """A plain model with the adapters merged into its weights; `handle` cannot be used afterwards."""
    return unquantised(handle) if is_quantised(handle.get_base_model()) else handle.merge_and_unload()


def merged_copy(handle: Any) -> Any:
    """The same, but `handle` is unchanged.

    A copy, because in bfloat16 subtracting the adapters again would not restore the exact weights.
    """
    return merged(handle if is_quantised(handle.get_base_model()) else copy.deepcopy(handle))
