# SPDX-License-Identifier: Apache-2.0
"""QLoRA (Dettmers et al. 2023, arXiv 2305.14314): adapters learn on a trunk of 4-bit NF4 weights, by bitsandbytes.

A linear layer of the trunk keeps half a byte a weight, and is multiplied in the run's dtype. Embeddings, norms and the
head stay as they are: the linear ops read the head's weight themselves.
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
    """Keywords of `from_pretrained` for a model that is quantised as it is read, onto `device`."""
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
        llm_int8_skip_modules=["lm_head", "score"],  # despite its name of 4 bits as well
    )
    return {"quantization_config": config, "device_map": {"": device}}


def keep_gradients(model: Any) -> None:
    """Have every layer multiply by the kernels that have a gradient, in evaluation mode too.

    A model of PPO is never in training mode, in which alone bitsandbytes leaves its AVX512_BF16 kernel out: that gives
    no gradient, and says nothing.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def is_quantised(model: Any) -> bool:
    """True for a model that was loaded with `four_bit`."""
    return bool(getattr(model, "is_loaded_in_4bit", False))


@contextmanager
def as_adapted(model: Any) -> Iterator[None]:
    """For the Trainer, which refuses a quantised model without peft's wrapper: our adapters are inside the model."""
    before = getattr(model, "_hf_peft_config_loaded", False)
    model._hf_peft_config_loaded = before or is_quantised(model)
    yield
    model._hf_peft_config_loaded = before


@torch.no_grad()
def unquantised(handle: Any) -> Any:
    """A plain model on the CPU, in the run's dtype, of what learned: the NF4 weights as numbers, the adapters added.

    Not the weights that were quantised, with the adapters added: these have learned to go with the NF4 ones.
    """
    from bitsandbytes.functional import dequantize_4bit
    from peft.tuners.lora import LoraLayer

    model = handle.get_base_model()
    config = copy.deepcopy(model.config)
    del config.quantization_config
    plain = type(model)._from_config(config, dtype=model.dtype)
    found = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            layer: Any = module
            base = layer.get_base_layer()
            (adapter,) = layer.active_adapters
            weight = dequantize_4bit(base.weight.data, base.weight.quant_state).float()
            found[f"{name}.weight"] = (weight + layer.get_delta_weight(adapter).float()).to(model.dtype)
            if base.bias is not None:
                found[f"{name}.bias"] = base.bias
    plain.load_state_dict({name: found[name].cpu() for name in plain.state_dict()}, assign=True)
    plain.tie_weights()
    keep_rates(model, plain)
    if getattr(model, "generation_config", None) is not None:
        plain.generation_config = model.generation_config
    return plain.eval()
