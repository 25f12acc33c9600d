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
from torch import Tensor

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
def unquantised(model: Any, weights: dict[str, Tensor]) -> Any:
    """A plain model on the CPU in the run's dtype, with `weights`: the NF4 ones dequantised, with the adapters added.

    Not the original weights with the adapters added: the adapters were trained with the NF4 weights.
    """
    config = copy.deepcopy(model.config)
    del config.quantization_config
    plain = type(model)._from_config(config, dtype=model.dtype)
    weights = {**model.state_dict(), **weights}
    plain.load_state_dict({name: weights[name].cpu() for name in plain.state_dict()}, assign=True)
    plain.tie_weights()
    keep_rates(model, plain)
    if getattr(model, "generation_config", None) is not None:
        plain.generation_config = model.generation_config
    return plain.eval()


def plain_weight(weight: Tensor) -> Tensor:
    """An NF4 weight dequantised; any other unchanged."""
    if getattr(weight, "quant_state", None) is None:
        return weight.detach()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[no-any-return, attr-defined]
