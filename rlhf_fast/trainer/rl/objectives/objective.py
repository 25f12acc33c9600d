# SPDX-License-Identifier: Apache-2.0
"""The parts of an objective, and functions that several of them share.

1. Advantages: a function of a step's `RolloutStats`, (B, T). Samples of one prompt are next to each other.
2. The policy's loss of a token given its advantage: a name in `rlhf_fast.ops.token_losses`, for the fused op.
   For `dpo`, of pairs of samples.
3. The divisor of the sum over tokens, from totals over all ranks and micro-batches of a minibatch, so that neither
   the split into micro-batches nor the number of processes changes the gradient.
4. The defaults of options in its paper; docs/objectives.md lists them with their sources.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import rlhf_fast as rf

RatioLevel = Literal["token", "sequence", "sequence-mean"]
KLPlace = Literal["reward", "loss", "loss-straight-through", "loss-importance"]
KLEstimator = Literal["k1", "k2", "k3", "exact"]


class KLOptions(NamedTuple):
    """The KL from the reference, as the options `kl_coef`, `kl_estimator` and `kl_in` say."""

    coef: float
    estimator: KLEstimator
    place: KLPlace

    @property
    def reward_coef(self) -> float:
        """Coefficient of the KL in the reward."""
        return self.coef if self.place == "reward" else 0.0

    @property
    def loss_coef(self) -> float:
        """Coefficient of the KL in the policy's loss."""
        return 0.0 if self.place == "reward" else self.coef


class RolloutStats(NamedTuple):
    """Inputs of advantages; samples of one prompt are next to each other."""

    rewards: Tensor  # (B,) of completions, before the KL
    logprobs: Tensor  # (B, T) under the policy that sampled
    ref_logprobs: Tensor  # (B, T)
    values: Tensor  # (B, T), 0 without a critic
    mask: Tensor  # (B, T), True = sampled token
    truncated: Tensor | None = (
        None  # (B,) bool: ended by the length limit; `final_values` are then the bootstrap values
    )
    final_values: Tensor | None = None  # (B,) value of the state after the last token
    rounding: Tensor | None = None  # (B,) each reward is exact up to this; None: exact


class AdvantageOptions(NamedTuple):
    """The options that advantages depend on."""

    kl: KLOptions
    samples_per_prompt: int
    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: bool = False
    process_group: Any = None


class Totals(NamedTuple):
    """Totals of a minibatch over ranks and micro-batches."""

    tokens: float
    sequences: float
    longest: int  # max_new_tokens


class Objective(NamedTuple):
    """A choice of the option `objective`."""

    name: str
    advantages: Callable[[RolloutStats, AdvantageOptions], rf.Advantages]
    divisor: Callable[[Tensor, Totals], Tensor]
    token_loss: str = "ppo"
    critic: bool = False
    compares: bool = True  # compares samples of one prompt, so there must be two
    pairs: bool = False  # learns from pairs of samples of a prompt, by `dpo.pair_loss`
    defaults: Mapping[str, Any] = {}  # of options that the user did not set


# ------------------------------------------------------------------------------------------------ advantages


def token_advantages(
    sequence_advantages: Tensor, stats: RolloutStats, options: AdvantageOptions, kl_coef: float, whiten: bool = False
) -> rf.Advantages:
    """Each token's advantage is its sequence's (B,) minus `kl_coef` times the KL of this token and those that follow.

    So a token is penalised only for divergence that it can still change. The penalty is not divided by a deviation.
    """
    return rf.ppo_advantages(
        sequence_advantages.to(stats.logprobs.dtype),
        stats.logprobs,
        stats.ref_logprobs,
        torch.zeros_like(stats.values),
        stats.mask,
        kl_coef=kl_coef,
        estimator=sampled_estimator(options.kl),
        gamma=options.gamma,
        lam=1.0,
        whiten=whiten,
        process_group=options.process_group,
    )


def sampled_estimator(kl: KLOptions) -> str:
    """The estimator of the KL from two log-probabilities; for exact see `exact_reference`."""
    return "k1" if kl.estimator == "exact" else kl.estimator


def exact_reference(logprobs: Tensor, kl: Tensor) -> Tensor:
    """Used as ref_logprobs if the KL is exact: k1 = logprobs - ref_logprobs then equals `kl`."""
    return logprobs - kl


# Sums of float32 rewards that are equal in exact arithmetic differ in their last few bits.
FLOAT32_ROUNDING = 1e-6


def equal_up_to_rounding(groups: Tensor, rounding: Tensor | None = None) -> Tensor:
    """(P,) True where the rewards (P, K) of a prompt differ by rounding only.

    Divided by its own deviation such a difference would become advantages of 1 and more.
    """
    return groups.amax(1) - groups.amin(1) <= reward_tolerance(groups, rounding).amax(1)


def reward_tolerance(rewards: Tensor, rounding: Tensor | None = None) -> Tensor:
    """The largest difference of each reward from an equal one: float32's, or its `rounding`, that of the model."""
    of_sums = FLOAT32_ROUNDING * rewards.abs()
    return of_sums if rounding is None else torch.maximum(of_sums, rounding.to(rewards.dtype))


def centred(stats: RolloutStats, options: AdvantageOptions) -> Tensor:
    """(P, K) float64 rewards minus their prompt's mean; exactly 0 if they are equal up to rounding."""
    groups = by_prompt(stats.rewards, options)
    alike = equal_up_to_rounding(groups, None if stats.rounding is None else by_prompt(stats.rounding, options))
    return torch.where(alike[:, None], 0.0, groups - groups.mean(1, keepdim=True))


def by_prompt(values: Tensor, options: AdvantageOptions) -> Tensor:
    """(P, K) float64: the samples of each prompt of (B,)."""
    return values.double().view(-1, options.samples_per_prompt)


# ------------------------------------------------------------------------------------------- divisors (B, 1) or ()


def by_token(mask: Tensor, totals: Totals) -> Tensor:
    """A mean over all tokens."""
    return torch.tensor(max(totals.tokens, 1.0), device=mask.device)


def by_sequence(mask: Tensor, totals: Totals) -> Tensor:
    """A mean over a sequence's tokens, then over sequences: long sequences count as much as short ones."""
    return mask.sum(1, keepdim=True).clamp(min=1) * totals.sequences


def by_constant(mask: Tensor, totals: Totals) -> Tensor:
    """The largest possible number of tokens: a sequence's length does not change the weight of its tokens."""
    return torch.tensor(totals.sequences * totals.longest, device=mask.device)


def by_sum(mask: Tensor, totals: Totals) -> Tensor:
    """A sum over a sequence's tokens, as its log-probability is, and a mean over sequences."""
    return torch.tensor(totals.sequences, device=mask.device)
