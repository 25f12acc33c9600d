# SPDX-License-Identifier: Apache-2.0
"""The prompts that RL samples from, in their order; from a feedback file, also its ranked completions.

Reading comes first and needs no model, so that a wrong path or line is known before one is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from rlhf_fast.data.examples import Demonstration, PromptLine, pad_right, read_prompts, read_sft
from rlhf_fast.data.limits import Limits, encode_prompts
from rlhf_fast.errors import UserError
from rlhf_fast.feedback.encoded import EncodedRanking, encode_all
from rlhf_fast.feedback.raters import Rater
from rlhf_fast.feedback.schema import Ranking, holds_feedback, read_feedback
from rlhf_fast.models.loading import device
from rlhf_fast.rollout.rollout import Rollout

from .reward_functions import RewardFunction, check_columns


class DataOptions(NamedTuple):
    """The data files of a run."""

    prompts_file: str
    eval_prompts_file: str | None
    ptx_file: str | None
    feedback: bool  # the prompts file may be a feedback file: the objective learns from pairs
    scored: bool  # there is a reward model or function
    of_samples: tuple[str, ...]  # the options that are set and say something of samples, which feedback has none of
    strict: bool


class PromptOptions(NamedTuple):
    """Options of encoding prompts."""

    limits: Limits  # the user's; the model's are added
    max_new_tokens: int
    every_pair: bool  # of a ranking, not only its best and its worst


class Data(NamedTuple):
    """What the data files hold."""

    prompts: Sequence[PromptLine | Ranking]
    held_out: list[PromptLine]
    demonstrations: list[Demonstration]


class Pair(NamedTuple):
    """Two completions of a ranking."""

    ranking: EncodedRanking
    better: int
    worse: int


@dataclass
class Prompts:
    """Prompts of one file and their token ids; from a feedback file, one for each pair of completions."""

    lines: list[PromptLine]
    ids: list[list[int]]
    pairs: list[Pair] | None = None
    pad_id: int = 0

    def draw(self, place: int, count: int, seed: int) -> list[int]:
        """The next `count` indices of an endlessly reshuffled pass over the prompts, starting at `place`."""
        return draw(place, count, len(self.ids), seed)

    def ranked(self, indices: list[int]) -> Rollout | None:
        """The two completions of each of these pairs, instead of sampled ones; None if there are no pairs."""
        if self.pairs is None:
            return None
        sides = [(pair.ranking, k) for pair in map(self.pairs.__getitem__, indices) for k in (pair.better, pair.worse)]
        starts = torch.tensor([ranking.prompt_length for ranking, _ in sides], device=device())
        input_ids, attention = (
            x.to(device()) for x in pad_right([ranking.sequences[k] for ranking, k in sides], self.pad_id)
        )
        columns = torch.arange(input_ids.shape[1], device=device())
        return Rollout(
            input_ids=input_ids,
            attention_mask=attention.bool(),
            response_mask=attention.bool() & (columns >= starts[:, None]),
            texts=[ranking.source.texts[k] for ranking, k in sides],
            ended=torch.tensor([ranking.source.ended[k] for ranking, k in sides], device=device()),
            scores=torch.tensor([float(ranking.source.goodness[k]) for ranking, k in sides], device=device()),
        )


def draw(place: int, count: int, size: int, seed: int) -> list[int]:
    """The next `count` indices of an endlessly reshuffled pass over `size` items, starting at `place`."""
    orders = {
        round_: torch.randperm(size, generator=torch.Generator().manual_seed(seed * 7919 + round_)).tolist()
        for round_ in range(place // size, (place + count - 1) // size + 1)
    }
    return [orders[i // size][i % size] for i in range(place, place + count)]


def pairs_of(ranking: EncodedRanking, every: bool) -> list[Pair]:
    """The best and worst completion of a ranking or, with `every`, all pairs that are not ties."""
    goodness = ranking.source.goodness
    pairs = [Pair(ranking, better, worse) for better, worse in ranking.pairs]
    if every or not pairs:
        return pairs
    return [max(pairs, key=lambda pair: goodness[pair.better] - goodness[pair.worse])]


def read_data(options: DataOptions, functions: Sequence[RewardFunction] = (), rater: Rater | None = None) -> Data:
    """All rows of all files; UserError naming a function or rater that must have a column which no prompt has."""
    feedback, scored, strict = options.feedback, options.scored, options.strict
    prompts = read_prompts_or_feedback(options.prompts_file, feedback=feedback, scored=scored, strict=strict)
    if options.of_samples and isinstance(prompts[0], Ranking):
        raise UserError(
            f"{options.prompts_file} holds ranked completions, so nothing is sampled: leave out "
            f"{', '.join(options.of_samples)}, or give prompts alone"
        )
    data = Data(
        prompts=prompts,
        held_out=read_prompts(options.eval_prompts_file, strict) if options.eval_prompts_file else [],
        demonstrations=read_sft(options.ptx_file, strict) if options.ptx_file else [],
    )
    check_columns(functions, data.prompts)
    check_columns(functions, data.held_out)
    if rater is not None:
        rater.check_columns(data.held_out)
    return data


def read_prompts_or_feedback(
    path: str, *, feedback: bool, scored: bool, strict: bool = False
) -> Sequence[PromptLine | Ranking]:
    """The prompts of a data file, or its rankings if it is `feedback` and may be.

    Prompts alone need something that scores what is sampled of them: UserError unless there is (`scored`).
    """
    if feedback and holds_feedback(path):
        return read_feedback(path, strict)
    if not scored:
        raise UserError("reward_model or reward_functions must say what samples are worth; feedback needs neither")
    return read_prompts(path, strict)


def encode_lines(
    lines: Sequence[PromptLine | Ranking], tokenizer: Any, limits: Limits, max_new_tokens: int, every_pair: bool
) -> Prompts:
    """Token ids; prompts too long to leave room for a completion of `max_new_tokens` are as `limits` says."""
    if ranked := [line for line in lines if isinstance(line, Ranking)]:
        pairs = [pair for ranking in encode_all(tokenizer, ranked, limits) for pair in pairs_of(ranking, every_pair)]
        prompts = [PromptLine(pair.ranking.source.prompt, pair.ranking.source.where) for pair in pairs]
        ids = [pair.ranking.sequences[0][: pair.ranking.prompt_length] for pair in pairs]
        return Prompts(prompts, ids, pairs, tokenizer.pad_token_id)
    plain = [line for line in lines if isinstance(line, PromptLine)]
    return Prompts(*encode_prompts(tokenizer, plain, limits, max_new_tokens))
