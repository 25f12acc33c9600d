# SPDX-License-Identifier: Apache-2.0
"""Steps 3 to 6: log-probabilities, values and advantages of a step's samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.models.batches import NO_ROWS, Batch, in_micro_batches
from rlhf_fast.models.fsdp import pad_to_ranks
from rlhf_fast.models.heads import sequence_scores, token_kl, token_logprobs, token_logprobs_entropy, token_values
from rlhf_fast.rollout.mismatch import Correction, check_engine, weights
from rlhf_fast.rollout.rollout import Rollout
from rlhf_fast.run.progress import Timer

from .agent import Agent, calibrate_critic
from .checks import check_finite, check_logprobs
from .config import PPOConfig
from .experience import Experience
from .learn import Plans, minibatches
from .objectives import OBJECTIVES
from .objectives.dpo import best_and_worst
from .objectives.objective import RolloutStats, exact_reference
from .rewards import LengthRules
from .settings import advantage_options, given, kl_options, learned_from_once


def pairs_of(rollout: Rollout, options: PPOConfig) -> tuple[Rollout, int]:
    """The samples to learn from, and the unit of consecutive samples that form pairs (1 without pairs)."""
    if not OBJECTIVES[options.objective].pairs:
        return rollout, 1
    samples = len(rollout.texts) * ranks().count // options.prompts_per_step  # two per prompt with feedback
    if options.dpo_pairs == "all":
        return rollout, samples
    return rollout.rows(best_and_worst(LengthRules.of(options).apply(rollout), samples).cpu()), 2


def plan_minibatches(batch: Batch, unit: int, options: PPOConfig, model: Any, generator: torch.Generator) -> Plans:
    """The micro-batches of each minibatch; `unit` consecutive rows stay together.

    All passes of the step use the same micro-batches, so that the update's first minibatch runs the same matmuls as the
    old log-probabilities, and its ratio is 1 up to the last bits.
    """
    parts = minibatches(len(batch.input_ids), unit, given(options.num_minibatches), generator)
    size, tokens = options.micro_batch_size, options.micro_batch_tokens
    return [pad_to_ranks(batch.plan(size, rows, unit, tokens=tokens), model, NO_ROWS) for rows in parts]


def score(
    agent: Agent, rollout: Rollout, plans: Plans, options: PPOConfig, timer: Timer, *, calibrate: bool
) -> Experience:
    """Everything computed from the samples before the update; `calibrate` fits the critic's head to them first."""
    batch, plan = rollout.batch, [rows for part in plans for rows in part]
    rewards = LengthRules.of(options).apply(rollout)
    kl = kl_options(options, agent.kl_controller.coef)

    # 3. Log-probabilities of the sampled tokens under the policy that sampled, and its entropy.
    with timer("old_logprobs"):
        old_logprobs, entropy = torch.zeros(2, *batch.mask.shape, device=batch.mask.device)
        if not learned_from_once(options, kl) or rollout.logprobs is not None:
            old_logprobs, entropy = logprobs_and_entropy(agent.policy, batch, plan, options.temperature)
            check_logprobs("old_logprobs", old_logprobs, batch.mask)
        if rollout.logprobs is not None:
            check_engine(old_logprobs, rollout.logprobs, batch.mask, agent.policy.dtype)

    # 4. Log-probabilities under the reference.
    with timer("reference"):
        if kl.estimator == "exact":
            exact = in_micro_batches(
                lambda part: token_kl(agent.policy, agent.reference, part, options.temperature), batch, plan
            )
            ref_logprobs = exact_reference(old_logprobs, exact)
        else:
            with agent.reference() as reference:
                ref_logprobs = in_micro_batches(
                    lambda part: token_logprobs(reference, part, options.temperature), batch, plan
                )
            check_logprobs("ref_logprobs", ref_logprobs, batch.mask)

    # 5. Values of the states before each token, and of the last states of truncated samples.
    with timer("critic"):
        values, final_values = torch.zeros_like(old_logprobs), None
        if agent.critic is not None:
            values = in_micro_batches(lambda part: token_values(agent.critic, part), batch, plan)
            if calibrate:
                values = calibrate_critic(agent.critic, values, rewards, batch.mask)
            check_finite("values", values, batch.mask)
            if options.bootstrap_truncated:
                final_values = in_micro_batches(lambda part: sequence_scores(agent.critic, part), batch, plan)

    # 6. Rewards (the score at the last token, the KL if it is in the reward), advantages and returns.
    with timer("advantages"):
        truncated = None if final_values is None else ~rollout.ended
        stats = RolloutStats(rewards, old_logprobs, ref_logprobs, values, batch.mask, truncated, final_values)
        result = OBJECTIVES[options.objective].advantages(
            stats, advantage_options(options, kl.coef, agent.rewards.rounding)
        )
        check_finite("advantages", result.advantages, batch.mask)
        advantages = result.advantages
        if rollout.logprobs is not None:  # losses scale with the advantage, so this weights the policy's loss alone
            correction = Correction(options.sampler_correction, options.sampler_cap)
            advantages = advantages * weights(old_logprobs, rollout.logprobs, batch.mask, correction)
    learned = batch.mask & rollout.ended[:, None] if options.overlong_filter else batch.mask
    return Experience(
        batch=batch,
        learned=learned,
        rewards=rewards,
        old_logprobs=old_logprobs,
        entropy=entropy,
        ref_logprobs=ref_logprobs,
        values=values,
        advantages=advantages,
        returns=result.returns,
    )


def logprobs_and_entropy(policy: Any, batch: Batch, plan: list[Tensor], temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities (B, T) and the entropies (B, T) of the distributions they are from, in one pass."""

    def both(part: Batch) -> Tensor:
        return torch.stack(token_logprobs_entropy(policy, part, temperature), -1)

    logprobs, entropy = in_micro_batches(both, batch, plan).unbind(-1)
    return logprobs.contiguous(), entropy.contiguous()
