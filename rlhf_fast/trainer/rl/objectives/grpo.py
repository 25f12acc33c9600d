# SPDX-License-Identifier: Apache-2.0
"""GRPO: DeepSeekMath (Shao et al. 2024, arXiv 2402.03300)."""

from __future__ import annotations

import rlhf_fast as rf

from .objective import AdvantageOptions, Objective, RolloutStats, by_sequence, centred, token_advantages

EPS = 1e-4  # TRL's and verl's: a deviation far below it is not scaled up to 1


def group_normalised(stats: RolloutStats, options: AdvantageOptions) -> rf.Advantages:
    """A = (r - mean(r)) / std(r) over the prompt's samples, for each of a sample's tokens (section 4.1.2).

    r is the reward alone. A KL in the reward, which the paper does not have, is subtracted token by token after the
    normalisation, as OpenRLHF does: a prompt whose samples earn the same would else learn from the KL's noise.
    """
    groups = centred(stats, options)
    scaled = groups / (groups.square().sum(1, keepdim=True) / (groups.shape[1] - 1)).sqrt().add(EPS)
    return token_advantages(scaled.flatten(), stats, options, options.kl.reward_coef)


GRPO = Objective(
    "grpo",
    group_normalised,
    by_sequence,
    defaults={"kl_coef": 0.04, "kl_in": "loss", "kl_estimator": "k3", "num_minibatches": 1},
)
