# SPDX-License-Identifier: Apache-2.0
"""What an objective is made of, and the pieces that several of them use.

1. Advantages: a function of a step's `RolloutStats`, (B, T). Samples of one prompt are next to each other.
2. The policy's loss of a token given its advantage: a name in `rlhf_fast.ops.token_losses`, for the fused op to find.
   Or pairs of samples, for `dpo`.
3. The divisor of the sum over tokens, from totals over all ranks and micro-batches of a minibatch, so that neither how
   it is cut nor how many processes share it changes the gradient.
4. The defaults that its paper has for options; docs/objectives.md lists them with their sources.
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
        """What a nat costs in the reward."""
        return self.coef if self.place == "reward" else 0.0

    @property
    def loss_coef(self) -> float:
        """What a nat costs in the policy's loss."""
        return 0.0 if self.place == "reward" else self.coef


class RolloutStats(NamedTuple):
    """What advantages are computed from; samples of one prompt are next to each other."""

    rewards: Tensor  # (B,) of whole completions, before the KL
    logprobs: Tensor  # (B, T) under the policy that sampled
    ref_logprobs: Tensor  # (B, T)
    values: Tensor  # (B, T), 0 without a critic
    mask: Tensor  # (B, T), True = sampled token
    truncated: Tensor | None = None  # (B,) bool: cut off at the length limit, to be continued by `final_values`
    final_values: Tensor | None = None  # (B,) value of the state behind the last token


class AdvantageOptions(NamedTuple):
    """The options that advantages depend on."""

    kl: KLOptions
    samples_per_prompt: int
    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: bool = False
    rounding: float = 0.0  # rewards that differ by at most this times their size (at least 1) are equal
    process_group: Any = None


class Totals(NamedTuple):
    """Of a minibatch, over ranks and micro-batches."""

    tokens: float
    sequences: float
    longest: int  # max_new_tokens


class Objective(NamedTuple):
    """How a name of the option `objective` learns."""

    name: str
    advantages: Callable[[RolloutStats, AdvantageOptions], rf.Advantages]
    divisor: Callable[[Tensor, Totals], Tensor]
    token_loss: str = "ppo"
    critic: bool = False
    compares: bool = True  # samples of one prompt with each other, of which there must be two
    pairs: bool = False  # learns from a better and a worse sample of a prompt, by `dpo.pair_loss`
    defaults: Mapping[str, Any] = {}  # of options that the user leaves open


# ------------------------------------------------------------------------------------------------ advantages


def token_advantages(
    sequence_advantages: Tensor, stats: RolloutStats, options: AdvantageOptions, kl_coef: float, whiten: bool = False
) -> rf.Advantages:
    """Each token has its sequence's advantage (B,), less `kl_coef` times the KL of this token and those that follow.

    A token is charged for the divergence that it can still change, undivided by any spread of rewards.
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
    """The estimator that reads the KL from two log-probabilities; for exact see `exact_reference`."""
    return "k1" if kl.estimator == "exact" else kl.estimator


def exact_reference(logprobs: Tensor, kl: Tensor) -> Tensor:
    """Stands for ref_logprobs where the KL is exact: k1 = logprobs - ref_logprobs is then this KL."""
    return logprobs - kl


# Sums of float32 rewards that would be equal in exact arithmetic differ by a few of its last bits.
FLOAT32_ROUNDING = 1e-6


def equal_up_to_rounding(groups: Tensor, rounding: float = 0.0) -> Tensor:
    """(P,) True where the rewards (P, K) of a prompt differ by rounding only.

    That of float32 is relative to the largest of them; `rounding` is that of the model that scored, relative to the
    largest of them or to 1, the spread of normalised scores. Divided by its own deviation such a difference would
    become advantages of 1 and more.
    """
    return groups.amax(1) - groups.amin(1) <= score_tolerance(groups, rounding)


def score_tolerance(groups: Tensor, rounding: float = 0.0) -> Tensor:
    """(P,) how far apart rewards (P, K) may be and still be equal."""
    size = groups.abs().amax(1)
    return torch.maximum(FLOAT32_ROUNDING * size, rounding * size.clamp(min=1))


def centred(stats: RolloutStats, options: AdvantageOptions) -> Tensor:
    """(P, K) float64 rewards minus their prompt's mean; exactly 0 where they are equal up to rounding."""
    groups = by_prompt(stats.rewards, options)
    alike = equal_up_to_rounding(groups, options.rounding)
    return torch.where(alike[:, None], 0.0, groups - groups.mean(1, keepdim=True))


def by_prompt(values: Tensor, options: AdvantageOptions) -> Tensor:
    """(P, K) float64: the samples of each prompt of (B,)."""
    return values.double().view(-1, options.samples_per_prompt)


# ------------------------------------------------------------------------------------------- divisors (B, 1) or ()


def by_token(mask: Tensor, totals: Totals) -> Tensor:
    """A mean over all tokens."""
    return torch.tensor(max(totals.tokens, 1.0), device=mask.device)


def by_sequence(mask: Tensor, totals: Totals) -> Tensor:
    """A mean over a sequence's tokens, then over sequences: long ones count no more than short ones."""
    return mask.sum(1, keepdim=True).clamp(min=1) * totals.sequences


def by_constant(mask: Tensor, totals: Totals) -> Tensor:
    """The most tokens there could be: a sequence's length does not change what its tokens count."""
    return torch.tensor(totals.sequences * totals.longest, device=mask.device)


def by_sum(mask: Tensor, totals: Totals) -> Tensor:
    """A sum over a sequence's tokens, as its log-probability is, and a mean over sequences."""
    return torch.tensor(totals.sequences, device=mask.device)
