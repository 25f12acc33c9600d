# SPDX-License-Identifier: Apache-2.0
"""Models and options for the tests of `rlhf-fast plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import GPT2Config, LlamaConfig

from rlhf_fast.report import plan

LLAMA = LlamaConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=301, tie_word_embeddings=False, max_position_embeddings=4096,
)  # fmt: skip
GPT2 = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=301, bos_token_id=1, eos_token_id=2)
SEVEN_B = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32,
    vocab_size=32000, tie_word_embeddings=False,
)  # fmt: skip


def folder_of(config: Any, path: Path) -> str:
    config.architectures = [type(config).__name__.replace("Config", "ForCausalLM").replace("GPT2For", "GPT2LMHead")]
    config.save_pretrained(path)
    return str(path)


def options_of(tmp_path: Path, **changes: Any) -> plan.PlanOptions:
    return plan.PlanOptions(model=folder_of(SEVEN_B, tmp_path), **changes)
