# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of a Hugging Face causal LM without its logits: trunk, wanted positions, the model's own head.

    import rlhf_fast as rf
    logprobs = rf.hf.token_logprobs(model, input_ids, attention_mask, mask=response_mask, temperature=0.8)

Nothing of transformers is imported: a model is whatever has `base_model`, `config` and `get_output_embeddings()`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlhf_fast.ops import _check
from rlhf_fast.ops.linear import linear_token_stats
from rlhf_fast.ops.linear.inputs import Lora
from rlhf_fast.ops.logprob import TokenStats


class LanguageModelHead(NamedTuple):
    """What turns a model's last hidden states into its logits; the names are those of `linear_token_logprobs`."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    lora: Lora | None
    logit_scale: float
    softcap: float | None

    def options(self) -> dict[str, Any]:
        """All but the weight, as keywords of the linear ops."""
        return {k: v for k, v in self._asdict().items() if k != "weight"}


def token_logprobs(
    model: Any,
    input_ids: Tensor,  # (B, T)
    attention_mask: Tensor | None = None,  # (B, T)
    *,
    mask: Tensor | None = None,  # (B, T)
    temperature: float | Tensor = 1.0,
    logits_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    **trunk_inputs: Any,
) -> Tensor:
    """log p(input_ids[b, t] | what precedes it), (B, T) float32 aligned with the tokens; differentiable.

    Args:
        model: a causal LM of transformers, or one that peft wraps; LoRA on the head is taken apart, not merged.
        attention_mask: 1 or True = real token, padding on either side; None = all are. Positions count real tokens.
        mask: bool, the tokens that are wanted; None = every real token with a real one before it. Only their positions
            reach the head; the others give 0. Never the first column: nothing precedes it.
        temperature: float, or (B, T) for each token its own.
        logits_dtype, memory_budget: as for `linear_token_logprobs`.
        trunk_inputs: more keywords for the trunk, such as position_ids.
    """
    stats = token_stats(
        model, input_ids, attention_mask, outputs=("logprobs",), mask=mask, temperature=temperature,
        logits_dtype=logits_dtype, memory_budget=memory_budget, **trunk_inputs,
    )  # fmt: skip
    assert stats.logprobs is not None
    return stats.logprobs


def token_stats(
    model: Any,
    input_ids: Tensor,  # (B, T)
    attention_mask: Tensor | None = None,  # (B, T)
    *,
    outputs: tuple[str, ...] = ("logprobs", "entropy"),
    mask: Tensor | None = None,  # (B, T)
    temperature: float | Tensor = 1.0,
    logits_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    **trunk_inputs: Any,
) -> TokenStats:
    """`rf.linear_token_stats` of the laws that the tokens were drawn from, (B, T) each; see `token_logprobs`."""
    wanted = _wanted("hf.token_stats", input_ids, attention_mask, mask)
    hidden = _hidden_states(model, input_ids, attention_mask, trunk_inputs)
    if isinstance(temperature, Tensor) and temperature.dim() > 0:
        temperature = temperature[:, 1:]
    head = language_model_head(model)
    stats = linear_token_stats(
        hidden[:, :-1], head.weight, input_ids[:, 1:], outputs=outputs, mask=wanted[:, 1:], temperature=temperature,
        logits_dtype=logits_dtype, memory_budget=memory_budget, **head.options(),
    )  # fmt: skip
    return TokenStats(*(None if x is None else nn.functional.pad(x, (1, 0)) for x in stats))


def language_model_head(model: Any) -> LanguageModelHead:
    """The head of a causal LM, tied or not, with its bias, scale, softcap and the adapter that is active on it.

    Gemma caps its logits (`final_logit_softcapping`), Cohere multiplies them (`logit_scale`), Granite divides them
    (`logits_scaling`). Inside an FSDP2 model's forward the weight is whole; outside it is this rank's part.
    """
    model = _without_adapter_wrapper(model)
    layer = model.get_output_embeddings()
    if layer is None:
        raise TypeError(f"rlhf_fast.hf: {type(model).__name__} has no output embeddings: it is no causal LM")
    lora = _active_lora(layer)
    base = getattr(layer, "base_layer", layer)
    if not isinstance(getattr(base, "weight", None), Tensor) or base.weight.dim() != 2:
        raise TypeError(f"rlhf_fast.hf: the head must be a linear layer, got {type(base).__name__}")
    config = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config  # of a model with images, too
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None) or None
    return LanguageModelHead(base.weight, getattr(base, "bias", None), lora, float(scale), softcap)


def _active_lora(layer: Any) -> Lora | None:
    """(A, B, scale) of peft's adapter on the head; None without one, or while it is switched off or merged."""
    factors = getattr(layer, "lora_A", None)
    if factors is None or layer.disable_adapters or layer.merged:
        return None
    active = [name for name in layer.active_adapters if name in factors]
    if not active:
        return None
    name = active[0]
    dropout = layer.lora_dropout[name]
    if len(active) > 1 or getattr(layer, "lora_variant", {}).get(name) is not None or factors[name].bias is not None:
        raise ValueError("rlhf_fast.hf: the head's adapter must be one plain LoRA (no DoRA, no second adapter)")
    if dropout.training and getattr(dropout, "p", 0) > 0:
        raise ValueError("rlhf_fast.hf: the head's adapter must have no dropout while training")
    return factors[name].weight, layer.lora_B[name].weight, float(layer.scaling[name])


def _without_adapter_wrapper(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _hidden_states(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None, trunk_inputs: dict[str, Any]
) -> Tensor:  # (B, T, H)
    """What the head reads. Positions count real tokens, so left padding does not shift them."""
    trunk = _without_adapter_wrapper(model).base_model
    if attention_mask is not None:
        positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        trunk_inputs = {"attention_mask": attention_mask, "position_ids": positions, **trunk_inputs}
    return trunk(input_ids=input_ids, **{"use_cache": False, **trunk_inputs}).last_hidden_state


def _wanted(op: str, input_ids: Tensor, attention_mask: Tensor | None, mask: Tensor | None) -> Tensor:
    if input_ids.dim() != 2:
        raise ValueError(f"rlhf_fast.{op}: input_ids must be (B, T), got {tuple(input_ids.shape)}")
    if attention_mask is not None:
        _check.shape_is(op, "attention_mask", attention_mask, input_ids.shape, "input_ids")
    if mask is not None:
        _check.is_mask(op, "mask", mask, input_ids.shape, "input_ids", input_ids)
        if _check.can_look(mask) and bool(mask[:, :1].any()):
            raise ValueError(f"rlhf_fast.{op}: mask must be False in the first column, which nothing precedes")
        return mask
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    return real & nn.functional.pad(real[:, :-1], (1, 0))
