# SPDX-License-Identifier: Apache-2.0
"""The pad token of a saved reward model: other programs find by it where a completion ends.

Our own code finds the end by masks, so there the pad may be the end-of-sequence token. transformers' classifiers read
the last token that is not the pad token, whatever the attention mask says, and TRL sets the pad of the model to that of
its tokenizer. If the pad were a token that ends completions, both would read the score one token too early.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection
from typing import Any

from rlhf_fast.run.progress import notice

from .gguf import resolve_model

UNUSED = re.compile(r"pad|reserved|unused", re.IGNORECASE)
OF_MEDIA = re.compile(r"image|vision|video|audio", re.IGNORECASE)  # their pads stand for inputs
NEW_PAD = "<|pad|>"


def give_own_padding(model: Any, tokenizer: Any, ends: Collection[int]) -> Any:
    """A copy of the tokenizer to save with a reward model, which pads on the right with a token that is none of `ends`.

    The model's config gets its id. It is the tokenizer's own pad if that ends nothing, else a token with a name of
    unused ones (pad, reserved), else unk, else a new token if the embeddings have a row left. Without any of these the
    config has no pad, so that transformers refuses batches instead of misreading them.
    """
    saved = copy.deepcopy(tokenizer)
    saved.padding_side = "right"  # the positions of learned embeddings then begin at the first real token
    rows = model.get_input_embeddings().weight.shape[0]
    token = _unused_token(saved, ends, rows)
    if token is not None:
        saved.pad_token = token
    elif (larger := _with_new_pad(saved)).pad_token_id < rows:
        saved = larger
    else:
        notice(
            f"the tokenizer has no token to pad with but {saved.pad_token!r}, which ends completions: the config names "
            "no pad token, so that other programs read one row at a time"
        )
    pad = saved.pad_token_id if saved.pad_token_id not in ends else None
    for config in {id(part): part for part in (model.config, model.config.get_text_config())}.values():
        config.pad_token_id = pad
    return saved


def _with_new_pad(tokenizer: Any) -> Any:
    """A copy whose pad is a new token; in a vocabulary with gaps, its id says whether the embeddings have its row."""
    larger = copy.deepcopy(tokenizer)
    larger.add_special_tokens({"pad_token": NEW_PAD})
    return larger


def generation_config_of(model: str) -> Any:
    """The generation config beside a language model, which may list tokens that end completions; None without one."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(resolve_model(model))
    except (OSError, ValueError, TypeError):
        return None


def _unused_token(tokenizer: Any, ends: Collection[int], rows: int) -> str | None:
    """A token of the vocabulary that pads or stands for nothing."""
    added = [token for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    named = [token.content for token in added if UNUSED.search(token.content) and not OF_MEDIA.search(token.content)]
    named.sort(key=lambda token: "pad" not in token.lower())
    for token in (tokenizer.pad_token, *named, tokenizer.unk_token):
        if token is not None:
            place = tokenizer.convert_tokens_to_ids(token)
            if place is not None and place not in ends and place < rows:
                return str(token)
    return None
