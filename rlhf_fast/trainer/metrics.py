# SPDX-License-Identifier: Apache-2.0
"""What the samples of a step say about the policy, with the names of TRL and cleanrl, over all ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import rlhf_fast as rf
from rlhf_fast.models.batches import Batch
from rlhf_fast.models.rollout import Rollout
from rlhf_fast.run.ranks import ranks


@dataclass
class Sampled:
    """What an update learns from; all (B, T) but `better`."""

    batch: Batch
    old_logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    made: rf.Advantages
    better: Tensor  # (B,) bool, False = of a pair that is a tie, or not of a pair


def rollout_metrics(rollout: Rollout, scores: Tensor, entropy: Tensor, sampled: Sampled) -> dict[str, float]:
    """Means over all samples of the step.

    objective/kl: nats per sequence. objective/entropy: nats per token. objective/rlhf_reward: score minus the price of
    the KL. val/explained_variance: 1 - Var(returns - values) / Var(returns), over tokens.
    """
    mask, made = sampled.batch.mask, sampled.made
    by_sample = torch.stack([made.kl.sum(1), made.rewards.sum(1)], 1)
    by_completion = torch.stack([scores, rollout.response_mask.sum(1).float(), rollout.ended.float()], 1)
    by_token = torch.stack([entropy[mask], made.returns[mask], sampled.values[mask]], 1)
    kl, rewards = ranks().cat(by_sample).unbind(1)
    scores, lengths, ended = ranks().cat(by_completion).unbind(1)
    entropies, returns, values = ranks().cat(by_token).unbind(1)
    figures = {
        "objective/kl": kl.mean(),
        "objective/entropy": entropies.mean(),
        "objective/scores": scores.mean(),
        "objective/scores_std": scores.std(),
        "objective/rlhf_reward": rewards.mean(),
        "val/explained_variance": 1 - (returns - values).var() / returns.var().clamp(min=1e-8),
        "val/mean": values.mean(),
        "sample/length": lengths.mean(),
        "sample/ended": ended.mean(),
    }
    return {name: float(value) for name, value in figures.items()}
