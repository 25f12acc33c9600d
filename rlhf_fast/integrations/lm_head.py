# SPDX-License-Identifier: Apache-2.0
"""The head of a Hugging Face causal LM: weight, bias, adapter, logit scale and softcap.

This imports nothing from transformers or peft: a model is anything with `config` and `get_output_embeddings()`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlhf_fast.ops.linear.inputs import Lora


class LanguageModelHead(NamedTuple):
    """How a model's last hidden states become its logits; field names are arguments of `linear_token_logprobs`."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    lora: Lora | None
    logit_scale: float
    softcap: float | None

    def options(self) -> dict[str, Any]:
        """All but the weight, as keywords of the linear ops."""
        return {k: v for k, v in self._asdict().items() if k != "weight"}

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits themselves, `(..., V)`, in plain PyTorch: to compare with the model's own."""
        hidden = hidden.to(self.weight.dtype)
        z = nn.functional.linear(hidden, self.weight, self.bias)
        if self.lora is not None:
            a, b, scale = self.lora
            z = z + scale * nn.functional.linear(nn.functional.linear(hidden, a.to(hidden.dtype)), b.to(hidden.dtype))
        z = z.float() * self.logit_scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


def language_model_head(model: Any) -> LanguageModelHead:
    """The head of a causal LM, tied or not, with its bias, scale, softcap and active adapter.

    Within the forward of an FSDP2 model the weight is the full tensor; outside it is this rank's shard, a DTensor.

    Raises:
        TypeError, ValueError: if the model has no head, or the head is not linear, is quantised, or has an adapter
            other than a plain LoRA; or if the model has an encoder.
    """
    model = without_adapter_wrapper(model)
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise TypeError(
            f"rlhf_fast.hf: {name} has an encoder and a decoder, and a causal language model is wanted; use its own "
            "logits with rlhf_fast.token_logprobs"
        )
    layer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if layer is None:
        raise TypeError(f"rlhf_fast.hf: {name} has no output embeddings, so it is no causal language model")
    layer = _without_saved_copy(layer)
    lora = _active_lora(layer)
    base = getattr(layer, "base_layer", layer)
    weight = getattr(base, "weight", None)
    if not isinstance(base, nn.Linear) or not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ValueError(f"rlhf_fast.hf: the head of {name} must be a plain nn.Linear, got {type(base).__name__}")
    if not weight.is_floating_point():
        raise ValueError(f"rlhf_fast.hf: the head of {name} must not be quantised, got a weight of {weight.dtype}")
    return LanguageModelHead(weight, base.bias, lora, *_scale_and_softcap(model.config))


def without_adapter_wrapper(model: Any) -> Any:
    """The transformers model inside a peft model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _scale_and_softcap(config: Any) -> tuple[float, float | None]:
    """The factor of the logits and their softcap. Families with other names for them, or other meanings, come first."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config  # of multimodal models too

    def number(name: str) -> float | None:
        value = getattr(config, name, None)
        return float(value) if isinstance(value, (int, float)) and value else None

    family = getattr(config, "model_type", "")
    if family.startswith("hyperclovax"):  # multiplies, where Granite and MiniCPM3 divide
        return number("logits_scaling") or 1.0, None
    if family == "falcon_h1":
        return number("lm_head_multiplier") or 1.0, None
    if family == "mpt":  # its logit_scale is not used by transformers
        return 1.0, None
    if family.startswith("inkling"):
        return 1.0 / (number("logits_mup_width_multiplier") or 1.0), None
    cap = number({"recurrent_gemma": "logits_soft_cap", "xlstm": "output_logit_soft_cap"}.get(family, "")) or number(
        "final_logit_softcapping"
    )
    return number("logit_scale") or 1.0 / (number("logits_scaling") or 1.0), cap


def _without_saved_copy(layer: Any) -> Any:
    """The copy that peft's `modules_to_save` uses instead of the layer, or the layer itself."""
    copies = getattr(layer, "modules_to_save", None)
    if copies is None:
        return layer
    active = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in copies]
    return copies[active[0]] if active else layer.original_module


def _active_lora(layer: Any) -> Lora | None:
    """(A, B, scale) of peft's adapter on the head; None without one, or while it is switched off or merged."""
    if not hasattr(layer, "base_layer") or layer.disable_adapters or layer.merged:
        return None
    factors = getattr(layer, "lora_A", None)
    if factors is None:
        raise ValueError(
            f"rlhf_fast.hf: the head's adapter must be a LoRA, got {type(layer).__module__}.{type(layer).__name__}; "
            "merge it, or use the model's own logits with rlhf_fast.token_logprobs"
        )
    active = [name for name in layer.active_adapters if name in factors]
    if not active:
        return None
    name = active[0]
    dropout = layer.lora_dropout[name]
    if len(active) > 1 or getattr(layer, "lora_variant", {}).get(name) is not None or factors[name].bias is not None:
        raise ValueError("rlhf_fast.hf: the head's adapter must be one plain LoRA (no DoRA, no second adapter)")
    if dropout.training and getattr(dropout, "p", 0) > 0:
        raise ValueError("rlhf_fast.hf: the head's adapter must have no dropout while training")
    if getattr(layer.lora_B[name], "bias", None) is not None:
        raise ValueError("rlhf_fast.hf: the head's adapter must be a LoRA without bias (lora_bias=False)")
    return factors[name].weight, layer.lora_B[name].weight, float(layer.scaling[name])
