# SPDX-License-Identifier: Apache-2.0
"""RLOO: REINFORCE on sequences with the other samples' mean as baseline (Ahmadian et al. 2024, arXiv 2402.14740)."""

from __future__ import annotations

import rlhf_fast as rf

from .objective import (
    AdvantageOptions,
    Objective,
    RolloutStats,
    by_prompt,
    by_sum,
    centred,
    sampled_estimator,
    token_advantages,
)


def leave_one_out(stats: RolloutStats, options: AdvantageOptions) -> rf.Advantages:
    """A = R - mean of R over the prompt's other samples (section 2.2), R = reward - kl_coef * sum of the KL (eq. 3).

    One number per sequence: the completion is one action. r - (sum - r) / (K - 1) = (r - mean) * K / (K - 1).
    """
    estimator = sampled_estimator(options.kl)
    kl = rf.approx_kl(stats.logprobs, stats.ref_logprobs, estimator=estimator, mask=stats.mask)
    kls = by_prompt(kl.sum(1), options)
    groups = centred(stats, options) - options.kl.reward_coef * (kls - kls.mean(1, keepdim=True))
    samples = options.samples_per_prompt
    return token_advantages((groups * samples / (samples - 1)).flatten(), stats, options, 0.0)


RLOO = Objective(
    "rloo", leave_one_out, by_sum, defaults={"kl_coef": 0.05, "importance_ratio": "sequence", "num_minibatches": 1}
)
