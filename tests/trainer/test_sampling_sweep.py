# SPDX-License-Identifier: Apache-2.0
"""Sampling from models of every kind of cache: each token comes from the model's own distribution, or it is refused.

These stand for the kinds; `python tests/helpers/sampling.py` tries every class of transformers that builds tiny.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from helpers import causal_lms
from helpers.sampling import outcome

SAMPLED = {
    "llama": "LlamaForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",  # sliding windows
    "gpt_oss": "GptOssForCausalLM",  # attention sinks, experts
    "bloom": "BloomForCausalLM",  # no positions but by the mask
    "gpt2": "GPT2LMHeadModel",  # learned positions
    "qwen3_5_text": "Qwen3_5ForCausalLM",  # gated delta rule and attention
    "qwen3_next": "Qwen3NextForCausalLM",
    "lfm2": "Lfm2ForCausalLM",  # short convolutions and attention
    "bamba": "BambaForCausalLM",
    "granitemoehybrid": "GraniteMoeHybridForCausalLM",
    "jamba": "JambaForCausalLM",
    "mamba": "MambaForCausalLM",
    "mamba2": "Mamba2ForCausalLM",
    "falcon_mamba": "FalconMambaForCausalLM",
    "codegen": "CodeGenForCausalLM",
}
REFUSED = {
    "roberta": "RobertaForCausalLM",  # layers between trunk and head
    "llama4_text": "Llama4ForCausalLM",  # its trunk is another causal LM
    "recurrent_gemma": "RecurrentGemmaForCausalLM",
}


# Whose tiny configuration else has no attention at all, which transformers' own cache refuses.
MIXED = {
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], "shared_intermediate_size": 16},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
}


def tiny(model_type: str) -> Any:
    if model_type not in MIXED:
        return causal_lms.tiny(model_type, SAMPLED[model_type])
    torch.manual_seed(0)
    sizes = {**causal_lms.SIZES, **causal_lms.HEAD_DIMS, "num_hidden_layers": 2, **MIXED[model_type]}
    make = transformers.CONFIG_MAPPING[model_type]
    default = make()
    config = make(**{name: value for name, value in sizes.items() if hasattr(default, name)})
    model = getattr(transformers, SAMPLED[model_type])(config).eval()
    model.get_output_embeddings().weight.data.mul_(20)
    return model


@pytest.mark.parametrize("model_type", SAMPLED)
def test_every_token_comes_from_the_models_own_distribution(model_type: str) -> None:
    model = tiny(model_type)
    assert model is not None and outcome(model) == "sampled"


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_cannot_be_sampled_from_is_refused_by_name(model_type: str) -> None:
    model = causal_lms.tiny(model_type, REFUSED[model_type])
    assert model is not None and outcome(model).startswith(f"refused: {REFUSED[model_type]}")
