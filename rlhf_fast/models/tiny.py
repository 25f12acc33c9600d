# SPDX-License-Identifier: Apache-2.0
"""A tiny random model of the Llama kind with a tokenizer of whole words, to try things on in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

SPECIAL = ("<pad>", "<eos>", "<unk>")


def write_tiny_model(folder: str | Path, words: Sequence[str], *, seed: int = 0, context: int = 64) -> None:
    """Write a model of two layers, 64 wide, that knows `words`, and its tokenizer, as transformers loads them.

    `context` is the most tokens in a row. The same arguments write the same weights.
    """
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )
    fast.save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        pad_token_id=fast.pad_token_id,
        eos_token_id=fast.eos_token_id,
        bos_token_id=None,
    )
    transformers.logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
