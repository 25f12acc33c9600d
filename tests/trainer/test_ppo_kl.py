# SPDX-License-Identifier: Apache-2.0
"""The KL of PPO: exact or estimated, in the reward or in the loss, its coefficient, and with top-k and top-p."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ppo_runs import load_agent, metrics, prompts_of, replace, steps, train_step

from rlhf_fast.models.batches import Batch, Support
from rlhf_fast.rollout.builtin import generate
from rlhf_fast.rollout.rollout import Rollout
from rlhf_fast.run.folder import RunFolder
from rlhf_fast.trainer import PPOConfig
from rlhf_fast.trainer.rl import ppo
from rlhf_fast.trainer.rl.experience import Experience
from rlhf_fast.trainer.rl.kl_controller import KLController
from rlhf_fast.trainer.rl.metrics import rollout_metrics
from rlhf_fast.trainer.rl.objectives.objective import KLOptions
from rlhf_fast.trainer.rl.reward_functions import RewardFunction
from rlhf_fast.trainer.rl.rewards import Rewards


@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_the_exact_kl_is_that_of_the_whole_laws(config: PPOConfig, monkeypatch: pytest.MonkeyPatch, kl_in: str) -> None:
    config = replace(config, kl_estimator="exact", kl_in=kl_in, kl_coef=0.3, temperature=0.8, score_clip=0.0)
    agent = load_agent(config)
    for parameter in agent.policy.parameters():
        parameter.data.mul_(1.5)
    seen: list[Any] = []
    learn = ppo.update
    monkeypatch.setattr(
        ppo, "update", lambda agent, found, *rest, **more: seen.append(found) or learn(agent, found, *rest, **more)
    )
    batch_scores: list[Any] = []
    score = agent.rewards.__class__.__call__
    monkeypatch.setattr(
        agent.rewards.__class__, "__call__", lambda *args: batch_scores.append(score(*args)) or batch_scores[-1]
    )
    truth = copy.deepcopy(agent.policy)
    figures = train_step(agent, prompts_of(config, agent), config, 0)
    batch, found = seen[0].batch, seen[0]
    with torch.no_grad(), agent.reference() as reference:
        own, other = (
            (model(batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1].double() / 0.8).log_softmax(-1)
            for model in (truth, reference)
        )
    kl = torch.nn.functional.pad((own.exp() * (own - other)).sum(-1), (1, 0)) * batch.mask
    torch.testing.assert_close((found.old_logprobs - found.ref_logprobs).double(), kl, atol=2e-5, rtol=1e-4)
    assert float(kl.sum(1).mean()) > 0.01
    wanted = batch_scores[0].total.double() - 0.3 * kl.sum(1) * (kl_in == "reward")
    assert figures["objective/rlhf_reward"] == pytest.approx(float(wanted.mean()), abs=1e-4)
    assert figures["objective/kl"] == pytest.approx(float(kl.sum(1).mean()), rel=1e-3)


@pytest.mark.parametrize(
    ("estimator", "kl_in"),
    [("k2", "loss"), ("k3", "loss"), ("k1", "loss-straight-through"), ("k3", "loss-importance"), ("exact", "loss")],
)
def test_a_kl_in_the_loss_brings_the_policy_back(config: PPOConfig, estimator: str, kl_in: str) -> None:
    """Where all completions earn the same, nothing else pulls."""
    config = replace(
        config, objective="grpo", kl_estimator=estimator, kl_in=kl_in, kl_coef=5.0, num_minibatches=1, lr=1e-3
    )
    agent = load_agent(config)
    agent.rewards = Rewards(
        None, [RewardFunction("one", "one", 1.0, lambda prompt, completions: [1.0] * len(completions))]
    )
    torch.manual_seed(0)
    for parameter in agent.policy.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    prompts = prompts_of(config, agent)
    made = [train_step(agent, prompts, config, step) for step in range(12)]
    distances = [row["objective/kl"] for row in made]
    assert sum(distances[-4:]) < 0.7 * sum(distances[:4])
    assert made[0]["objective/rlhf_reward"] == pytest.approx(1.0)


@pytest.mark.parametrize("kl_in", ["reward", "loss", "loss-straight-through", "loss-importance"])
def test_the_fused_loss_and_its_two_halves_are_one(config: PPOConfig, tmp_path: Path, kl_in: str) -> None:
    """A support of the whole vocabulary cuts nothing, but takes the way of sampled log-probabilities."""

    def keeps_all(model: Any, *args: Any, **options: Any) -> Rollout:
        rollout = generate(model, *args, **options)
        size, tokens = model.config.vocab_size, int(rollout.response_mask.sum())
        rollout.support = Support(torch.arange(size).repeat(tokens), torch.arange(tokens + 1) * size)
        return rollout

    config = replace(config, objective="grpo", kl_in=kl_in, kl_estimator="k3", kl_coef=0.5, max_steps=2, epochs=2)
    made = {}
    for name, sampler in (("fused", generate), ("halves", keeps_all)):
        run = RunFolder.create(tmp_path / name)
        ppo.train_ppo(config, run, sampler)
        made[name] = metrics(run.path)
    for one, other in zip(made["fused"], made["halves"], strict=True):
        assert other == pytest.approx(one, rel=2e-3, abs=2e-4)


@pytest.mark.parametrize("values", [{"top_k": 5}, {"top_p": 0.7}, {"top_k": 8, "top_p": 0.9, "temperature": 0.7}])
def test_cut_sampling_keeps_the_ratio_at_one(config: PPOConfig, tmp_path: Path, values: dict[str, Any]) -> None:
    rows = steps(config, tmp_path / "run", num_minibatches=1, max_steps=2, **values)
    assert rows[0]["policy/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert rows[0]["objective/kl"] == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize(("place", "share"), [("reward", 0.5), ("loss", 0.0)])
def test_the_metrics_have_the_estimate_and_the_place_of_the_options(place: Any, share: float) -> None:
    ids, real = torch.arange(6).view(2, 3), torch.ones(2, 3, dtype=torch.bool)
    mask = torch.tensor([[False, True, True], [False, True, False]])
    old, ref = torch.tensor([[0.0, -1.0, -2.0], [0.0, -3.0, 0.0]]), torch.tensor([[0.0, -2.0, -1.5], [0.0, -1.0, 9.0]])
    rewards, none = torch.tensor([1.0, 3.0]), torch.zeros(2, 3)
    found = Experience(Batch(ids, real, mask), mask, rewards, old, none, ref, none, none, none)
    parts = {"rewards/one": torch.tensor([4.0, torch.nan])}  # which has no opinion of the second
    rollout = Rollout(ids, real, mask, ["", ""], torch.ones(2).bool(), scores=rewards, score_parts=parts)
    figures = rollout_metrics(rollout, found, KLOptions(0.5, "k3", place), critic=False)
    gaps = (old - ref)[mask]
    kl = float(((-gaps).exp() - 1 + gaps).sum()) / 2
    assert figures["objective/kl"] == pytest.approx(kl, rel=1e-5)
    assert figures["objective/rlhf_reward"] == pytest.approx(2.0 - share * kl, rel=1e-5)
    assert figures["rewards/one"] == 4 and "val/mean" not in figures


@pytest.mark.parametrize("values", [{}, {"top_k": 5}])
def test_a_single_update_knows_the_entropy_and_leaves_out_the_gap(config: PPOConfig, values: dict[str, Any]) -> None:
    """A step with a second update has a pass before it for both, of the same samples."""
    rows = []
    for epochs in (1, 2):
        config = replace(config, objective="grpo", num_minibatches=1, epochs=epochs, temperature=0.7, **values)
        agent = load_agent(config)
        rows.append(train_step(agent, prompts_of(config, agent), config, 0))
    assert (
        rows[0]["objective/entropy"] == pytest.approx(rows[1]["objective/entropy"], rel=1e-4)
        and rows[0]["objective/entropy"] > 0.1
    )
    assert "policy/ratio_gap" not in rows[0] and "policy/ratio_gap" in rows[1]


def test_kl_coef_follows_its_target(config: PPOConfig, tmp_path: Path) -> None:
    rows = steps(config, tmp_path / "far", kl_target=1e-3, kl_coef=0.1, lr=1e-2, max_steps=4, objective="grpo")
    coefs = [row["objective/kl_coef"] for row in rows]
    assert coefs[0] == 0.1 and coefs[1] == pytest.approx(0.1 * 0.98) and coefs[3] == pytest.approx(coefs[2] * 1.02)
    controller = KLController(0.1, 2.0)
    controller.update(2.2)
    assert controller.coef == pytest.approx(0.1 * 1.01)
