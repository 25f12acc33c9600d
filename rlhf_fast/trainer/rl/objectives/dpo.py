# SPDX-License-Identifier: Apache-2.0
"""Direct preference optimisation on pairs of samples: DPO (Rafailov et al. 2023, arXiv 2305.18290) and IPO."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

import rlhf_fast as rf

from .objective import AdvantageOptions, Objective, RolloutStats, by_sum, reward_tolerance, token_advantages

PairLoss = Literal["sigmoid", "ipo"]


class PairOptions(NamedTuple):
    """Options of the loss on pairs."""

    beta: float = 0.1
    loss: PairLoss = "sigmoid"
    label_smoothing: float = 0.0
    samples: int = 2  # of each prompt, next to each other


def best_and_worst(rewards: Tensor, samples: int) -> Tensor:
    """Rows (2P,) of each prompt's best and worst completion, in turn; `rewards` (B,)."""
    groups = rewards.view(-1, samples)
    first = torch.arange(len(groups), device=rewards.device) * samples
    return torch.stack([first + groups.argmax(1), first + groups.argmin(1)], 1).flatten()


def preferred(rewards: Tensor, rounding: Tensor | None = None) -> Tensor:
    """(P, K, K) bool: [p, i, j] is True if sample i of prompt p has a higher reward than j, by more than rounding."""
    gaps = rewards[:, :, None] - rewards[:, None, :]
    tolerance = reward_tolerance(rewards, rounding)
    return gaps > torch.maximum(tolerance[:, :, None], tolerance[:, None, :])


def pair_weights(rewards: Tensor, rounding: Tensor | None = None) -> Tensor:
    """(P, K, K) weight of each pair of samples, the better one first: those of a prompt weigh 1 together, or 0."""
    pairs = preferred(rewards, rounding)
    return pairs / pairs.sum((1, 2), keepdim=True).clamp(min=1)


def pair_loss(log_ratios: Tensor, rewards: Tensor, options: PairOptions, rounding: Tensor | None = None) -> Tensor:
    """The loss summed over prompts.

    Args:
        log_ratios: (P, K) log p / p_ref of completions.
        rewards: (P, K). Every two samples of a prompt are a pair unless their rewards are equal; the pairs of a prompt
            weigh 1 together (Ouyang et al. 2022, eq. 1), a prompt without any weighs 0.
        rounding: (P, K) of the rewards; None: they are exact.

    With m the log-ratio of the better minus that of the worse sample:

        sigmoid  -log sigmoid(beta m)              Rafailov et al. 2023, eq. 7; with label smoothing e it is
                                                   (1 - e) times that - e log sigmoid(-beta m) (Mitchell 2023, cDPO)
        ipo      (m - 1 / (2 beta))^2              Azar et al. 2023 (arXiv 2310.12036), eq. 17
    """
    weights = pair_weights(rewards, rounding)
    margins = log_ratios[:, :, None] - log_ratios[:, None, :]
    if options.loss == "ipo":
        losses = (margins - 1 / (2 * options.beta)) ** 2
    else:
        smoothing, scaled = options.label_smoothing, options.beta * margins
        losses = -(1 - smoothing) * logsigmoid(scaled) - smoothing * logsigmoid(-scaled)
    return (losses * weights).sum()


def pair_figures(log_ratios: Tensor, rewards: Tensor, beta: float, rounding: Tensor | None = None) -> Tensor:
    """(P', 3) of the prompts that have pairs: beta log-ratio of the better and of the worse samples, and the share of
    pairs in which that of the better one is larger. Arguments as `pair_loss`.
    """
    weights = pair_weights(rewards, rounding)
    better, worse = weights.sum(2) * log_ratios, weights.sum(1) * log_ratios
    right = weights * (log_ratios[:, :, None] > log_ratios[:, None, :])
    figures = torch.stack([beta * better.sum(1), beta * worse.sum(1), right.sum((1, 2))], 1)
    return figures[weights.sum((1, 2)) > 0]


def for_metrics(stats: RolloutStats, options: AdvantageOptions) -> rf.Advantages:
    """No advantages, which pairs do not need; the KL is computed for the metrics."""
    return token_advantages(stats.rewards, stats, options, 0.0)


# Section 6 and appendix B: beta 0.1.
DPO = Objective("dpo", for_metrics, by_sum, pairs=True, defaults={"kl_coef": 0.1})
