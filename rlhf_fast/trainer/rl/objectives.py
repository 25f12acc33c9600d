# SPDX-License-Identifier: Apache-2.0
"""What RL maximises: one line of `OBJECTIVES` a name, made of three choices that are functions of a few lines.

1. Advantages: from what was sampled, the kl, rewards, advantages and returns of each token, all (B, T). Where the KL is
   in the reward every token is charged for it, so that a token pays for the divergence that follows it.
2. The loss of a token given its advantage: a name in `rlhf_fast.ops.token_losses`, where the fused op finds it. None
   for an objective on whole sequences, which is `dpo_loss`.
3. The divisor of the sum over tokens, from totals over all ranks and micro-batches of a minibatch, so that neither
   how it is cut nor how many processes share it changes the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

import rlhf_fast as rf
from rlhf_fast.rollout.rollout import Rollout

from .config import PPOOptions


class Paid(NamedTuple):
    """A step's samples; those of one prompt are next to each other."""

    scores: Tensor  # (B,)
    logprobs: Tensor  # (B, T)
    ref_logprobs: Tensor  # (B, T)
    values: Tensor  # (B, T)
    mask: Tensor  # (B, T)


class Totals(NamedTuple):
    """Of a minibatch, over ranks and micro-batches."""

    tokens: float
    sequences: float


def payment(rollout: Rollout, config: PPOOptions) -> Tensor:
    """(B,) what each sample earns: its score, less the penalty for one that did not end by itself."""
    assert rollout.scores is not None
    return rollout.scores - config.missing_eos_penalty * ~rollout.ended


def counted(paid: Tensor, config: PPOOptions) -> Tensor:
    """(B,) what of it the advantages see; pairs are compared as they are."""
    clipped = config.score_clip and OBJECTIVES[config.objective].token_loss
    return paid.clamp(-config.score_clip, config.score_clip) if clipped else paid


# ------------------------------------------------------------------------------------------------ advantages


def generalized(paid: Paid, config: PPOOptions, group: Any) -> rf.Advantages:
    """GAE over the critic's values, whitened (Schulman et al. 2016, eq. 16; Ouyang et al. 2022)."""
    return _advantages(paid, config, group, lam=config.lam, whiten=True)


def rewards_to_go(paid: Paid, config: PPOOptions, group: Any) -> rf.Advantages:
    """The rewards still to come, whitened over the whole batch (REINFORCE++, Hu 2025, arXiv 2501.03262)."""
    return _advantages(paid._replace(values=torch.zeros_like(paid.values)), config, group, lam=1.0, whiten=True)


def group_normalised(paid: Paid, config: PPOOptions, group: Any) -> rf.Advantages:
    """Return minus the mean over the prompt's samples, in standard deviations (GRPO, Shao et al. 2024)."""
    made, groups = _by_prompt(paid, config, group)
    scale = groups.std(1, keepdim=True) + 1e-4
    return _against(made, groups.mean(1, keepdim=True).expand_as(groups), paid.mask, scale.expand_as(groups))


def group_centred(paid: Paid, config: PPOOptions, group: Any) -> rf.Advantages:
    """The same without the division, which favours prompts that are easy or hopeless (Dr. GRPO, Liu et al. 2025)."""
    made, groups = _by_prompt(paid, config, group)
    return _against(made, groups.mean(1, keepdim=True).expand_as(groups), paid.mask)


def leave_one_out(paid: Paid, config: PPOOptions, group: Any) -> rf.Advantages:
    """Return minus the mean over the prompt's other samples (RLOO, Ahmadian et al. 2024)."""
    made, groups = _by_prompt(paid, config, group)
    return _against(made, (groups.sum(1, keepdim=True) - groups) / (groups.shape[1] - 1), paid.mask)


def _advantages(paid: Paid, config: PPOOptions, group: Any, lam: float, whiten: bool) -> rf.Advantages:
    return rf.ppo_advantages(
        *paid,
        kl_coef=config.kl_coef if config.kl_in == "reward" else 0.0,
        estimator="k1" if config.kl_estimator == "exact" else config.kl_estimator,  # see `exact_reference`
        gamma=config.gamma,
        lam=lam,
        score_clip=config.score_clip or None,
        whiten=whiten,
        process_group=group,
    )


