# SPDX-License-Identifier: Apache-2.0
"""QLoRA (Dettmers et al. 2023, arXiv 2305.14314): adapters on a trunk of 4-bit NF4 weights, by bitsandbytes.

A linear layer of the trunk stores half a byte per weight and multiplies in the run's dtype. Embeddings, norms and the
head are not quantised: the linear ops read the head's weight themselves.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from rlhf_fast.errors import UserError

from .dropout import keep_rates


def four_bit(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained` that quantise the model while it is loaded onto `device`."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise UserError("dtype nf4 needs the package bitsandbytes: pip install 'rlhf-fast[qlora]'") from None
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head", "score"],  # despite its name also for 4 bits
    )
    return {"quantization_config": config, "device_map": {"": device}}


def keep_gradients(model: Any) -> None:
    """Make every layer use kernels that have a gradient, in evaluation mode too.

    bitsandbytes avoids its AVX512_BF16 kernel, which silently gives no gradient, only in training mode; PPO's models
    are never in training mode.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def is_quantised(model: Any) -> bool:
    """True for a model that was loaded with `four_bit`."""
    return bool(getattr(model, "is_loaded_in_4bit", False))


@contextmanager
def as_adapted(model: Any) -> Iterator[None]:
    """Make transformers' Trainer accept a quantised model without peft's wrapper: our adapters are inside the model."""
    before = getattr(model, "_hf_peft_config_loaded", False)
    model._hf_peft_config_loaded = before or is_quantised(model)
    yield
    model._hf_peft_config_loaded = before


@torch.no_grad()
def unquantised(handle: Any) -> Any:
    """A plain model on the CPU in the run's dtype: the NF4 weights dequantised, with the adapters added.

    Not the original weights with the adapters added: the adapters were trained with the NF4 weights.
    """
    from bitsandbytes.functional import dequantize_4bit
    from peft.tuners.lora import LoraLayer

    model = handle.get_base_model()
    config = copy.deepcopy(model.config)
    del config.quantization_config
    plain = type(model)._from_config(config, dtype=model.dtype)
    weights = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            layer: Any = module
            base = layer.get_base_layer()
            (adapter,) = layer.active_adapters
            weight = dequantize_4bit(base.weight.data, base.weight.quant_state).float()
            weights[f"{name}.weight"] = (weight + layer.get_delta_weight(adapter).float()).to(model.dtype)
            if base.bias is not None:
                weights[f"{name}.bias"] = base.bias
    plain.load_state_dict({name: weights[name].cpu() for name in plain.state_dict()}, assign=True)
    plain.tie_weights()
    keep_rates(model, plain)
    if getattr(model, "generation_config", None) is not None:
        plain.generation_config = model.generation_config
    return plain.eval()
