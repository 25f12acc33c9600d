# SPDX-License-Identifier: Apache-2.0
"""Steps 3 to 6: log-probabilities, values and advantages of a step's samples."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.models.batches import Batch, in_micro_batches
from rlhf_fast.models.heads import sequence_scores, token_kl, token_logprobs, token_logprobs_entropy, token_values
from rlhf_fast.rollout.mismatch import Correction, check_engine, weights
from rlhf_fast.rollout.rollout import Rollout
from rlhf_fast.run.progress import Timer

from .agent import Agent, calibrate_critic
from .checks import check_finite, check_logprobs
from .experience import Experience
from .learn import Plans, minibatches
from .objectives.dpo import best_and_worst
from .objectives.objective import AdvantageOptions, Objective, RolloutStats, exact_reference
from .rewards import LengthRules
from .sizes import Sizes


class ScoreOptions(NamedTuple):
    """Options of what is computed from a step's samples before the update."""

    objective: Objective
    advantages: AdvantageOptions
    rules: LengthRules
    temperature: float
    correction: Correction  # of samples by an engine
    every_pair: bool  # learn from all pairs of a prompt's samples, not only from the best and the worst
    bootstrap_truncated: bool
    overlong_filter: bool
    single_update: bool  # no pass for the old log-probabilities: the update has them, as every ratio is 1
    reference: bool  # without it there is no pass for the reference's log-probabilities: nothing reads them


def choose_samples(rollout: Rollout, options: ScoreOptions, prompts: int) -> tuple[Rollout, int]:
    """The samples to learn from, and the unit of consecutive samples that form pairs (1 without pairs).

    `prompts` is the number of prompts on all ranks.
    """
    if not options.objective.pairs:
        return rollout, 1
    samples = len(rollout.texts) * ranks().count // prompts  # two per prompt with feedback
    if options.every_pair:
        return rollout, samples
    return rollout.rows(best_and_worst(options.rules.apply(rollout), samples).cpu()), 2


def plan_minibatches(batch: Batch, unit: int, sizes: Sizes, model: Any, generator: torch.Generator) -> Plans:
    """The micro-batches of each minibatch; `unit` consecutive rows stay together.

    All passes of the step use the same micro-batches, so that the update's first minibatch runs the same matmuls as the
    old log-probabilities, and its ratio is 1 up to the last bits.
    """
    parts = minibatches(len(batch.input_ids), unit, sizes.minibatches, generator)
    return [sizes.micro_batches(batch, model, rows, unit) for rows in parts]


def score(
    agent: Agent, rollout: Rollout, plans: Plans, options: ScoreOptions, timer: Timer, *, calibrate: bool
) -> Experience:
    """Everything computed from the samples before the update; `calibrate` fits the critic's head to them first."""
    batch, plan = rollout.batch, [rows for part in plans for rows in part]
    rewards = options.rules.apply(rollout)
    with timer("old_logprobs"):
        old_logprobs, entropy = policy_logprobs(agent.policy, rollout, plan, options)
    with timer("reference"):
        ref_logprobs = old_logprobs  # a KL of 0, if no KL counts
        if options.reference:
            ref_logprobs = reference_logprobs(agent, batch, plan, old_logprobs, options)
    with timer("critic"):
        values, final_values = torch.zeros_like(old_logprobs), None
        if agent.critic is not None:
            values = critic_values(agent.critic, batch, plan, rewards if calibrate else None)
            if options.bootstrap_truncated:
                final_values = in_micro_batches(lambda part: sequence_scores(agent.critic, part), batch, plan)
    with timer("advantages"):  # of the score at the last token, minus the KL if that is in the reward
        truncated = None if final_values is None else ~rollout.ended
        stats = RolloutStats(
            rewards, old_logprobs, ref_logprobs, values, batch.mask, truncated, final_values, rollout.rounding
        )
        result = options.objective.advantages(stats, options.advantages)
        check_finite("advantages", result.advantages, batch.mask)
        advantages = result.advantages
        if rollout.logprobs is not None:  # losses scale with the advantage, so this weights the policy's loss alone
            advantages = advantages * weights(old_logprobs, rollout.logprobs, batch.mask, options.correction)
    return Experience(
        batch=batch,
        learned=batch.mask & rollout.ended[:, None] if options.overlong_filter else batch.mask,
        rewards=rewards,
        old_logprobs=old_logprobs,
        entropy=entropy,
        ref_logprobs=ref_logprobs,
        values=values,
        advantages=advantages,
        returns=result.returns,
        rounding=rollout.rounding,
    )


def policy_logprobs(policy: Any, rollout: Rollout, plan: list[Tensor], options: ScoreOptions) -> tuple[Tensor, Tensor]:
    """(B, T) log-probabilities of the sampled tokens under the policy that sampled, and (B, T) its entropy.

    Both are zeros if nothing before the update reads them.
    """
    batch = rollout.batch
    old_logprobs, entropy = torch.zeros(2, *batch.mask.shape, device=batch.mask.device)
    if not options.single_update or rollout.logprobs is not None:
        old_logprobs, entropy = logprobs_and_entropy(policy, batch, plan, options.temperature)
        check_logprobs("old_logprobs", old_logprobs, batch.mask)
    if rollout.logprobs is not None:
        check_engine(old_logprobs, rollout.logprobs, batch.mask, policy.dtype, rollout.steps_behind)
    return old_logprobs, entropy


def reference_logprobs(
    agent: Agent, batch: Batch, plan: list[Tensor], old_logprobs: Tensor, options: ScoreOptions
) -> Tensor:
    """(B, T) log-probabilities under the reference; with the exact KL, those whose k1 is it."""
    temperature = options.temperature
    if options.advantages.kl.estimator == "exact":
        exact = in_micro_batches(lambda part: token_kl(agent.policy, agent.reference, part, temperature), batch, plan)
        return exact_reference(old_logprobs, exact)
    with agent.reference() as reference:
        ref_logprobs = in_micro_batches(lambda part: token_logprobs(reference, part, temperature), batch, plan)
    check_logprobs("ref_logprobs", ref_logprobs, batch.mask)
    return ref_logprobs


def critic_values(critic: Any, batch: Batch, plan: list[Tensor], rewards: Tensor | None) -> Tensor:
    """(B, T) values of the states before each token; with `rewards` (B,) the critic's head is first fitted to them."""
    values = in_micro_batches(lambda part: token_values(critic, part), batch, plan)
    if rewards is not None:
        values = calibrate_critic(critic, values, rewards, batch.mask)
    check_finite("values", values, batch.mask)
    return values


def logprobs_and_entropy(policy: Any, batch: Batch, plan: list[Tensor], temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities (B, T) and the entropies (B, T) of the distributions they are from, in one pass."""

    def both(part: Batch) -> Tensor:
        return torch.stack(token_logprobs_entropy(policy, part, temperature), -1)

    logprobs, entropy = in_micro_batches(both, batch, plan).unbind(-1)
    return logprobs.contiguous(), entropy.contiguous()