def _by_prompt(paid: Paid, config: PPOOptions, group: Any) -> tuple[rf.Advantages, Tensor]:
    """Rewards to go (with values 0 and lam 1 GAE gives them) and the completions' whole rewards (P, K)."""
    made = _advantages(paid._replace(values=torch.zeros_like(paid.values)), config, group, lam=1.0, whiten=False)
    return made, made.rewards.sum(1).view(-1, config.samples_per_prompt)


def _against(made: rf.Advantages, baseline: Tensor, mask: Tensor, scale: Tensor | None = None) -> rf.Advantages:
    """Advantages: returns minus a baseline (P, K), over a scale (P, K)."""
    advantages = (made.returns - baseline.reshape(-1, 1)) * mask
    return made._replace(advantages=advantages if scale is None else advantages / scale.reshape(-1, 1))


def exact_reference(logprobs: Tensor, kl: Tensor) -> Tensor:
    """Stands for ref_logprobs where the KL is exact: k1 = logprobs - ref_logprobs is then this KL."""
    return logprobs - kl


# ------------------------------------------------------------------------------------------- divisors (B, 1) or ()


def by_token(mask: Tensor, totals: Totals, config: PPOOptions) -> Tensor:
    """A mean over all tokens."""
    return torch.tensor(totals.tokens, device=mask.device)


def by_sequence(mask: Tensor, totals: Totals, config: PPOOptions) -> Tensor:
    """A mean over a sequence's tokens, then over sequences: long ones count no more than short ones."""
    return mask.sum(1, keepdim=True).clamp(min=1) * totals.sequences


def by_constant(mask: Tensor, totals: Totals, config: PPOOptions) -> Tensor:
    """The most tokens there could be: a sequence's length does not change what its tokens count."""
    return torch.tensor(totals.sequences * config.max_new_tokens, device=mask.device)


def summed(mask: Tensor, totals: Totals, config: PPOOptions) -> Tensor:
    """A sum over a sequence's tokens, as its log-probability is, and a mean over sequences."""
    return torch.tensor(totals.sequences, device=mask.device)


# ------------------------------------------------------------------------------------------------ the table


class Objective(NamedTuple):
    """How a name of the option `objective` learns."""

    advantages: Callable[[Paid, PPOOptions, Any], rf.Advantages]
    token_loss: str | None
    divisor: Callable[[Tensor, Totals, PPOOptions], Tensor]
    critic: bool = False
    compares: bool = True  # samples of one prompt with each other, of which there must be two


OBJECTIVES = {
    "ppo": Objective(generalized, "ppo", by_token, critic=True, compares=False),
    "grpo": Objective(group_normalised, "grpo", by_sequence),
    "dr_grpo": Objective(group_centred, "dr_grpo", by_constant),
    "dapo": Objective(group_normalised, "dapo", by_token),
    "rloo": Objective(leave_one_out, "ppo", summed),
    "reinforce++": Objective(rewards_to_go, "ppo", by_token, compares=False),
    "dpo": Objective(rewards_to_go, None, summed),  # for the metrics alone: it learns from pairs
}


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, cliprange: float) -> Tensor:
    """Half the squared error summed over tokens; the larger of that and of the value clipped near the old one."""
    errors = (values - returns) ** 2
    if cliprange:
        near = old_values + (values - old_values).clamp(-cliprange, cliprange)
        errors = torch.maximum(errors, (near - returns) ** 2)
    return 0.5 * (errors * mask).sum()


def best_and_worst(scores: Tensor, samples: int) -> Tensor:
    """Rows (2P,) of each prompt's best and worst completion, in turn: the pair that online DPO learns from."""
    groups = scores.view(-1, samples)
    first = torch.arange(len(groups), device=scores.device) * samples
    return torch.stack([first + groups.argmax(1), first + groups.argmin(1)], 1).flatten()


def dpo_loss(logprobs: Tensor, ref_logprobs: Tensor, better: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """-log sigmoid(beta * margin) summed over pairs, and the margins (P,); rows are a better and a worse one in turn.

    margin = log p/p_ref of the better minus that of the worse sequence (Rafailov et al. 2023, arXiv 2305.18290, eq. 7).
    `better` (P,) is False where the two are equally good: such a pair teaches nothing.
    """
    ratios = (logprobs - ref_logprobs).sum(1).view(-1, 2)
    margins = beta * (ratios[:, 0] - ratios[:, 1])
    return -(logsigmoid(margins) * better).sum(), margins.detach()
