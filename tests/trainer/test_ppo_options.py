# SPDX-License-Identifier: Apache-2.0
"""Options of PPO in whole steps: schedules, evaluation during the run, the best model, what samplers may do wrong."""

from __future__ import annotations

import json
import math
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ppo_runs import load_agent, metrics, prompts_of, replace, steps, train_step, weights

from rlhf_fast.errors import Interrupted, UserError
from rlhf_fast.models.batches import Batch, MicroBatch
from rlhf_fast.rollout import evaluate as evaluation
from rlhf_fast.rollout.builtin import generate
from rlhf_fast.rollout.rollout import Rollout, SamplingParams
from rlhf_fast.run.folder import RunFolder
from rlhf_fast.run.records import read_jsonl
from rlhf_fast.trainer import PPOConfig
from rlhf_fast.trainer.rl import checks, ppo, score, settings
from rlhf_fast.trainer.rl.agent import Agent
from rlhf_fast.trainer.rl.evaluation import EvalOptions, Evaluator
from rlhf_fast.trainer.rl.schedule import learning_rate_scale


@pytest.mark.parametrize(
    ("schedule", "after"),
    [
        ("constant", [1.0] * 4),
        ("linear", [1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5 * (1 + math.cos(math.pi * share)) for share in (0, 0.25, 0.5, 0.75)]),
    ],
)
def test_learning_rates_rise_and_fall(schedule: str, after: list[float]) -> None:
    scales = [learning_rate_scale(step, 2, 6, schedule) for step in range(6)]
    assert scales == pytest.approx([0.5, 1.0, *after])


def test_a_step_uses_the_optimizers_options(config: PPOConfig, tmp_path: Path) -> None:
    config = replace(config, lr_schedule="linear", warmup_steps=1, max_steps=2, adam_beta1=0.5, weight_decay=0.1)
    config = replace(config, adam_eps=1e-6, max_grad_norm=0.0)
    agent = load_agent(config)
    for optimizer, lr in ((agent.policy_optimizer, config.lr), (agent.critic_optimizer, config.critic_lr)):
        assert optimizer is not None
        (group,) = optimizer.param_groups
        assert (group["betas"], group["eps"], group["weight_decay"], group["lr"]) == ((0.5, 0.95), 1e-6, 0.1, lr)
    rows = steps(config, tmp_path / "run")
    assert [row["policy/lr"] for row in rows] == pytest.approx([config.lr, config.lr])


def test_without_a_learning_rate_nothing_moves(config: PPOConfig, tmp_path: Path) -> None:
    """The schedule reaches the optimizers: at a scale of 1e-12 the weights stay."""
    steps(replace(config, warmup_steps=10**12, max_steps=1), tmp_path / "run")
    before = load_agent(config).policy.state_dict()
    for name, weight in weights(tmp_path / "run").items():
        torch.testing.assert_close(weight, before[name], atol=1e-9, rtol=0)


def test_the_kl_target_waits_for_the_critics_warm_up(config: PPOConfig, tmp_path: Path) -> None:
    rows = steps(config, tmp_path / "run", critic_warmup=2, kl_target=1.0, kl_coef=0.1, max_steps=4)
    coefs = [row["objective/kl_coef"] for row in rows]
    assert coefs[:3] == [0.1] * 3 and coefs[3] != 0.1


