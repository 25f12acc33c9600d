# SPDX-License-Identifier: Apache-2.0
"""Every causal LM class of the installed transformers, tiny and random, and what `rf.hf` makes of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import rlhf_fast as rf

VOCABULARY = 96
# What a configuration calls its sizes. Those it does not have are left out; `head_dim` and its like at the first try.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_ctx": 64, "d_model": 32, "num_layers": 4,
    "n_inner": 48, "ffn_dim": 48, "num_heads": 4, "d_ff": 48, "n_layers": 4, "n_heads": 4,
    "decoder_layers": 2, "encoder_layers": 2, "decoder_attention_heads": 4, "encoder_attention_heads": 4,
    "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "num_decoder_layers": 2, "num_encoder_layers": 2,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_intermediate_size": 16,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "attention_hidden_size": 32, "embedding_size": 32,
    "is_decoder": True, "rotary_dim": 4, "max_target_positions": 64, "dim_model_base": 8,
}  # fmt: skip
HEAD_DIMS: dict[str, Any] = {
    "head_dim": 8, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "lru_width": 32, "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8,
    "mamba_n_groups": 1, "state_size": 8,
}  # fmt: skip
# What multiplies or caps the logits: values at which leaving it out is wrong by nats.
LOGITS: dict[str, Any] = {
    "logit_scale": 0.25, "logits_scaling": 4.0, "lm_head_multiplier": 0.25, "final_logit_softcapping": 3.0,
    "logits_soft_cap": 3.0, "output_logit_soft_cap": 3.0, "logits_mup_width_multiplier": 3.0,
}  # fmt: skip
TRIES: list[dict[str, Any]] = [
    {**HEAD_DIMS, **LOGITS}, {**LOGITS}, {},
    {**HEAD_DIMS, **LOGITS, "num_key_value_heads": 4, "head_dim": 16},  # latent attention
    {**HEAD_DIMS, **LOGITS, "num_key_value_heads": 4, "head_dim": 8},
    {**LOGITS, "expand": 2, "num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8},  # Mamba 2
    {**LOGITS, "num_hidden_layers": None, "num_layers": None, "max_position_embeddings": None},  # None: as it comes
]  # fmt: skip
NOT_BUILT = "not tried: no tiny configuration builds one"
LARGEST = 20e6  # parameters: what does not get smaller than that is not built


def classes() -> Iterator[tuple[str, str]]:
    """(model type, class name), each class once."""
    seen = set()
    for model_type, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        for name in [names] if isinstance(names, str) else names:
            if name not in seen and hasattr(transformers, name):
                seen.add(name)
                yield model_type, name


def tiny(model_type: str, name: str) -> Any:
    """The model, with logits far from uniform; None where no configuration of ours builds one that runs."""
    for more in TRIES:
        try:
            model = _build(model_type, name, {**SIZES, **more})
            if model is None:
                return None
            with torch.no_grad():
                model(input_ids=torch.randint(3, VOCABULARY, (1, 9)), use_cache=False).logits  # noqa: B018
            return model
        except Exception:  # whatever a configuration of ours meets in 190 files of others
            continue
    return None


def _build(model_type: str, name: str, sizes: dict[str, Any]) -> Any:
    make = getattr(transformers, name).config_class or transformers.CONFIG_MAPPING[model_type]
    default = make()
    config = make(**{k: v for k, v in sizes.items() if v is not None and _takes(default, k)})
    with torch.device("meta"):
        if sum(p.numel() for p in getattr(transformers, name)(config).parameters()) > LARGEST:
            return None
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    head = model.get_output_embeddings()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        if head is not None:
            head.weight.mul_(20)
    return model


def _takes(config: Any, name: str) -> bool:
    attribute = getattr(type(config), name, None)
    return hasattr(config, name) and not (isinstance(attribute, property) and attribute.fset is None)


def outcome(model: Any) -> str:
    """'served' if `rf.hf` gives the model's own log-probabilities, 'wrong by ...' if others, else why it refuses."""
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        try:
            got = rf.hf.token_logprobs(model, ids)[:, 1:]
        except (TypeError, ValueError) as error:
            assert str(error).startswith("rlhf_fast.hf: "), error
            return reason(str(error))
    wanted = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    gap = float((got - wanted).abs().max())
    return wrong_loss(model, ids) or "served" if gap < 1e-3 else f"wrong by {gap:.2g} nats"


def wrong_loss(model: Any, ids: torch.Tensor) -> str:
    """What is wrong with the loss under `rf.hf.patch_loss`; '' if it is the model's own, or the patch is refused."""
    model.training = True  # the model alone, not its layers: no dropout
    try:
        wanted = float(model(input_ids=ids, labels=ids, use_cache=False).loss.detach())
        patch = rf.hf.patch_loss(model)
    except ValueError as error:
        assert "has its own loss function" in str(error), error
        return ""
    try:
        gap = abs(float(model(input_ids=ids, labels=ids, use_cache=False).loss.detach()) - wanted)
    except Exception as error:
        return f"wrong: patch_loss: {type(error).__name__}: {error}"
    finally:
        patch.undo()
    return "" if gap < 1e-3 else f"wrong loss by {gap:.2g} nats"


def reason(message: str) -> str:
    """The kind of refusal, in the table's words."""
    kinds = {
        "its logits differ by": "layers between trunk and head, or another arithmetic",
        "must be a plain nn.Linear": "the head is not one nn.Linear",
        "no output embeddings": "no output embeddings",
        "must return last_hidden_state": "the trunk returns no last_hidden_state",
    }
    return next((ours for words, ours in kinds.items() if words in message), message)


def table(outcomes: dict[str, str]) -> str:
    """The rows of docs/integrations.md."""
    groups: dict[str, list[str]] = {}
    for name, what in sorted(outcomes.items(), key=lambda item: item[0].lower()):
        groups.setdefault(what, []).append(re.sub("ForCausalLM$|LMHeadModel$", "", name))
    ranked = sorted(groups, key=lambda what: (what == NOT_BUILT, what != "served", -len(groups[what])))
    lines = [f"| {what} ({len(groups[what])}) | {', '.join(groups[what])} |" for what in ranked]
    return "\n".join(["| | classes |", "| --- | --- |", *lines]) + "\n"


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    built = {name: tiny(model_type, name) for model_type, name in classes()}
    print(table({name: NOT_BUILT if model is None else outcome(model) for name, model in built.items()}))
