# SPDX-License-Identifier: Apache-2.0
"""Rankings as token ids, for the reward model and for DPO on feedback."""

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
SAME = "their completions are the same tokens, perhaps only because they were cut at max_length"


@dataclass(frozen=True)
class EncodedRanking:
    """Token ids of a prompt with each of its K completions, and the (better, worse) pairs among them."""

    sequences: list[list[int]]
    pairs: list[tuple[int, int]]
    source: Ranking
    prompt_length: int = 0
    truncated: int = 0  # completions that were longer than max_length


def encode(tokenizer: Any, ranking: Ranking, limits: Limits | int) -> EncodedRanking:
    """Token ids of the prompt and each completion; a completion that is too long is truncated at the right.

    Pairs whose completions are then the same tokens are left out. Raises UserError for a prompt that leaves no room
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
    untruncated = [prompt + row.ids[start:] for row in rows]
    sequences = [ids[: limits.max_length] for ids in untruncated]
    pairs = [(better, worse) for better, worse in ranking.pairs() if sequences[better] != sequences[worse]]
    truncated = sum(len(ids) > limits.max_length for ids in untruncated)
    return EncodedRanking(sequences, pairs, ranking, len(prompt), truncated)


def encode_all(
    tokenizer: Any, rankings: Sequence[Ranking], limits: Limits, *, need_pairs: bool = True, source: str | Path = ""
) -> list[EncodedRanking]:
    """The rankings that fit and, with `need_pairs`, have a pair to learn from. Reports what it drops or truncates."""
    dropped, usable = Dropped(source or "the feedback", limits.strict), []
    for ranking in rankings:
        try:
            encoded = encode(tokenizer, ranking, limits)
        except UserError as error:
            limits.leave_out(dropped, error)
            continue
        if encoded.truncated and limits.overlong == "error":
            raise UserError(
                f"{ranking.where}: a completion is longer than max_length {limits.max_length}; raise it or shorten it"
            )
        if encoded.pairs or not need_pairs:
            usable.append(encoded)
        else:
            dropped.add(UserError(ranking.where), SAME if ranking.pairs() else TIES)
    dropped.report(len(usable))
    if truncated := sum(ranking.truncated for ranking in usable):
        total = sum(len(ranking.sequences) for ranking in usable)
        notice(f"{truncated} of {total} completions were longer than max_length {limits.max_length} and were cut")
    if need_pairs and (same := sum(len(r.source.pairs()) - len(r.pairs) for r in usable)):
        notice(f"{same} pairs of completions were left out: {SAME}")
    return usable


def _rows(tokenizer: Any, ranking: Ranking) -> list[Encoded]:
    """Prompt and completion for each completion: the sampled tokens if they are known, else the encoded text."""
    ids, prompt, stop = ranking.completion_ids, None, ranking.stop
    if ids is not None and ranking.vocabulary == vocabulary_id(tokenizer):
        prompt = encode_prompt(tokenizer, ranking.prompt, where=ranking.where)
    rows = []
    for k, (completion, ended) in enumerate(zip(ranking.completions, ranking.ended, strict=True)):
        if prompt is not None and ids is not None and decode_completion(tokenizer, prompt, ids[k], stop) == completion:
            rows.append(Encoded(prompt + ids[k], len(prompt)))
        else:  # written or edited by a person
            rows.append(encode_example(tokenizer, ranking.prompt, completion, ended=ended, where=ranking.where))
    return rows
