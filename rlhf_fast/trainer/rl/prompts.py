# SPDX-License-Identifier: Apache-2.0
"""The prompts that RL asks, in the order in which it asks them; of a feedback file also what people ranked.

Reading comes first and needs no model, so that a wrong path or line is known before one is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf_fast.data.examples import PromptLine, encode_prompt, pad_right, read_prompts
from rlhf_fast.errors import UserError
from rlhf_fast.feedback.encoded import EncodedRanking, encode
from rlhf_fast.feedback.schema import Ranking, holds_feedback, read_feedback
from rlhf_fast.models.loading import device
from rlhf_fast.rollout.rollout import Rollout


@dataclass
class Prompts:
    """Prompts of one file and their token ids; of a feedback file also its completions."""

    lines: list[PromptLine]
    ids: list[list[int]]
    rankings: list[EncodedRanking] | None = None
    pad_id: int = 0

    def chosen(self, place: int, count: int, seed: int) -> list[int]:
        """The `count` prompts that follow the first `place`, in random order, each once before any comes again."""
        size = len(self.ids)
        orders = {
            round_: torch.randperm(size, generator=torch.Generator().manual_seed(seed * 7919 + round_)).tolist()
            for round_ in range(place // size, (place + count - 1) // size + 1)
        }
        return [orders[i // size][i % size] for i in range(place, place + count)]

    def ranked(self, chosen: list[int]) -> Rollout | None:
        """The completions that people ranked, best and worst of each prompt, in place of sampled ones."""
        if self.rankings is None:
            return None
        rows, starts, texts, scores, ended = [], [], [], [], []
        for i in chosen:
            ranking = self.rankings[i]
            goodness = list(ranking.source.goodness)
            for k in (goodness.index(max(goodness)), goodness.index(min(goodness))):
                rows.append(ranking.sequences[k])
                starts.append(ranking.prompt_length)
                texts.append(ranking.source.completions[k])
                scores.append(goodness[k])
                ended.append(ranking.source.ended[k])
        input_ids, attention = (x.to(device()) for x in pad_right(rows, self.pad_id))
        mask = attention.bool() & (
            torch.arange(input_ids.shape[1], device=device()) >= torch.tensor(starts, device=device())[:, None]
        )
        numbers = torch.tensor(scores, dtype=torch.float32, device=device())
        return Rollout(
            input_ids=input_ids,
            attention_mask=attention.bool(),
            response_mask=mask,
            texts=texts,
            ended=torch.tensor(ended, device=device()),
            scores=numbers,
        )


def read_asked(path: str, *, feedback: bool, scored: bool) -> Sequence[PromptLine | Ranking]:
    """The prompts of a data file, or its rankings if it is `feedback` and may be.

    Prompts alone need something that scores what is sampled of them: UserError unless there is (`scored`).
    """
    if feedback and holds_feedback(path):
        return read_feedback(path)
    if not scored:
        raise UserError("reward_model or reward_functions must say what samples are worth; feedback needs neither")
    return read_prompts(path)


def encode_asked(
    lines: Sequence[PromptLine | Ranking], tokenizer: Any, max_length: int, max_new_tokens: int
) -> Prompts:
    """Token ids; UserError for a prompt too long to leave room for a completion of `max_new_tokens`."""
    rankings = [encode(tokenizer, line, max_length) for line in lines if isinstance(line, Ranking)]
    if rankings:
        prompts = [PromptLine(ranking.source.prompt, ranking.source.where) for ranking in rankings]
        ids = [ranking.sequences[0][: ranking.prompt_length] for ranking in rankings]
        return Prompts(prompts, ids, rankings, tokenizer.pad_token_id)
    prompts, room = [line for line in lines if isinstance(line, PromptLine)], max_length - max_new_tokens + 1
    return Prompts(prompts, [encode_prompt(tokenizer, p.prompt, max_length=room, where=p.where) for p in prompts])
