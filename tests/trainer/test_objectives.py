# SPDX-License-Identifier: Apache-2.0
"""Advantages of every objective against the formulas of its paper, and the defaults it brings."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_fast.trainer import PPOConfig
from rlhf_fast.trainer.rl.config import COMMON_DEFAULTS
from rlhf_fast.trainer.rl.objectives import OBJECTIVES
from rlhf_fast.trainer.rl.objectives.objective import AdvantageOptions, KLOptions, RolloutStats, equal_up_to_rounding
from rlhf_fast.trainer.rl.objectives.ppo import value_loss
from rlhf_fast.trainer.rl.settings import Settings

GROUPS = sorted(name for name, found in OBJECTIVES.items() if found.compares and not found.pairs)


def random_batch(length: int = 7, rewards: Tensor | None = None) -> RolloutStats:
    """Two prompts with three samples each."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([length, 3, 5, 1, 6, 2]).clamp(max=length)
    mask = torch.arange(length) < lengths[:, None]
    found = torch.randn(6, generator=generator) if rewards is None else rewards
    logprobs, reference, values = (-torch.rand(6, length, generator=generator) * mask for _ in range(3))
    return RolloutStats(found, logprobs, reference, values, mask)


def options(coef: float = 0.1, place: Any = "reward", estimator: Any = "k1", **values: Any) -> AdvantageOptions:
    return AdvantageOptions(KLOptions(coef, estimator, place), samples_per_prompt=3, **values)


def by_hand(
    stats: RolloutStats, lam: float, gamma: float, coef: float, final: Tensor | None = None, estimator: str = "k1"
) -> Tensor:
    """GAE token by token, masked tokens left out; `final` is the value of what would have followed each sample."""
    kls = kl_by_hand(stats, estimator)
    found = []
    for b in range(6):
        n, carry = int(stats.mask[b].sum()), 0.0
        following = 0.0 if final is None else float(final[b])
        row: list[float] = []
        for t in reversed(range(n)):
            reward = -coef * float(kls[b, t])
            reward += float(stats.rewards[b]) if t == n - 1 else 0.0
            carry = reward + gamma * following - float(stats.values[b, t]) + gamma * lam * carry
            following = float(stats.values[b, t])
            row.insert(0, carry)
        found += row
    return torch.tensor(found)


def kl_by_hand(stats: RolloutStats, estimator: str) -> Tensor:
    gap = stats.logprobs - stats.ref_logprobs
    return {"k1": gap, "k2": 0.5 * gap**2, "k3": (-gap).exp() - 1 + gap}[estimator] * stats.mask


