# SPDX-License-Identifier: Apache-2.0
"""PPO with a critic: Schulman et al. 2017 (arXiv 1707.06347); as RLHF: Ouyang et al. 2022 (arXiv 2203.02155)."""

from __future__ import annotations

import torch
from torch import Tensor

import rlhf_fast as rf

from .objective import AdvantageOptions, Objective, RolloutStats, by_token, sampled_estimator


def generalized(stats: RolloutStats, options: AdvantageOptions) -> rf.Advantages:
    """GAE over the critic's values (Schulman et al. 2016, arXiv 1506.02438, eq. 16), whitened over all ranks."""
    if options.whiten_rewards or stats.final_values is not None:
        return _by_parts(stats, options)
    return rf.ppo_advantages(
        stats.rewards,
        stats.logprobs,
        stats.ref_logprobs,
        stats.values,
        stats.mask,
        kl_coef=options.kl.reward_coef,
        estimator=sampled_estimator(options.kl),
        gamma=options.gamma,
        lam=options.lam,
        process_group=options.process_group,
    )


def _by_parts(stats: RolloutStats, options: AdvantageOptions) -> rf.Advantages:
    """The same with rewards divided by their deviation, or with bootstrap values of truncated samples."""
    mask, group = stats.mask, options.process_group
    kl = rf.approx_kl(stats.logprobs, stats.ref_logprobs, estimator=sampled_estimator(options.kl), mask=mask)
    last = mask & (mask.long().cumsum(1) == mask.sum(1, keepdim=True))
    rewards = torch.where(last, stats.rewards[:, None], 0.0) - options.kl.reward_coef * kl
    scaled = (
        rf.masked_whiten(rewards, mask, shift_mean=False, process_group=group) if options.whiten_rewards else rewards
    )
    advantages, returns = rf.gae(
        scaled,
        stats.values,
        mask=mask,
        truncated=stats.truncated,
        bootstrap_values=stats.final_values,
        gamma=options.gamma,
        lam=options.lam,
    )
    return rf.Advantages(kl, rewards, rf.masked_whiten(advantages, mask, process_group=group), returns)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, cliprange: float) -> Tensor:
    """Half the squared error summed over tokens; the larger of that and of the value clipped near the old one."""
    errors = (values - returns) ** 2
    if cliprange:
        near = old_values + (values - old_values).clamp(-cliprange, cliprange)
        errors = torch.maximum(errors, (near - returns) ** 2)
    return 0.5 * (errors * mask).sum()


PPO = Objective("ppo", generalized, by_token, critic=True, compares=False, defaults={"score_clip": 5.0})
