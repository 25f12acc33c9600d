# SPDX-License-Identifier: Apache-2.0
"""Steps 1 and 2: completions of a batch of prompts, and their scores."""

from __future__ import annotations

from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.models.batches import NO_ROWS
from rlhf_fast.models.fsdp import pad_to_ranks
from rlhf_fast.rollout.rollout import Rollout, Sampler, SamplingParams
from rlhf_fast.run.progress import Timer

from .agent import Agent
from .checks import check_rollout
from .config import PPOConfig
from .dynamic_sampling import refill
from .prompts import Prompts
from .rewards import LengthRules
from .settings import given


def collect(
    agent: Agent, prompts: Prompts, options: PPOConfig, step: int, timer: Timer, sampler: Sampler
) -> tuple[Rollout, dict[str, float]]:
    """This rank's samples of a step and their scores; with dynamic sampling, in rounds until enough prompts teach.

    Samples of one prompt are next to each other. The figures are those of dynamic sampling.
    """
    rules = LengthRules.of(options)
    rollout, figures = refill(
        lambda extra: sample(agent, prompts, options, step, extra, timer, sampler),
        lambda rollout: rules.apply(rollout, punish=False),
        options.prompts_per_step,
        given(options.dynamic_sampling),
        agent.rewards.rounding,
    )
    agent.prompts_drawn += options.prompts_per_step * (1 + int(figures.get("sample/extra_rounds", 0)))
    return rollout, figures


def sample(
    agent: Agent, prompts: Prompts, options: PPOConfig, step: int, extra: int, timer: Timer, sampler: Sampler
) -> Rollout:
    """The samples of this rank's share of a round of prompts, and their scores; `extra` 0 is the step's first round.

    A score is one number, by the reward model (read at the last token), by functions, by both, or by people.
    """
    with timer("generate"):
        drawn = prompts.draw(
            agent.prompts_drawn + extra * options.prompts_per_step, options.prompts_per_step, options.seed
        )
        mine = ranks().share(len(drawn), "prompts_per_step")
        params, own = SamplingParams.of(options), drawn[mine]
        rollout = prompts.ranked(own)
        if rollout is None:
            rollout = sampler(
                agent.policy,
                agent.tokenizer,
                [prompts.ids[i] for i in own],
                params,
                seed=options.seed * 1_000_003 + step + extra * 10_000_019,
                samples_per_prompt=options.samples_per_prompt,
                first_prompt=mine.start,
                total_prompts=len(drawn),
            )
            check_rollout(rollout, params, len(own) * options.samples_per_prompt)
    with timer("reward"):
        if rollout.scores is None:
            batch, lines = rollout.batch, [prompts.lines[i] for i in own]
            plan = pad_to_ranks(
                batch.plan(options.micro_batch_size, tokens=options.micro_batch_tokens), agent.policy, NO_ROWS
            )
            scores = ranks().all_or_none(lambda: agent.rewards(rollout, plan, lines))
            rollout.scores, rollout.score_parts = scores.total, scores.parts
    return rollout
