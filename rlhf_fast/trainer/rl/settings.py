# SPDX-License-Identifier: Apache-2.0
"""The options of a step in bundles, so that each part gets only what it reads. Options are resolved here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch

from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.ops.token_losses import Clip

from .config import PPOOptions
from .objectives import OBJECTIVES
from .objectives.dpo import PairOptions
from .objectives.objective import AdvantageOptions, KLOptions, Objective, RatioLevel

T = TypeVar("T")


@dataclass(frozen=True)
class PolicyLossOptions:
    """Options of the policy's loss on tokens or pairs of samples."""

    objective: Objective
    clip: Clip
    kl: KLOptions
    ratio: RatioLevel
    entropy_coef: float
    temperature: float
    pairs: PairOptions
    on_policy: bool

    @property
    def token_loss(self) -> str:
        """Its name in `rlhf_fast.ops.token_losses`."""
        return "dual_clip" if self.clip.dual < torch.inf else self.objective.token_loss


@dataclass(frozen=True)
class UpdateOptions:
    """Options of an update on a step's samples."""

    loss: PolicyLossOptions
    epochs: int
    longest: int
    cliprange_value: float
    early_stop_kl: float
    max_grad_norm: float | None


def given(value: T | None) -> T:
    """An option that `resolved` has filled in."""
    assert value is not None
    return value


def kl_options(options: PPOOptions, coef: float) -> KLOptions:
    """The KL options with this step's `coef`."""
    return KLOptions(coef, given(options.kl_estimator), given(options.kl_in))


def advantage_options(options: PPOOptions, coef: float, rounding: float) -> AdvantageOptions:
    """`rounding` is that of what scores, see `AdvantageOptions`."""
    return AdvantageOptions(
        kl=kl_options(options, coef),
        samples_per_prompt=options.samples_per_prompt,
        gamma=options.gamma,
        lam=options.lam,
        whiten_rewards=options.whiten_rewards,
        rounding=rounding,
        process_group=ranks().group,
    )


def update_options(options: PPOOptions, coef: float, rounding: float, samples_of_pairs: int = 2) -> UpdateOptions:
    """Of one step; `samples_of_pairs` of a prompt make pairs, where the objective learns from those."""
    kl = kl_options(options, coef)
    loss = PolicyLossOptions(
        objective=OBJECTIVES[options.objective],
        clip=Clip(given(options.cliprange), given(options.cliprange_high), options.dual_clip or torch.inf),
        kl=kl,
        ratio=given(options.importance_ratio),
        entropy_coef=options.entropy_coef,
        temperature=options.temperature,
        pairs=PairOptions(coef, options.dpo_loss, options.label_smoothing, samples_of_pairs, rounding),
        on_policy=learned_from_once(options, kl),
    )
    return UpdateOptions(
        loss=loss,
        epochs=options.epochs,
        longest=options.max_new_tokens,
        cliprange_value=options.cliprange_value,
        early_stop_kl=options.early_stop_kl,
        max_grad_norm=options.max_grad_norm or None,
    )


def learned_from_once(options: PPOOptions, kl: KLOptions) -> bool:
    """True if a step is one update and nothing before it reads the policy's log-probabilities.

    The update's own are then the old ones, and every ratio is 1, so the pass for the old ones is skipped.
    """
    objective = OBJECTIVES[options.objective]
    return (
        options.epochs * given(options.num_minibatches) == 1
        and not objective.pairs
        and not objective.critic
        and kl.reward_coef == 0
        and kl.place != "loss-importance"
        and kl.estimator != "exact"
    )
