# SPDX-License-Identifier: Apache-2.0
"""Direct preference optimisation on pairs of samples: DPO (Rafailov et al. 2023, arXiv 2305.18290) and IPO."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

import rlhf_fast as rf

from .objective import AdvantageOptions, Objective, RolloutStats, by_sum, score_tolerance, token_advantages

PairLoss = Literal["sigmoid", "ipo"]


class PairOptions(NamedTuple):
    """Options of the loss on pairs."""

    beta: float = 0.1
    loss: PairLoss = "sigmoid"
    label_smoothing: float = 0.0
    samples: int = 2  # of each prompt, next to each other
    rounding: float = 0.0  # as in AdvantageOptions


def best_and_worst(rewards: Tensor, samples: int) -> Tensor:
    """Rows (2P,) of each prompt's best and worst completion, in turn; `rewards` (B,)."""
    groups = rewards.view(-1, samples)
    first = torch.arange(len(groups), device=rewards.device) * samples
    return torch.stack([first + groups.argmax(1), first + groups.argmin(1)], 1).flatten()


def preferred(rewards: Tensor, rounding: float = 0.0) -> Tensor:
    """(P, K, K) bool: [p, i, j] is True if sample i of prompt p has a higher reward than j, by more than rounding."""
    gaps = rewards[:, :, None] - rewards[:, None, :]
    return gaps > score_tolerance(rewards, rounding)[:, None, None]


def pair_loss(log_ratios: Tensor, rewards: Tensor, options: PairOptions) -> tuple[Tensor, Tensor]:
    """The loss summed over prompts, and the sum over prompts of the share of pairs that are in the right order.

    Args:
        log_ratios: (P, K) log p / p_ref of completions.
        rewards: (P, K). Every two samples of a prompt are a pair unless their rewards are equal; the pairs of a prompt
            weigh 1 together (Ouyang et al. 2022, eq. 1), a prompt without any weighs 0.

    With m the log-ratio of the better minus that of the worse sample:

        sigmoid  -log sigmoid(beta m)              Rafailov et al. 2023, eq. 7; with label smoothing e it is
                                                   (1 - e) times that - e log sigmoid(-beta m) (Mitchell 2023, cDPO)
        ipo      (m - 1 / (2 beta))^2              Azar et al. 2023 (arXiv 2310.12036), eq. 17
    """
    pairs = preferred(rewards, options.rounding)
    weights = pairs / pairs.sum((1, 2), keepdim=True).clamp(min=1)
    margins = log_ratios[:, :, None] - log_ratios[:, None, :]
    if options.loss == "ipo":
        losses = (margins - 1 / (2 * options.beta)) ** 2
    else:
        smoothing, scaled = options.label_smoothing, options.beta * margins
        losses = -(1 - smoothing) * logsigmoid(scaled) - smoothing * logsigmoid(-scaled)
    right = (margins.detach() > 0) * weights
    return (losses * weights).sum(), right.sum()


def for_metrics(stats: RolloutStats, options: AdvantageOptions) -> rf.Advantages:
    """No advantages, which pairs do not need; the KL is computed for the metrics."""
    return token_advantages(stats.rewards, stats, options, 0.0)


# Section 6 and appendix B: beta 0.1.
DPO = Objective("dpo", for_metrics, by_sum, pairs=True, defaults={"kl_coef": 0.1})
