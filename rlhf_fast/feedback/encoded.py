# SPDX-License-Identifier: Apache-2.0
"""Rankings as token ids: what the reward model learns from, and DPO where it learns from feedback."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_fast.data.dropped import Dropped
from rlhf_fast.data.encoding import Encoded, decode_completion, encode_example, encode_prompt, vocabulary_id
from rlhf_fast.data.limits import Limits
from rlhf_fast.errors import UserError
from rlhf_fast.run.progress import notice

from .schema import Ranking

TIES = "every rated line of them is a tie, which teaches no order"
SAME = "their completions are the same tokens, as they are or because they were cut at max_length"


@dataclass(frozen=True)
class EncodedRanking:
    """Token ids of a prompt with each of its K completions, and the (better, worse) pairs among them."""

    sequences: list[list[int]]
    pairs: list[tuple[int, int]]
    source: Ranking
    prompt_length: int = 0
    cut: int = 0  # completions that lost their end


def encode(tokenizer: Any, ranking: Ranking, limits: Limits | int) -> EncodedRanking:
    """Token ids of each completion behind its prompt; too long a completion is cut at the right.

    Pairs of completions that are the same tokens then are left out. Raises UserError for a prompt that leaves no room
    for a completion, or that the tokenizer or the model cannot read.
    """
    limits = Limits(limits) if isinstance(limits, int) else limits
    rows = _rows(tokenizer, ranking)
    start = min(row.prompt_length for row in rows)  # a template may write the same prompt in different ways
    for row in rows:
        limits.check(row.ids, tokenizer, ranking.where)
    room = limits.max_length - 1
    if limits.overlong == "truncate-left":
        room = max(1, min(room, limits.max_length - max(len(row.ids) for row in rows) + start))
    prompt = limits.fit_prompt(rows[0].ids[:start], room, ranking.where, tokenizer.bos_token_id)
    whole = [prompt + row.ids[start:] for row in rows]
    sequences = [ids[: limits.max_length] for ids in whole]
    pairs = [(better, worse) for better, worse in ranking.pairs() if sequences[better] != sequences[worse]]
    cut = sum(len(ids) > limits.max_length for ids in whole)
    return EncodedRanking(sequences, pairs, ranking, len(prompt), cut)


def encode_all(
    tokenizer: Any, rankings: Sequence[Ranking], limits: Limits, *, need_pairs: bool = True, source: str | Path = ""
) -> list[EncodedRanking]:
    """The rankings that fit and, with `need_pairs`, have a pair to learn from; what is left out or cut is said."""
    dropped, kept = Dropped(source or "the feedback", limits.strict), []
    for ranking in rankings:
        try:
            encoded = encode(tokenizer, ranking, limits)
        except UserError as error:
            limits.leave_out(dropped, error)
            continue
        if encoded.cut and limits.overlong == "error":
            raise UserError(
                f"{ranking.where}: a completion is longer than max_length {limits.max_length}; raise it or shorten it"
            )
        if encoded.pairs or not need_pairs:
            kept.append(encoded)
        else:
            dropped.add(UserError(ranking.where), SAME if ranking.pairs() else TIES)
    dropped.report(len(kept))
    if cut := sum(ranking.cut for ranking in kept):
        every = sum(len(ranking.sequences) for ranking in kept)
        notice(f"{cut} of {every} completions were longer than max_length {limits.max_length} and were cut")
    if need_pairs and (same := sum(len(r.source.pairs()) - len(r.pairs) for r in kept)):
        notice(f"{same} pairs of completions were left out: {SAME}")
    return kept


def _rows(tokenizer: Any, ranking: Ranking) -> list[Encoded]:
    """Each completion behind the prompt: the tokens that were sampled if they are known, else those of its text."""
    ids, prompt = ranking.completion_ids, None
    if ids is not None and ranking.vocabulary == vocabulary_id(tokenizer):
        prompt = encode_prompt(tokenizer, ranking.prompt, where=ranking.where)
    rows = []
    for k, (completion, ended) in enumerate(zip(ranking.completions, ranking.ended, strict=True)):
        if prompt is not None and ids is not None and decode_completion(tokenizer, prompt, ids[k]) == completion:
            rows.append(Encoded(prompt + ids[k], len(prompt)))
        else:  # written by a person, or edited since
            rows.append(encode_example(tokenizer, ranking.prompt, completion, ended=ended, where=ranking.where))
    return rows