def whitened(values: Tensor) -> Tensor:
    return (values - values.mean()) / values.std()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_ppo_is_gae_by_hand(estimator: str) -> None:
    stats = random_batch()
    found = OBJECTIVES["ppo"].advantages(stats, options(gamma=0.97, lam=0.9, estimator=estimator))
    plain = by_hand(stats, lam=0.9, gamma=0.97, coef=0.1, estimator=estimator)
    torch.testing.assert_close(found.returns[stats.mask], plain + stats.values[stats.mask], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.advantages[stats.mask], whitened(plain), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_reinforce_is_the_discounted_reward_to_go(estimator: str) -> None:
    """Whitened over the batch; Hu 2025, section 3."""
    stats = random_batch()
    found = OBJECTIVES["reinforce++"].advantages(stats, options(gamma=0.97, estimator=estimator))
    plain = by_hand(
        stats._replace(values=torch.zeros_like(stats.values)), lam=1.0, gamma=0.97, coef=0.1, estimator=estimator
    )
    torch.testing.assert_close(found.advantages[stats.mask], whitened(plain), atol=1e-5, rtol=1e-5)


def test_a_truncated_sample_goes_on_with_the_critics_value() -> None:
    final = torch.tensor([2.0, 0.0, -1.0, 0.0, 0.5, 3.0])
    stats = random_batch()._replace(truncated=final != 0, final_values=final)
    found = OBJECTIVES["ppo"].advantages(stats, options(gamma=0.97, lam=0.9, estimator="k2"))
    plain = by_hand(stats, lam=0.9, gamma=0.97, coef=0.1, final=final, estimator="k2")
    torch.testing.assert_close(found.advantages[stats.mask], whitened(plain), atol=1e-5, rtol=1e-5)


def test_whitened_rewards_are_divided_by_their_deviation() -> None:
    stats = random_batch()
    found = OBJECTIVES["ppo"].advantages(stats, options(lam=0.9, whiten_rewards=True))
    rewards = found.rewards[stats.mask]
    returns = by_hand(stats._replace(values=torch.zeros_like(stats.values)), lam=1.0, gamma=1.0, coef=0.1)
    first = int(stats.mask[0].sum())
    assert float(returns[0]) == pytest.approx(float(rewards[:first].sum()), abs=1e-5)  # the metric is of plain rewards
    mean, scaled = rewards.mean(), torch.zeros_like(found.rewards)
    scaled[stats.mask] = (rewards - mean) / rewards.std() + mean
    errors = torch.zeros(6, 7)
    for b in range(6):
        n, carry, following = int(stats.mask[b].sum()), 0.0, 0.0
        for t in reversed(range(n)):
            carry = float(scaled[b, t]) + following - float(stats.values[b, t]) + 0.9 * carry
            errors[b, t], following = carry, float(stats.values[b, t])
    torch.testing.assert_close(found.advantages[stats.mask], whitened(errors[stats.mask]), atol=1e-4, rtol=1e-4)


def paper_advantages(name: str, stats: RolloutStats, coef: float, estimator: str) -> Tensor:
    """(B, T) by the paper's formula, the KL charged in the reward."""
    kl = kl_by_hand(stats, estimator).double()
    rewards = stats.rewards.double()
    found = torch.zeros_like(kl)
    for b in range(6):
        group = slice(b // 3 * 3, b // 3 * 3 + 3)
        scores, whole = rewards[group], rewards[group] - coef * kl[group].sum(1)
        for t in range(int(stats.mask[b].sum())):
            to_go = coef * kl[b, t:].sum()
            if name == "rloo":  # Ahmadian et al. 2024: one number a sequence, the others' mean as baseline
                found[b, t] = whole[b % 3] - (whole.sum() - whole[b % 3]) / 2
            elif name in ("dr_grpo", "reinforce++-baseline"):
                found[b, t] = scores[b % 3] - scores.mean() - to_go
            else:
                found[b, t] = (scores[b % 3] - scores.mean()) / (scores.std() + 1e-4) - to_go
    return found


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize(("place", "estimator"), [("reward", "k1"), ("reward", "k2"), ("loss", "k1")])
def test_groups_are_compared_by_their_scores_alone(name: str, place: str, estimator: str) -> None:
    stats = random_batch()
    found = OBJECTIVES[name].advantages(stats, options(place=place, estimator=estimator)).advantages
    wanted = paper_advantages(name, stats, 0.1 if place == "reward" else 0.0, estimator)[stats.mask]
    if name == "reinforce++-baseline":
        wanted = whitened(wanted)
    torch.testing.assert_close(found[stats.mask].double(), wanted, atol=1e-4, rtol=1e-4)
    assert not found[~stats.mask].any()


@pytest.mark.parametrize("name", [name for name in GROUPS if name != "reinforce++-baseline"])
def test_in_a_group_of_equal_scores_the_kl_is_not_amplified(name: str) -> None:
    """The last token is charged for its own KL at most (rloo: for the sequence's), whatever the group's spread."""
    stats = random_batch(length=100, rewards=torch.full((6,), 0.5))
    for coef in (0.5, 0.05, 0.005):
        kl = (stats.logprobs - stats.ref_logprobs) * stats.mask
        found = OBJECTIVES[name].advantages(stats, options(coef=coef)).advantages
        assert float(found.abs().max()) <= 1.5 * coef * float(kl.abs().sum(1).max()) + 1e-6
        free = OBJECTIVES[name].advantages(stats, options(coef=coef, place="loss")).advantages
        assert not free.any()


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize(
    ("rewards", "rounding"),
    [
        ([0.1 + 0.2, 0.3, 0.3, 7 * 0.95, 6.65, 0.95 * 7], 0.0),  # float32 sums
        ([1.0, 1.0078125, 1.0, -0.0009765625, 0.0, 0.00390625], 2.0**-6),  # bfloat16 scores of the same completion
    ],
)
def test_equal_up_to_rounding_is_equal(name: str, rewards: list[float], rounding: float) -> None:
    scores = torch.tensor(rewards)
    scores[1] = torch.nextafter(scores[1], torch.tensor(9.0))
    stats = random_batch(rewards=scores)._replace(rounding=torch.full((6,), rounding))
    assert not OBJECTIVES[name].advantages(stats, options(place="loss")).advantages.any()
    assert equal_up_to_rounding(scores.view(2, 3), torch.full((2, 3), rounding)).all()


def test_small_differences_are_still_differences() -> None:
    groups = torch.tensor([[0.0, 1e-3, 0.0], [1e-9, 2e-9, 0.0], [100.0, 100.001, 100.0], [0.0, 0.95, 0.95]])
    assert not equal_up_to_rounding(groups).any()
    assert equal_up_to_rounding(groups, rounding=torch.full((4, 3), 2.0**-6)).tolist() == [True, True, True, False]


@pytest.mark.parametrize("rewards", [[1.0, 1.00001, 1.0], [1.0, 1.001, 0.999], [0.0, 1.0, 0.5]])
def test_groups_of_little_spread_are_those_of_the_formula(rewards: list[float]) -> None:
    """In float64, with the documented 1e-4 beside the deviation: rounding of float32 adds nothing (verl #6348)."""
    stats = random_batch(rewards=torch.tensor([*rewards, *rewards]))
    exact = stats.rewards[:3].double()
    wanted = (exact - exact.mean()) / (exact.std() + 1e-4)
    found = OBJECTIVES["grpo"].advantages(stats, options(place="loss")).advantages
    torch.testing.assert_close(found[:3, 0].double(), wanted, atol=1e-6, rtol=2e-4)


def test_the_value_loss_takes_the_larger_error() -> None:
    values, old, returns = torch.tensor([[1.0, 0.1, 5.0]]), torch.zeros(1, 3), torch.tensor([[1.0, 1.0, 0.0]])
    mask = torch.tensor([[True, True, False]])
    clipped = value_loss(values, old, returns, mask, 0.2)
    torch.testing.assert_close(clipped, torch.tensor(0.5 * (0.8**2 + 0.9**2)))
    torch.testing.assert_close(value_loss(values, old, returns, mask, 0.0), torch.tensor(0.5 * 0.9**2))


# What the papers say, written down apart from the code.
PAPER = {
    "ppo": {"kl_coef": 0.05, "kl_in": "reward", "kl_estimator": "k1", "cliprange": 0.2, "score_clip": 5.0},
    "grpo": {"kl_coef": 0.04, "kl_in": "loss", "kl_estimator": "k3", "num_minibatches": 1, "score_clip": 0.0},
    "dr_grpo": {"kl_coef": 0.0},
    "dapo": {
        "kl_coef": 0.0,
        "cliprange": 0.2,
        "cliprange_high": 0.28,
        "overlong_filter": True,
        "overlong_penalty": 1.0,
    },
    "cispo": {"kl_coef": 0.0, "cliprange": 1.0, "cliprange_high": 4.0},
    "gspo": {"kl_coef": 0.0, "cliprange": 3e-4, "cliprange_high": 4e-4, "importance_ratio": "sequence-mean"},
    "rloo": {"kl_coef": 0.05, "kl_in": "reward", "kl_estimator": "k1", "importance_ratio": "sequence"},
    "reinforce++": {"kl_coef": 0.01, "kl_in": "reward", "kl_estimator": "k1"},
    "reinforce++-baseline": {"kl_coef": 0.01, "kl_in": "loss", "kl_estimator": "k2"},
    "dpo": {"kl_coef": 0.1, "kl_in": "reward"},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_has_the_defaults_of_its_paper(name: str) -> None:
    config = PPOConfig(objective=name, reward_model="reward", prompts_file="prompts.jsonl")
    config.validate()
    resolved = config.resolved()
    assert {option: getattr(resolved, option) for option in PAPER[name]} == PAPER[name]
    assert all(getattr(resolved, option) is not None for option in [*COMMON_DEFAULTS, "kl_estimator", "cliprange_high"])
    assert resolved.resolved() == resolved
    assert resolved.dynamic_sampling == (10 if name == "dapo" else 0)


def test_an_option_that_is_given_is_kept() -> None:
    config = PPOConfig(objective="dapo", cliprange=0.1, dynamic_sampling=0, overlong_filter=False, kl_in="reward")
    resolved = config.resolved()
    assert (resolved.cliprange, resolved.cliprange_high, resolved.dynamic_sampling) == (0.1, 0.28, 0)
    assert resolved.overlong_filter is False and (resolved.kl_in, resolved.kl_estimator) == ("reward", "k1")
    assert PPOConfig(cliprange=0.3).resolved().cliprange_high == 0.3
    assert PPOConfig(objective="gspo", prompts_per_step=3, samples_per_prompt=2).resolved().num_minibatches == 2
    assert math.isclose(PPOConfig(objective="grpo", kl_in="loss-importance").resolved().kl_coef or 0, 0.04)


def test_a_default_goes_with_the_kind_that_is_chosen() -> None:
    """GSPO's narrow range is of a mean over tokens, TRL's larger cap of a whole sequence's weight."""

    def clips(**values: Any) -> tuple[float | None, float | None]:
        resolved = PPOConfig(**values).resolved()
        assert resolved.resolved() == resolved
        return resolved.cliprange, resolved.cliprange_high

    assert clips(objective="dapo", importance_ratio="sequence-mean") == clips(objective="gspo") == (3e-4, 4e-4)
    assert clips(objective="gspo", importance_ratio="token") == clips(objective="grpo") == (0.2, 0.2)
    assert clips(objective="dapo", importance_ratio="sequence") == (0.2, 0.28)
    assert clips(objective="cispo", importance_ratio="sequence-mean") == (1.0, 4.0)
    assert clips(objective="grpo", importance_ratio="sequence-mean", cliprange=0.01) == (0.01, 0.01)  # follows it
    assert clips(objective="gspo", importance_ratio="token", cliprange=0.1) == (0.1, 0.1)
    assert clips(objective="grpo", importance_ratio="sequence-mean", cliprange=0.01, cliprange_high=0.02)[1] == 0.02
    assert clips(objective="dapo", cliprange=0.1) == (0.1, 0.28)
    for kind, cap in (("truncate", 2.0), ("sequence-mask", 3.0), ("mask", None), ("none", None)):
        assert PPOConfig(sampler_correction=kind).resolved().sampler_cap == cap  # type: ignore[arg-type]
    assert Settings(PPOConfig(sampler_correction="sequence-mask")).step.score.correction.cap == 3.0


def test_the_docs_list_every_objective_and_every_default() -> None:
    text = (Path(__file__).parents[2] / "docs" / "objectives.md").read_text()
    rows = {row.split("|")[1].strip(" `"): row for row in text.splitlines() if row.startswith("| `")}
    for name, found in OBJECTIVES.items():
        assert name in rows, f"docs/objectives.md has no row of {name}"
        for option in found.defaults:
            defaults = [row for row in text.splitlines() if re.match(rf"\| `{re.escape(name)}` \| `{option}` ", row)]
            assert defaults, f"docs/objectives.md does not say where {name}'s default of {option} is from"
