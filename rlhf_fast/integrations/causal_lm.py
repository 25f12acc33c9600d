# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of a Hugging Face causal LM without its full logits, from its trunk and head.

    import rlhf_fast as rf
    logprobs = rf.hf.token_logprobs(model, input_ids, attention_mask, mask=response_mask, temperature=0.8)

This imports nothing from transformers: a model is anything with `base_model`, `config` and `get_output_embeddings()`,
also wrapped by peft or DDP or sharded by FSDP2 (`fully_shard`).
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlhf_fast.ops import _check
from rlhf_fast.ops.linear.inputs import check_head
from rlhf_fast.ops.linear.stats import linear_stats
from rlhf_fast.ops.logprob import TokenStats, as_token_stats, output_bits

from .lm_head import LanguageModelHead, language_model_head, without_adapter_wrapper
from .wrappers import as_forward_of, unwrapped

# The kinds of head of each model that passed `check_model`.
_checked: weakref.WeakKeyDictionary[Any, set[Any]] = weakref.WeakKeyDictionary()


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

    The first call for a model compares its own logits of eight tokens with those computed from its trunk and head.

    Args:
        model: a causal LM of transformers, also wrapped by peft, DDP or FSDP2; LoRA on the head is applied without
            merging it. Under DDP and FSDP2 every rank must call this; gradients are averaged as in the model's forward.
        input_ids: `(B, T)` int64.
        attention_mask: `(B, T)`, 1 or True = real token, padding on either side; None = all are real. Positions count
            real tokens.
        mask: `(B, T)` bool, the tokens to score; None = every real token with a real one before it. Only their
            positions reach the head; the others give 0. The first column must be False: nothing precedes it.
        temperature: float, or `(B, T)` with one for each token.
        logits_dtype, memory_budget: as for `linear_token_logprobs`.
        trunk_inputs: more keywords for the trunk, such as position_ids.

    Raises:
        ValueError, TypeError: on wrong shapes, with prompt or prefix tuning, and if the model's logits differ from
            those of its trunk, linear head and configuration (docs/integrations.md lists the models).
    """
    how = HeadOptions(("logprobs",), temperature, logits_dtype, memory_budget)
    stats = _stats("hf.token_logprobs", model, input_ids, attention_mask, mask, how, trunk_inputs)
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
    """`rf.linear_token_stats` of the distribution that predicts each token, (B, T) each.

    Args:
        outputs: as for `rf.token_stats`.
        others: as for `token_logprobs`.

    Raises:
        ValueError, TypeError: as `token_logprobs`.
    """
    how = HeadOptions(outputs, temperature, logits_dtype, memory_budget)
    return _stats("hf.token_stats", model, input_ids, attention_mask, mask, how, trunk_inputs)


class HeadOptions(NamedTuple):
    """What is wanted of the head, as `linear_token_stats` takes it."""

    outputs: tuple[str, ...]
    temperature: float | Tensor
    logits_dtype: torch.dtype | None
    memory_budget: int | None


def _stats(
    op: str,
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    mask: Tensor | None,
    how: HeadOptions,
    trunk_inputs: dict[str, Any],
) -> TokenStats:
    wanted = _wanted(op, input_ids, attention_mask, mask)
    bits = output_bits(op, how.outputs, input_ids)
    temperature = how.temperature
    check_model(model)
    if isinstance(temperature, Tensor) and temperature.dim() > 0:
        _check.shape_is(op, "temperature", temperature, input_ids.shape, "input_ids")
        temperature = temperature[:, 1:]
    inner = unwrapped(model)

    def at_head(hidden: Tensor) -> TokenStats:
        head = language_model_head(inner)
        checked = check_head(op, hidden, head.weight, head.bias, head.lora, how.logits_dtype, how.memory_budget)
        results = linear_stats(
            op, checked, input_ids[:, 1:], bits, temperature, head.logit_scale, head.softcap, wanted[:, 1:], None, None
        )
        return as_token_stats(results, bits)

    def forward(input_ids: Tensor) -> TokenStats:
        hidden = _hidden_states(inner, input_ids, attention_mask, trunk_inputs)
        return as_forward_of(_head_layer(inner), at_head, hidden[:, :-1])

    stats = as_forward_of(model, forward, input_ids)
    return TokenStats(*(None if x is None else nn.functional.pad(x, (1, 0)) for x in stats))


@torch.no_grad()
def check_model(model: Any) -> None:
    """Raise unless trunk and head give the model's own logits; runs a short forward, once for each head.

    Raises:
        ValueError, TypeError: naming the model.
    """
    if torch.compiler.is_compiling():
        return
    inner = unwrapped(model)
    if getattr(getattr(inner, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            "rlhf_fast.hf: prompt tuning, prefix tuning and p-tuning are not supported, since they put virtual tokens "
            "before the text; use the model's own logits with rlhf_fast.token_logprobs"
        )
    head = language_model_head(inner)
    kind = (
        *_hooks(_head_layer(inner)), *_hooks(inner), head.lora is not None, head.logit_scale, head.softcap,
        head.weight.dtype,
    )  # fmt: skip
    if kind in _checked.get(inner, ()):
        return
    name = type(without_adapter_wrapper(inner)).__name__
    ids = sample_ids(head)
    with in_eval_mode(inner):
        ours = as_forward_of(model, lambda ids: _logits_taken_apart(inner, ids), ids)
        theirs = model(input_ids=ids, use_cache=False).logits.float()
    exact = head.weight.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(ids.device.type)
    largest = float(theirs.abs().max())
    gap = float((ours - theirs).abs().max()) if ours.shape == theirs.shape else float("inf")
    if not gap <= (1e-3 if exact else 2e-2) * max(largest, 1e-6):
        raise ValueError(
            f"rlhf_fast.hf: {name} is not supported: its logits differ by up to {gap:.3g} from its linear head on its "
            f"trunk's hidden states (largest logit {largest:.3g}); use its own logits with rlhf_fast.token_logprobs"
        )
    _checked.setdefault(inner, set()).add(kind)


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    """What besides weights may change a module's output: its class, a replaced forward, and its hooks."""
    return type(module), "forward" in vars(module), (*module._forward_pre_hooks,), (*module._forward_hooks,)


