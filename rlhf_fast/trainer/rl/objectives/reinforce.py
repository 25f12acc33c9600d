# SPDX-License-Identifier: Apache-2.0
"""REINFORCE++: rewards to go normalised over the whole batch, no critic (Hu 2025, arXiv 2501.03262)."""

from __future__ import annotations

import rlhf_fast as rf

from .objective import AdvantageOptions, Objective, RolloutStats, by_token, centred, token_advantages


def rewards_to_go(stats: RolloutStats, options: AdvantageOptions) -> rf.Advantages:
    """The reward minus the KL of this and later tokens, whitened over the batch."""
    return token_advantages(stats.rewards, stats, options, options.kl.reward_coef, whiten=True)


def centred_rewards_to_go(stats: RolloutStats, options: AdvantageOptions) -> rf.Advantages:
    """REINFORCE++-baseline: minus the prompt's mean, then whitened over the batch, not over the prompt."""
    return token_advantages(centred(stats, options).flatten(), stats, options, options.kl.reward_coef, whiten=True)


REINFORCE = Objective(
    "reinforce++", rewards_to_go, by_token, compares=False, defaults={"kl_coef": 0.01, "score_clip": 5.0}
)
REINFORCE_BASELINE = Objective(
    "reinforce++-baseline",
    centred_rewards_to_go,
    by_token,
    defaults={"kl_coef": 0.01, "kl_in": "loss", "kl_estimator": "k2"},
)
