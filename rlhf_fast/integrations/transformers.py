# SPDX-License-Identifier: Apache-2.0
"""transformers: the loss of a causal LM without its logits, for SFT in any Hugging Face code.

patch = rf.hf.patch_loss(model)  # then Trainer, accelerate or your own loop, as before
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast.ops.linear import linear_token_logprobs

from ._patch import Patch, disabled
from .causal_lm import check_model, in_eval_mode, sample_ids, trunk_of
from .lm_head import language_model_head

IGNORE = -100  # transformers' label of positions without a loss


def patch_loss(model: Any, *, memory_budget: int | None = None) -> Patch:
    """Make `model(..., labels=...)` in training mode compute its loss straight from hidden states.

    Positions without a label never reach the head, and the output has `logits=None`. All other calls use the model's
    own forward: evaluation, generation, calls without labels, with router logits, or with a tuple as output. The loss
    equals that of transformers (mean over labels, or sum / `num_items_in_batch`) up to rounding.

    Args:
        model: a causal LM of transformers, also wrapped by peft, before FSDP or DeepSpeed wrap it.
        memory_budget: bytes that the logits may take, as for `linear_token_logprobs`.

    Raises:
        ValueError: if the model's head or loss is not supported, which a short forward checks.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = type(inner).__name__
    patch = Patch(f"rlhf_fast -> {name}")
    target = f"{name}.forward"
    if disabled():
        patch.rows[target] = "left alone: RLHF_FAST_DISABLE is set"
        return patch
    if hasattr(inner.forward, "rlhf_fast_replaces"):
        patch.rows[target] = "ours already, by an earlier call"
        return patch
    _check_model(inner)
    had_own = "forward" in vars(inner)
    original = inner.forward
    ours = _fused_forward(inner, original, memory_budget)
    inner.forward = ours

    def put_back() -> None:
        if vars(inner).get("forward") is ours:
            if had_own:
                inner.forward = original
            else:
                del inner.forward
        else:  # accelerate wrapped it meanwhile
            ours.rlhf_fast_undone = True  # type: ignore[attr-defined]

    patch.on_undo(put_back)
    patch.rows[target] = "replaced"
    return patch


def _fused_forward(model: Any, original: Any, memory_budget: int | None) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        given = _arguments(signature, args, kwargs)
        labels: Any = given.get("labels")
        shifted: Any = given.get("shift_labels")
        router = given.get("output_router_logits", getattr(model.config, "output_router_logits", False))
        plain = given.get("return_dict") is False or _is_some(given.get("logits_to_keep")) or router
        if (labels is None and shifted is None) or not model.training or plain or hasattr(forward, "rlhf_fast_undone"):
            return original(*args, **kwargs)
        for name in ("labels", "shift_labels", "num_items_in_batch", "logits_to_keep", "output_router_logits"):
            given.pop(name, None)
        trunk = trunk_of(model)(**given)
        head = language_model_head(model)
        hidden = trunk.last_hidden_state
        if shifted is None:
            shifted = F.pad(labels, (0, 1), value=IGNORE)[..., 1:]
        shifted = shifted.to(hidden.device)
        mask = shifted != IGNORE
        logprobs = linear_token_logprobs(
            hidden, head.weight, shifted, mask=mask, memory_budget=memory_budget, **head.options()
        )
        total = kwargs.get("num_items_in_batch")
        total = mask.sum() if total is None else torch.as_tensor(total, device=logprobs.device)
        return _output(trunk, -logprobs.sum() / total)

    forward.rlhf_fast_replaces = original  # type: ignore[attr-defined]
    return forward


def _arguments(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by name, without those that are None."""
    bound = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound.update(bound.pop(parameter.name, {}))
    return {name: value for name, value in bound.items() if value is not None}


def _is_some(logits_to_keep: Any) -> bool:
    return isinstance(logits_to_keep, Tensor) or bool(logits_to_keep)


def _output(trunk: Any, loss: Tensor) -> Any:
    from transformers.modeling_outputs import CausalLMOutputWithPast

    return CausalLMOutputWithPast(
        loss=loss,
        past_key_values=getattr(trunk, "past_key_values", None),
        hidden_states=getattr(trunk, "hidden_states", None),
        attentions=getattr(trunk, "attentions", None),
    )


@torch.no_grad()
def _check_model(model: Any) -> None:
    """Raise unless `check_model` passes and the loss is the mean of -log p of the next token, which a forward checks.

    Some models compute a loss of their own whatever their `loss_function` says: Bart's labels are not shifted.
    """
    from transformers.loss.loss_utils import ForCausalLMLoss

    own_loss = ValueError(f"rlhf_fast.patch_loss: {type(model).__name__} has its own loss function")
    if model.loss_function is not ForCausalLMLoss:
        raise own_loss
    check_model(model)
    ids = sample_ids(language_model_head(model))
    without = {"output_router_logits": False} if hasattr(model.config, "output_router_logits") else {}
    with in_eval_mode(model):
        output = model(input_ids=ids, labels=ids, use_cache=False, **without)
    ours = F.cross_entropy(output.logits[0, :-1].float(), ids[0, 1:])
    if not (output.loss - ours).abs() <= 1e-2 * ours.abs() + 1e-3:
        raise own_loss