def _logits_taken_apart(inner: Any, ids: Tensor) -> Tensor:
    hidden = _hidden_states(inner, ids, None, {})
    width = language_model_head(inner).weight.shape[1]
    if hidden.shape[-1] != width:  # a layer between trunk and head changes it
        return hidden
    return as_forward_of(_head_layer(inner), lambda hidden: language_model_head(inner).logits(hidden), hidden)


def sample_ids(head: LanguageModelHead) -> Tensor:
    """(1, 8) token ids to try a model with, all different."""
    vocabulary = head.weight.shape[0]
    return ((vocabulary // 2 + 7 * torch.arange(8, device=head.weight.device)) % vocabulary).unsqueeze(0)


@contextmanager
def in_eval_mode(model: Any) -> Iterator[None]:
    """Without dropout; afterwards each module has its previous mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _head_layer(model: Any) -> Any:
    return without_adapter_wrapper(model).get_output_embeddings()


def trunk_of(model: Any) -> Any:
    """The module that computes hidden states: `base_model`, or `model` where that is the model itself (Llama 4)."""
    model = without_adapter_wrapper(model)
    trunk = model.base_model
    return getattr(model, "model", trunk) if trunk is model else trunk


def _hidden_states(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None, trunk_inputs: dict[str, Any]
) -> Tensor:  # (B, T, H)
    """The head's input. Positions count real tokens, so left padding does not shift them."""
    trunk = trunk_of(model)
    given: dict[str, Any] = {"use_cache": False}
    if attention_mask is not None:
        given["attention_mask"] = attention_mask
        if "position_ids" in inspect.signature(trunk.forward).parameters:
            given["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    output = trunk(input_ids=input_ids, **{**given, **trunk_inputs})
    hidden = getattr(output, "last_hidden_state", None)
    if not isinstance(hidden, Tensor):
        raise TypeError(
            f"rlhf_fast.hf: {type(trunk).__name__} must return last_hidden_state, got {type(output).__name__}"
        )
    return hidden


def _wanted(op: str, input_ids: Tensor, attention_mask: Tensor | None, mask: Tensor | None) -> Tensor:
    """(B, T) bool: `mask`, or every real token with a real one before it."""
    if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
        came = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise TypeError(f"rlhf_fast.{op}: input_ids must be an int64 or int32 tensor, got {came}")
    if input_ids.dim() != 2:
        raise ValueError(f"rlhf_fast.{op}: input_ids must be (B, T), got {tuple(input_ids.shape)}")
    if input_ids.numel() == 0:
        raise ValueError(f"rlhf_fast.{op}: input_ids must hold at least one token, got {tuple(input_ids.shape)}")
    if attention_mask is not None:
        if not isinstance(attention_mask, Tensor):
            raise TypeError(f"rlhf_fast.{op}: attention_mask must be a tensor, got {type(attention_mask).__name__}")
        _check.shape_is(op, "attention_mask", attention_mask, input_ids.shape, "input_ids")
    if mask is not None:
        _check.is_mask(op, "mask", mask, input_ids.shape, "input_ids", input_ids)
        if _check.can_look(mask) and bool(mask[:, :1].any()):
            raise ValueError(f"rlhf_fast.{op}: mask must be False in the first column, which nothing precedes")
        return mask
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    return real & nn.functional.pad(real[:, :-1], (1, 0))
