# SPDX-License-Identifier: Apache-2.0
"""Steps 1 and 2: completions of a batch of prompts, and their scores."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.rollout.rollout import Rollout, Sampler, SamplingParams
from rlhf_fast.run.progress import Timer

from .agent import Agent
from .ahead import Key
from .checks import check_rollout
from .dynamic_sampling import refill
from .prompts import Prompts
from .rewards import LengthRules
from .sizes import Sizes

T = TypeVar("T")


class SampleOptions(NamedTuple):
    """Options of sampling a step's completions."""

    params: SamplingParams
    seed: int
    extra_rounds: int  # of dynamic sampling, at most
    rules: LengthRules


def collect(
    agent: Agent, prompts: Prompts, options: SampleOptions, sizes: Sizes, step: int, timer: Timer, sampler: Sampler
) -> tuple[Rollout, dict[str, float]]:
    """This rank's samples of a step and their scores; with dynamic sampling, in rounds until enough prompts teach.

    Samples of one prompt are next to each other. The figures are those of dynamic sampling.
    """
    return refill(
        lambda extra: sample(agent, prompts, options, sizes, step, extra, timer, sampler),
        lambda rollout: options.rules.apply(rollout, punish=False),
        sizes.prompts,
        options.extra_rounds,
    )


def prompts_used(sizes: Sizes, figures: dict[str, float]) -> int:
    """Prompts that a step has drawn, over all ranks; `figures` as `collect` returns them."""
    return sizes.prompts * (1 + int(figures.get("sample/extra_rounds", 0)))


def sample(
    agent: Agent,
    prompts: Prompts,
    options: SampleOptions,
    sizes: Sizes,
    step: int,
    extra: int,
    timer: Timer,
    sampler: Sampler,
) -> Rollout:
    """The samples of this rank's share of a round of prompts, and their scores; `extra` 0 is the step's first round.

    A score is one number, by the reward model (read at the last token), by functions, by both, or by people.
    """
    with timer("generate"):
        place = agent.prompts_drawn + extra * sizes.prompts
        own, _ = share(prompts, options, sizes, place)
        rollout = prompts.ranked(own)
        if rollout is None:
            of_step = partial(call, agent, prompts, options, sizes)
            if agent.ahead is None:
                rollout = of_step(sampler, step + extra * 10_000_019, place)
            else:
                key = Key(step, place, sizes.prompts * sizes.samples)
                rollout = agent.ahead.take(key, of_step, sizes.prompts).to(agent.policy.device)
            check_rollout(rollout, options.params, len(own) * sizes.samples)
    with timer("reward"):
        if rollout.scores is None:
            lines = [prompts.lines[i] for i in own]
            plan = sizes.micro_batches(rollout.batch, agent.policy)
            scores = ranks().all_or_none(lambda: agent.rewards(rollout, plan, lines))
            rollout.scores, rollout.score_parts, rollout.rounding = scores.total, scores.parts, scores.rounding
    return rollout


def share(prompts: Prompts, options: SampleOptions, sizes: Sizes, place: int) -> tuple[list[int], int]:
    """This rank's of a step's prompts, which begin at `place`, and the number of its first one among them."""
    drawn = prompts.draw(place, sizes.prompts, options.seed)
    mine = ranks().share(len(drawn), "prompts_per_step")
    return drawn[mine], mine.start


def call(
    agent: Agent,
    prompts: Prompts,
    options: SampleOptions,
    sizes: Sizes,
    sampler: Callable[..., T],
    step: int,
    place: int,
) -> T:
    """What `sampler`, or a method with its arguments, returns for this rank's prompts of a step."""
    own, first = share(prompts, options, sizes, place)
    return sampler(
        agent.policy,
        agent.tokenizer,
        [prompts.ids[i] for i in own],
        options.params,
        seed=options.seed * 1_000_003 + step,
        samples_per_prompt=sizes.samples,
        first_prompt=first,
        total_prompts=sizes.prompts,
    )
