# SPDX-License-Identifier: Apache-2.0
"""Dr. GRPO: GRPO without its two biases (Liu et al. 2025, arXiv 2503.20783, section 3.2)."""

from __future__ import annotations

import rlhf_fast as rf

from .objective import AdvantageOptions, Objective, RolloutStats, by_constant, centred, token_advantages


def group_centred(stats: RolloutStats, options: AdvantageOptions) -> rf.Advantages:
    """A = r - mean(r), undivided: the deviation favours prompts that are nearly always or nearly never solved."""
    return token_advantages(centred(stats, options).flatten(), stats, options, options.kl.reward_coef)


DR_GRPO = Objective(
    "dr_grpo", group_centred, by_constant, defaults={"kl_coef": 0.0, "kl_in": "loss", "num_minibatches": 1}
)
