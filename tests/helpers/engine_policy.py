# SPDX-License-Identifier: Apache-2.0
"""A small policy that vLLM's CPU attention takes, for the tests that sample by a real vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

SIZE = 96
# One whole block of the prefix cache (32 tokens) and more, so that a stale one would show.
PROMPTS = [[3 + (7 * i + p) % 90 for i in range(40 + p)] for p in range(4)]


class Tokenizer:
    """As much of one as sampling asks for."""

    pad_token_id, eos_token_id = 0, 2

    def decode(self, ids: Any, skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


def policy(tied: bool = True) -> Any:
    """Heads of 32: vLLM's CPU attention takes few sizes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = LlamaConfig(
        vocab_size=SIZE, num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=tied, **sizes, **ids
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(2)
    return model


def save(folder: Path) -> Path:
    """The policy and a tokenizer, for vLLM to start with."""
    from tokenizers import Tokenizer as Words
    from tokenizers.models import WordLevel

    policy().save_pretrained(folder)
    words = Words(WordLevel({f"w{i}": i for i in range(SIZE)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w0").save_pretrained(folder)
    return folder


def learn(model: Any, seed: int) -> None:
    """An optimizer's step."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
