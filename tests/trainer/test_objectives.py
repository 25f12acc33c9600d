# SPDX-License-Identifier: Apache-2.0
"""What the objectives make of a batch, against plain Python."""

from __future__ import annotations

import pytest
import torch
from helpers.ppo_runs import replace
from torch import Tensor

from rlhf_fast.trainer import PPOConfig
from rlhf_fast.trainer.rl import objectives


def random_batch() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(7) < torch.tensor([7, 3, 5, 1, 6, 2])[:, None]
    scores = torch.randn(6, generator=generator)
    logprobs, reference, values = (-torch.rand(6, 7, generator=generator) * mask for _ in range(3))
    return scores, logprobs, reference, values, mask


def test_ppo_is_gae_by_hand(config: PPOConfig) -> None:
    scores, logprobs, reference, values, mask = random_batch()
    config = replace(config, kl_coef=0.1, lam=0.9, gamma=0.97, score_clip=0.5)
    paid = objectives.Paid(scores, logprobs, reference, values, mask)
    made = objectives.generalized(paid, config, None)
    advantages = []
    for b in range(6):
        n, carry, following = int(mask[b].sum()), 0.0, 0.0
        row = []
        for t in reversed(range(n)):
            reward = -0.1 * float(logprobs[b, t] - reference[b, t])
            reward += max(-0.5, min(0.5, float(scores[b]))) if t == n - 1 else 0.0
            carry = reward + 0.97 * following - float(values[b, t]) + 0.97 * 0.9 * carry
            following = float(values[b, t])
            row.insert(0, carry)
        advantages += row
    plain = torch.tensor(advantages)
    torch.testing.assert_close(made.returns[mask], plain + values[mask], atol=1e-5, rtol=1e-5)
    white = (plain - plain.mean()) / plain.std()
    torch.testing.assert_close(made.advantages[mask], white, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "rloo"])
def test_critic_free_objectives_compare_samples_of_one_prompt(config: PPOConfig, name: str) -> None:
    scores, logprobs, reference, values, mask = random_batch()
    config = replace(config, kl_coef=0.1, samples_per_prompt=3, score_clip=0.0)
    paid = objectives.Paid(scores, logprobs, reference, values, mask)
    made = objectives.OBJECTIVES[name].advantages(paid, config, None)
    kl = (logprobs - reference) * mask
    totals = scores - 0.1 * kl.sum(1)
    for b in range(6):
        group = totals[b // 3 * 3 : b // 3 * 3 + 3]
        others = (group.sum() - totals[b]) / 2
        baseline, scale = (others, 1.0) if name == "rloo" else (group.mean(), group.std() + 1e-4)
        scale = 1.0 if name == "dr_grpo" else scale
        for t in range(int(mask[b].sum())):
            to_go = scores[b] - 0.1 * kl[b, t:].sum()
            assert abs(made.advantages[b, t] - (to_go - baseline) / scale) < 1e-4
    assert not made.advantages[~mask].any()


def test_the_value_loss_takes_the_larger_error() -> None:
    values, old, returns = torch.tensor([[1.0, 0.1, 5.0]]), torch.zeros(1, 3), torch.tensor([[1.0, 1.0, 0.0]])
    mask = torch.tensor([[True, True, False]])
    clipped = objectives.value_loss(values, old, returns, mask, 0.2)
    torch.testing.assert_close(clipped, torch.tensor(0.5 * (0.8**2 + 0.9**2)))
    torch.testing.assert_close(objectives.value_loss(values, old, returns, mask, 0.0), torch.tensor(0.5 * 0.9**2))