@pytest.mark.parametrize(
    ("every", "rewards", "best"),
    [
        (1, [0.0, 1.0, 3.0, 3.0], 2),  # before, and after each step: of equals the first
        (2, [0.0, 1.0, 3.0], 3),  # the last policy competes also if its step is not evaluated on the way
        (2, [0.0, 3.0, 1.0], 2),
    ],
)
def test_the_best_model_is_kept_and_what_is_reported_is_of_it(
    every: int,
    rewards: list[float],
    best: int,
    config: PPOConfig,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = replace(
        config, eval_prompts_file=str(tiny / "heldout.jsonl"), eval_steps=every, keep_best=True, eval_samples=1
    )
    left, kept = iter(rewards), []
    monkeypatch.setattr("rlhf_fast.trainer.rl.rewards.Rewards.add_to", lambda *_: {"reward": next(left)})
    step = ppo.train_step

    def recorded(agent: Agent, *args: Any) -> dict[str, float]:
        found = step(agent, *args)
        kept.append({name: weight.clone() for name, weight in agent.policy.state_dict().items()})
        return found

    monkeypatch.setattr(ppo, "train_step", recorded)
    run = RunFolder.create(tmp_path / "run")
    summary = ppo.train_ppo(config, run)
    rows = metrics(run.path)
    assert [row["eval/reward"] for row in rows if "eval/kl" in row] == rewards[1 : 1 + 3 // every]
    assert json.loads((run.path / "best.json").read_text()) == {"step": best, "reward": 3.0}
    for n, other in enumerate(kept, start=1):
        assert all(torch.equal(weight, other[name]) for name, weight in weights(run.path).items()) == (n == best)
    # What the summary, samples.jsonl and so the card and the report tell of the model is of that one.
    assert summary["best_step"] == best and summary["reward_after"] == 3.0
    figures = json.loads((run.path / f"eval_step-{best}.json").read_text())
    assert json.loads((run.path / "eval_after.json").read_text()) == figures
    assert summary["kl_final"] == summary["kl_after"] == figures["kl"]
    after = [row for row in read_jsonl(run.path / "samples.jsonl") if row["when"] == "after"]
    assert sum(row["kl"] for row in after) / len(after) == pytest.approx(figures["kl"])
    assert "best step" in (run.path / "model" / "README.md").read_text()


@pytest.mark.parametrize(
    "values", [{"bootstrap_truncated": True}, {"whiten_rewards": True}, {"missing_eos_score": -1.0}]
)
def test_options_of_rewards_change_the_step(config: PPOConfig, tmp_path: Path, values: dict[str, Any]) -> None:
    plain, other = (steps(config, tmp_path / name, max_steps=1, **more) for name, more in (("a", {}), ("b", values)))
    assert 0 < plain[0]["sample/ended"] < 1
    assert other[0]["policy/grad_norm"] != plain[0]["policy/grad_norm"]


def test_advantages_and_the_critics_start_see_the_rewards_with_all_penalties(
    config: PPOConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a sample that was cut off goes on with the critic's value of the state after its last token."""
    config = replace(
        config, bootstrap_truncated=True, missing_eos_penalty=0.7, overlong_penalty=0.4, overlong_buffer=0.5
    )
    agent, rollouts = load_agent(config), list[Rollout]()
    stats, fitted, final_values = list[Any](), list[torch.Tensor](), list[torch.Tensor]()
    of_stats, calibrate = score.RolloutStats, score.calibrate_critic

    def sampler(*args: Any, **options: Any) -> Rollout:
        rollouts.append(generate(*args, **options))
        return rollouts[-1]

    @torch.no_grad()
    def noted(*args: Any) -> Any:
        made = rollouts[-1]
        for ids, attended in zip(made.input_ids, made.attention_mask, strict=True):
            states = agent.critic.base_model(ids[attended][None]).last_hidden_state
            final_values.append(agent.critic.score(states[0, -1]))
        stats.append(of_stats(*args))
        return stats[-1]

    def calibrated(critic: Any, values: torch.Tensor, rewards: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        fitted.append(rewards)
        return calibrate(critic, values, rewards, mask)

    monkeypatch.setattr(score, "RolloutStats", noted)
    monkeypatch.setattr(score, "calibrate_critic", calibrated)
    for step in range(2):
        train_step(agent, prompts_of(config, agent), config, step, sampler)
    ended, scores = rollouts[0].ended, rollouts[0].scores
    assert scores is not None and 0 < int(ended.sum()) < len(ended)
    lengths = rollouts[0].response_mask.sum(1)  # of at most 8 tokens, the last half of which is punished
    assert len(lengths.unique()) > 1
    rewards = scores - 0.7 * ~ended - 0.4 * ((lengths - 4) / 4).clamp(min=0)
    torch.testing.assert_close(stats[0].rewards, rewards)
    assert torch.equal(stats[0].truncated, ~ended)
    torch.testing.assert_close(stats[0].final_values, torch.cat(final_values[: len(ended)]), atol=1e-5, rtol=1e-5)
    assert len(fitted) == 1 and torch.equal(fitted[0], stats[0].rewards)  # at the first step alone


def test_overlong_samples_are_not_learned_from(config: PPOConfig) -> None:
    """Nor does their number change what the others count: DAPO's mean is over the tokens that are left."""
    config = replace(config, objective="dapo", dynamic_sampling=0, overlong_penalty=0.0, num_minibatches=1)
    agent = load_agent(config)
    figures = train_step(agent, prompts_of(config, agent), config, 0)
    assert 0 < figures["sample/ended"] < 1 and 0 < figures["sample/learned"] < 1
    assert figures["policy/ratio"] == pytest.approx(1.0, abs=1e-4)  # a mean over what is learned from
    assert figures["objective/entropy"] > 1  # of the update's own pass, the only one

    def endless(*args: Any, **options: Any) -> Rollout:
        rollout = generate(*args, **options)
        return changed(rollout, ended=torch.zeros_like(rollout.ended))

    agent = load_agent(config)
    figures = train_step(agent, prompts_of(config, agent), config, 0, endless)
    assert figures["sample/learned"] == 0 and figures["policy/grad_norm"] == 0


def test_a_budget_of_tokens_bounds_the_micro_batches(config: PPOConfig) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 50, (12, 9), generator=generator)
    lengths = torch.tensor([9, 3, 5, 5, 9, 2, 4, 8, 7, 6, 3, 9])
    real = torch.arange(9) < lengths[:, None]
    batch = Batch(ids, real, real & (torch.arange(9) > 0))
    for size, tokens, unit in ((12, 20, 1), (3, 40, 1), (12, 1, 1), (12, 30, 2), (12, 0, 3)):
        parts = batch.plan(size, unit=unit, tokens=tokens)
        assert sorted(torch.cat(parts).tolist()) == list(range(12))
        for part in parts:
            assert len(part) <= max(size, unit) and len(part) % unit == 0
            assert not tokens or len(part) == unit or len(part) * int(lengths[part].max()) <= tokens
    assert len(batch.plan(12, tokens=1)) == 12 and len(batch.plan(12)) == 1
    whole, cut = (
        train_step(agent, prompts_of(config, agent), changed(config, micro_batch_tokens=tokens), 1)
        for agent, tokens in ((load_agent(config), 0), (load_agent(config), 30))
    )
    assert cut == pytest.approx(whole, abs=2e-4, rel=2e-3)


def test_a_budget_of_tokens_bounds_evaluations_too(
    config: PPOConfig, tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shapes: list[tuple[int, int]] = []
    config = replace(config, eval_prompts_file=str(tiny / "heldout.jsonl"), max_steps=0)

    def watched(function: Any) -> Any:
        def call(model: Any, batch: Batch, *rest: Any) -> Any:
            shapes.append(tuple(batch.input_ids.shape))
            return function(model, batch, *rest)

        return call

    for name in ("token_logprobs_entropy", "token_logprobs", "sequence_scores"):
        monkeypatch.setattr(evaluation, name, watched(getattr(evaluation, name)))
    whole = ppo.train_ppo(config, RunFolder.create(tmp_path / "whole"))
    assert max(rows * width for rows, width in shapes) > 100
    shapes.clear()
    cut = ppo.train_ppo(replace(config, micro_batch_tokens=100), RunFolder.create(tmp_path / "cut"))
    assert max(rows * width for rows, width in shapes) <= 100 and any(rows > 1 for rows, _ in shapes)
    for name in ("reward_before", "kl_before", "entropy_before"):
        assert cut[name] == pytest.approx(whole[name], abs=1e-5)


def test_without_a_kl_there_is_no_reference(
    config: PPOConfig, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is loaded for evaluations alone, and the update is that of a run that has it."""
    config = replace(config, objective="grpo", kl_coef=0.0, num_minibatches=2)
    agent, other = load_agent(config), load_agent(config)
    assert agent.frozen is None and load_agent(replace(config, kl_coef=1.0)).frozen is not None
    assert other.load_reference is not None
    other.frozen = other.load_reference()
    figures = train_step(agent, prompts_of(config, agent), config, 0)
    assert "objective/kl" not in figures and figures["policy/grad_norm"] > 0
    monkeypatch.setattr(settings, "needs_reference", lambda config: True)
    same = train_step(other, prompts_of(config, other), config, 0)
    assert same.pop("objective/kl") == pytest.approx(0, abs=1e-4) and same == figures
    monkeypatch.undo()

    agents: list[Agent] = []
    load = ppo.load_agent
    monkeypatch.setattr(ppo, "load_agent", lambda options: agents.append(load(options)) or agents[-1])
    more: dict[str, Any] = {"eval_prompts_file": str(tiny / "heldout.jsonl"), "eval_samples": 1, "max_steps": 2}
    run = RunFolder.create(tmp_path / "run")
    summary = ppo.train_ppo(replace(config, **more), run)
    assert summary["kl_before"] == pytest.approx(0, abs=1e-4) and abs(summary["kl_after"]) > 1e-3
    assert agents[0].frozen is None and all("objective/kl" not in row for row in metrics(run.path))


def test_files_of_evaluations_after_the_checkpoint_are_not_read(
    config: PPOConfig, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: Any
) -> None:
    config = replace(
        config, eval_prompts_file=str(tiny / "heldout.jsonl"), eval_steps=1, keep_best=True, eval_samples=1, max_steps=2
    )
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(ppo, "StopFlag", stop_at(1))
        ppo.train_ppo(config, RunFolder.create(tmp_path / "run"))
    (tmp_path / "run" / "eval_step-2.json").write_text('{"reward": 99.0}')  # as a run left it that was killed later
    (tmp_path / "run" / "eval_after.json").write_text('{"reward": 98.0}')
    (tmp_path / "run" / "best.json").write_text('{"step": 2, "reward": 99.0}')
    run = RunFolder.create(tmp_path / "run", resume=True)
    summary = ppo.train_ppo(config, run)
    assert metrics(run.path)[1]["eval/reward"] < 50 and summary["reward_after"] < 50
    assert json.loads((run.path / "best.json").read_text())["reward"] < 50


def test_a_resumed_run_knows_the_best_model_up_to_its_checkpoint(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    run.write_json("best.json", {"step": 2, "reward": 3.0})
    run.append_jsonl("best_samples.jsonl", [{"reward": 3.0}])
    options = EvalOptions(SamplingParams(), samples=1, micro_batch=MicroBatch(1, 0), every=1, keep_best=True)
    for step in (2, 3):
        run.write_json(f"eval_step-{step}.json", {})
    for step, best in ((2, (2, 3.0)), (1, None)):
        evaluator = Evaluator(None, None, options, run, None)  # type: ignore[arg-type]
        evaluator.resume(step)
        assert evaluator.best == best
        assert not (run.path / "eval_step-3.json").exists() and (run.path / "eval_step-2.json").exists() == (step == 2)


# ------------------------------------------------------------------------------------------ samplers and rounding


def test_a_sampler_without_support_is_refused(config: PPOConfig, tmp_path: Path) -> None:
    def forgetful(*args: Any, **options: Any) -> Rollout:
        return changed(generate(*args, **options), support=None)

    for values in ({"top_p": 0.9}, {"top_k": 5}):
        with pytest.raises(UserError, match="the sampler returned no `support` though top_k is .* top_p"):
            ppo.train_ppo(replace(config, **values), RunFolder.create(tmp_path / str(values)), forgetful)


def test_a_sampler_of_another_distribution_is_named(config: PPOConfig) -> None:
    """Before the update, or behind it where only that has the log-probabilities."""
    for objective, hotter, message in (
        ("ppo", 3.0, "less likely .* a higher temperature"),
        ("grpo", 0.3, "more likely .* a lower temperature"),
    ):
        some = replace(config, prompts_per_step=16, objective=objective)
        agent = load_agent(some)
        for model in (agent.policy, agent.frozen):
            model.base_model.norm.weight.data.mul_(8.0)  # logits that a temperature makes a difference to

        def other(
            model: Any, tokenizer: Any, prompts: Any, params: Any, hotter: float = hotter, **rest: Any
        ) -> Rollout:
            return generate(model, tokenizer, prompts, changed(params, temperature=hotter), **rest)

        with pytest.raises(UserError, match=message):
            train_step(agent, prompts_of(some, agent), some, 0, other)


def test_in_16_bits_a_single_token_may_be_rounding(tmp_path: Path) -> None:
    mask = torch.ones(4, 100, dtype=torch.bool)
    old = -torch.rand(4, 100)
    one = old.clone()
    one[1, 7] -= 3.0  # a mixture of experts that took another one
    low, full = (torch.nn.Linear(1, 1, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    assert checks.check_ratio(one, old, mask, low) == pytest.approx(3.0)
    with pytest.raises(UserError, match="is 3 at sample 1 token 7.*no dropout is on"):
        checks.check_ratio(one, old, mask, full)
    with pytest.raises(UserError, match="0.2 on average"):
        checks.check_ratio(old - 0.2, old, mask, low)
    with pytest.raises(UserError, match=r"dropout is on in 0 \(p 0.1\)"):
        checks.check_ratio(old - 0.2, old, mask, torch.nn.Sequential(torch.nn.Dropout(0.1), low))
