# SPDX-License-Identifier: Apache-2.0
"""What PPO maximises. Another objective is one function here and its name in `ADVANTAGES`.

An advantage function gets scores (B,) and logprobs, ref_logprobs, values, mask (B, T), rows of one prompt next to each
other, and returns `rf.Advantages(kl, rewards, advantages, returns)`, all (B, T). Every one of them charges the KL per
token, so that a token pays for the divergence that follows it. The losses are sums over tokens: the caller divides by
the number of tokens in the whole minibatch, however it is cut into micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import rlhf_fast as rf

from .config import PPOOptions

AdvantageFunction = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, PPOOptions], rf.Advantages]


def ppo(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, mask: Tensor, config: PPOOptions
) -> rf.Advantages:
    """GAE over the critic's values, whitened (Schulman et al. 2016, eq. 16; Ouyang et al. 2022)."""
    return rf.ppo_advantages(
        scores,
        logprobs,
        ref_logprobs,
        values,
        mask,
        kl_coef=config.kl_coef,
        estimator=config.kl_estimator,
        gamma=config.gamma,
        lam=config.lam,
        score_clip=config.score_clip or None,
        whiten=True,
    )


def grpo(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, mask: Tensor, config: PPOOptions
) -> rf.Advantages:
    """Return minus the mean over the prompt's samples, in standard deviations (Shao et al. 2024; KL in the reward)."""
    made = _rewards_to_go(scores, logprobs, ref_logprobs, mask, config)
    groups = _totals(made).view(-1, config.samples_per_prompt)  # (P, K)
    mean, std = (groups.mean(1).repeat_interleave(groups.shape[1]), groups.std(1).repeat_interleave(groups.shape[1]))
    return made._replace(advantages=(made.returns - mean[:, None]) / (std[:, None] + 1e-4) * mask)


def rloo(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, mask: Tensor, config: PPOOptions
) -> rf.Advantages:
    """Return minus the mean over the prompt's other samples (Ahmadian et al. 2024)."""
    made = _rewards_to_go(scores, logprobs, ref_logprobs, mask, config)
    groups = _totals(made).view(-1, config.samples_per_prompt)  # (P, K)
    others = (groups.sum(1, keepdim=True) - groups) / (groups.shape[1] - 1)
    return made._replace(advantages=(made.returns - others.view(-1, 1)) * mask)


ADVANTAGES: dict[str, AdvantageFunction] = {"ppo": ppo, "grpo": grpo, "rloo": rloo}
NEEDS_CRITIC = {"ppo"}


def _rewards_to_go(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, config: PPOOptions
) -> rf.Advantages:
    """With values 0 and lam 1 the returns of GAE are the rewards still to come."""
    return rf.ppo_advantages(
        scores,
        logprobs,
        ref_logprobs,
        torch.zeros_like(logprobs),
        mask,
        kl_coef=config.kl_coef,
        estimator=config.kl_estimator,
        gamma=config.gamma,
        lam=1.0,
        score_clip=config.score_clip or None,
        whiten=False,
    )


def _totals(made: rf.Advantages) -> Tensor:
    """(B,) sum of a completion's rewards."""
    return made.rewards.sum(1)


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, cliprange: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate summed over tokens (Schulman et al. 2017, eq. 7), and sums over tokens for the metrics."""
    log_ratio = (logprobs - old_logprobs) * mask
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    with torch.no_grad():
        sums = {
            "policy/ratio": (ratio * mask).sum(),
            "policy/approxkl_avg": ((ratio - 1 - log_ratio) * mask).sum(),
            "policy/clipfrac_avg": ((clipped > plain) & mask).sum(),
        }
    return (torch.maximum(plain, clipped) * mask).sum(), sums


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, cliprange: float) -> Tensor:
    """Half the squared error summed over tokens; the larger of that and of the value clipped near the old one."""
    errors = (values - returns) ** 2
    if cliprange:
        near = old_values + (values - old_values).clamp(-cliprange, cliprange)
        errors = torch.maximum(errors, (near - returns) ** 2)
    return 0.5 * (errors * mask).sum()
