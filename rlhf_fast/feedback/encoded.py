# SPDX-License-Identifier: Apache-2.0
"""Rankings as token ids: what the reward model learns from, and DPO where it learns from feedback."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlhf_fast.data.examples import encode_completion, encode_prompt

from .schema import Ranking


@dataclass(frozen=True)
class EncodedRanking:
    """Token ids of a prompt with each of its K completions, and the (better, worse) pairs among them."""

    sequences: list[list[int]]
    pairs: list[tuple[int, int]]
    source: Ranking
    prompt_length: int = 0


def encode(tokenizer: Any, ranking: Ranking, max_length: int) -> EncodedRanking:
    """Token ids of each completion behind its prompt; too long a completion is cut at `max_length`."""
    prompt = encode_prompt(tokenizer, ranking.prompt, max_length=max_length, where=ranking.where)
    sequences = [
        (prompt + encode_completion(tokenizer, completion, ended=ended))[:max_length]
        for completion, ended in zip(ranking.completions, ranking.ended, strict=True)
    ]
    return EncodedRanking(sequences, ranking.pairs(), ranking, len(prompt))
