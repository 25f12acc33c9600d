# SPDX-License-Identifier: Apache-2.0
"""PPO: its losses against plain Python, invariance to how a batch is cut, exact resume, and every check it makes."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rlhf_fast.feedback.prompts import Prompts, read_asked
from rlhf_fast.feedback.rewards import Rewards
from rlhf_fast.models import heads
from rlhf_fast.models import loading as models
from rlhf_fast.models.batches import Batch, in_micro_batches
from rlhf_fast.models.generate import generate
from rlhf_fast.models.rollout import Rollout, Support
from rlhf_fast.report.evaluate import variety
from rlhf_fast.run import checks
from rlhf_fast.run.errors import Interrupted, UserError
from rlhf_fast.run.folder import RunFolder
from rlhf_fast.run.progress import Timer
from rlhf_fast.trainer import agent as agents
from rlhf_fast.trainer import objectives, ppo
from rlhf_fast.trainer.config import PPOConfig
from rlhf_fast.trainer.kl import KLPrice
from rlhf_fast.trainer.metrics import Watch


@pytest.fixture(scope="session")
def reward_model(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An untrained reward model with a normaliser: enough for everything but learning something useful."""
    folder = tmp_path_factory.mktemp("reward") / "model"
    torch.manual_seed(0)
    model = models.load_reward_model(str(tiny / "model"), "float32", models.load_tokenizer(str(tiny / "model")))
    model.score.weight.data.mul_(20)
    models.set_score_normalizer(model, 0.1, 0.5)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def config(tiny: Path, reward_model: str) -> PPOConfig:
    return PPOConfig(
        model=str(tiny / "model"),
        reward_model=reward_model,
        prompts_file=str(tiny / "feedback_prompts.jsonl"),
        dtype="float32",
        max_length=32,
        max_new_tokens=8,
        prompts_per_step=4,
        samples_per_prompt=4,
        max_steps=3,
        lr=1e-3,
        critic_lr=1e-3,
    )


def replace(config: PPOConfig, **values: Any) -> PPOConfig:
    return dataclasses.replace(config, **values)


def asked(config: PPOConfig, agent: agents.Agent) -> Prompts:
    """What `train_ppo` makes of the prompts file."""
    feedback = config.objective == "dpo"
    return agents.encode_prompts(read_asked(config.prompts_file, feedback=feedback, scored=True), config, agent)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def metrics(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


# ------------------------------------------------------------------------------------------------ objectives


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


# --------------------------------------------------------------------------------------------- the loop


def gradients(config: PPOConfig) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics of one step, and the norms of all gradients at its first optimizer step."""
    agent = agents.load_agent(config)
    prompts = asked(config, agent)
    norms: dict[str, float] = {}
    step = agent.policy_optimizer.step

    def watched(norm: float | None = None) -> float:
        for model in ("policy", "critic"):
            for name, parameter in getattr(agent, model).named_parameters():
                if parameter.grad is not None:
                    norms.setdefault(f"{model}.{name}", float(parameter.grad.norm()))
        return step(norm)

    agent.policy_optimizer.step = watched  # type: ignore[method-assign]
    return ppo.train_step(agent, prompts, config, 0, Timer()), norms


@pytest.mark.parametrize("size", [1, 3, 16])
def test_the_cut_into_micro_batches_changes_nothing(config: PPOConfig, size: int) -> None:
    whole, norms = gradients(replace(config, micro_batch_size=64))
    cut, cut_norms = gradients(replace(config, micro_batch_size=size))
    assert cut == pytest.approx(whole, abs=2e-4, rel=2e-3)
    assert cut_norms == pytest.approx(norms, rel=1e-3, abs=1e-6) and len(norms) > 30


def test_the_first_minibatch_has_ratio_one_and_the_kl_starts_at_zero(config: PPOConfig) -> None:
    config = replace(config, num_minibatches=1, score_clip=0.0)
    first, _ = gradients(config)
    assert first["policy/ratio"] == pytest.approx(1.0, abs=1e-5) and first["policy/clipfrac_avg"] == 0
    assert first["objective/kl"] == pytest.approx(0.0, abs=1e-4)
    assert first["objective/rlhf_reward"] == pytest.approx(first["objective/scores"], abs=1e-4)


@pytest.mark.parametrize("objective", objectives.OBJECTIVES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_objective_runs_to_its_end(config: PPOConfig, tmp_path: Path, objective: str, dtype: str) -> None:
    run = RunFolder.create(tmp_path / "run")
    config = replace(config, objective=objective, dtype=dtype, epochs=2, missing_eos_penalty=1.0)
    summary = ppo.train_ppo(config, run)
    assert summary["steps"] == 3 and summary["kl_final"] == metrics(run.path)[-1]["objective/kl"]
    assert ("loss/value_avg" in metrics(run.path)[0]) == (objective == "ppo")
    assert all(value == value for row in metrics(run.path) for value in row.values())


def test_held_out_prompts_are_sampled_before_and_after(
    config: PPOConfig, tiny: Path, tiny_rater: str, tmp_path: Path
) -> None:
    config = replace(config, eval_prompts_file=str(tiny / "heldout.jsonl"), rater=tiny_rater, max_steps=1)
    run = RunFolder.create(tmp_path / "run")
    summary = ppo.train_ppo(config, run)
    rows = [json.loads(line) for line in (run.path / "samples.jsonl").read_text().splitlines()]
    prompts = len((tiny / "heldout.jsonl").read_text().splitlines())
    assert len(rows) == 2 * config.eval_samples * prompts and {row["when"] for row in rows} == {"before", "after"}
    for when in ("before", "after"):
        chosen = [row for row in rows if row["when"] == when]
        assert summary[f"gold_{when}"] == pytest.approx(sum(row["gold"] for row in chosen) / len(chosen))
        assert summary[f"reward_{when}"] == pytest.approx(sum(row["reward"] for row in chosen) / len(chosen))
    assert summary["kl_before"] == pytest.approx(0.0, abs=1e-3) and summary["kl_final"] == summary["kl_after"]
    assert json.loads((run.path / "summary.json").read_text()) == summary
    tokens = {"distinct", "distinct_2", "ended", "length", "entropy"}
    assert all(f"{name}_{when}" in summary for name in tokens for when in ("before", "after"))


def test_an_interrupted_run_goes_on_bit_for_bit(
    config: PPOConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: Callable[[int], Any]
) -> None:
    for dtype in ("float32", "bfloat16"):
        config = replace(config, dtype=dtype)
        straight, stopped = tmp_path / f"straight-{dtype}", tmp_path / f"stopped-{dtype}"
        ppo.train_ppo(config, RunFolder.create(straight))
        with monkeypatch.context() as patch:
            patch.setattr(ppo, "StopFlag", stop_at(1))
            with pytest.raises(Interrupted, match="stopped after 1 of 3 steps; --resume goes on"):
                ppo.train_ppo(config, RunFolder.create(stopped))
        assert not (stopped / "model").exists() and (stopped / "checkpoints" / "step-1").is_dir()
        summary = ppo.train_ppo(config, RunFolder.create(stopped, resume=True))
        assert summary["steps"] == 3 and metrics(stopped) == metrics(straight)
        ours, theirs = weights(straight), weights(stopped)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours) and ours.keys() == theirs.keys()
        assert ppo.train_ppo(config, RunFolder.create(stopped, resume=True)) == summary  # a finished run is left alone


def test_checkpoints_come_every_save_steps_and_at_the_end(config: PPOConfig, tmp_path: Path) -> None:
    ppo.train_ppo(replace(config, save_steps=2), RunFolder.create(tmp_path / "run"))
    assert {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()} == {"step-2", "step-3"}


def test_the_time_limit_ends_the_phase_early(
    config: PPOConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder.create(tmp_path / "run")
    summary = ppo.train_ppo(replace(config, max_seconds=0.01), run)
    assert summary["steps"] == 1 and (run.path / "model" / "config.json").exists()
    assert "ends the phase after 1 steps" in capsys.readouterr().err


def test_prompts_come_once_before_any_comes_again() -> None:
    prompts = Prompts([], [[0]] * 8)
    chosen = [i for place in range(0, 24, 4) for i in prompts.chosen(place, 4, seed=0)]
    assert all(sorted(chosen[start : start + 8]) == list(range(8)) for start in (0, 8, 16))
    assert chosen[:8] != chosen[8:16] and chosen == prompts.chosen(0, 24, seed=0)
    assert chosen != prompts.chosen(0, 24, seed=1)


def test_the_critic_starts_on_the_scores(config: PPOConfig) -> None:
    agent = agents.load_agent(config)
    mask = torch.arange(5) < torch.tensor([5, 2, 3])[:, None]
    scores = torch.tensor([1.0, -1.0, 0.5])
    before = (2.0 * scores[:, None] - 3.0 + 0.1 * torch.randn(3, 5)) * mask
    weight, bias = agent.critic.score.weight.clone(), agent.critic.score.bias.clone()
    after = agents.calibrate_critic(agent.critic, before, scores, mask)
    targets = scores[:, None].expand(3, 5)[mask]
    assert ((after[mask] - targets) ** 2).mean() < 0.02 and not after[~mask].any()
    slope = (agent.critic.score.weight / weight).mean()
    torch.testing.assert_close(after[mask], (slope * before + agent.critic.score.bias - slope * bias)[mask])


# ------------------------------------------------------------------------------------------- what stops a run


def test_dropout_is_noticed(config: PPOConfig) -> None:
    agent = agents.load_agent(config)
    prompts = asked(config, agent)
    hidden_states = heads.hidden_states

    def noisy(model: Any, *args: Any) -> Tensor:
        return torch.nn.functional.dropout(hidden_states(model, *args), 0.1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heads, "hidden_states", noisy)
        with pytest.raises(UserError, match="ratio of the first minibatch is not 1: .* at sample .* token .*dropout"):
            ppo.train_step(agent, prompts, config, 0, Timer())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("reward", "the score is nan at sample"),
        ("frozen", "ref_logprobs is nan at sample"),
        ("critic", "values is nan"),
    ],
)
def test_what_is_not_finite_is_named(config: PPOConfig, model: str, message: str) -> None:
    agent = agents.load_agent(config)
    prompts = asked(config, agent)
    broken = agent.rewards.model if model == "reward" else getattr(agent, model)
    broken.base_model.norm.weight.data[3] = float("nan")
    with pytest.raises(UserError, match=message):
        ppo.train_step(agent, prompts, config, 1, Timer())


def test_a_gradient_that_explodes_stops_the_run(config: PPOConfig) -> None:
    agent = agents.load_agent(config)
    prompts = asked(config, agent)
    agent.policy.base_model.layers[0].mlp.up_proj.weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(UserError, match="policy/grad_norm is (nan|inf)"):
        ppo.train_step(agent, prompts, config, 0, Timer())


def test_logprobs_above_zero_stop_the_run() -> None:
    mask = torch.tensor([[True, True], [True, False]])
    checks.check_logprobs("old_logprobs", torch.tensor([[-1.0, 1e-6], [0.0, 99.0]]), mask)
    with pytest.raises(UserError, match="old_logprobs is 0.5 at sample 1 token 0; a log-probability is at most 0"):
        checks.check_logprobs("old_logprobs", torch.tensor([[-1.0, 0.0], [0.5, 0.0]]), mask)


def test_a_reward_model_with_another_vocabulary_is_refused(config: PPOConfig, tiny: Path, tmp_path: Path) -> None:
    model = models.load_reward_model(str(tiny / "model"), "float32")
    model.resize_token_embeddings(99)
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="has another vocabulary than"):
        agents.load_agent(replace(config, reward_model=str(tmp_path / "other")))


def test_files_and_functions_are_read_before_any_model(
    config: PPOConfig, write_jsonl: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ppo, "encode_prompts", lambda *args: pytest.fail("models were loaded first"))
    monkeypatch.setattr(agents, "load_tokenizer", lambda *args: pytest.fail("a model's tokenizer was loaded first"))
    bad = write_jsonl("bad.jsonl", {"prompt": "ann wants animals"}, "{not json")
    cases: list[tuple[str, dict[str, Any]]] = [
        ("cannot read the data file none.jsonl", {"prompts_file": "none.jsonl"}),
        ("bad.jsonl:2: not valid JSON", {"prompts_file": bad}),
        ("bad.jsonl:2: not valid JSON", {"prompts_file": bad, "objective": "dpo"}),
        ("bad.jsonl:2: not valid JSON", {"eval_prompts_file": bad}),
        ("there is no file none.py", {"rater": "none.py:f"}),
        ("there is no file none.py", {"reward_functions": ("none.py:f",)}),
        ("say what samples are worth", {"objective": "dpo", "reward_model": ""}),
        ("there is no folder './none'", {"reward_model": "./none"}),
    ]
    for message, values in cases:
        with pytest.raises(UserError, match=message):
            ppo.train_ppo(replace(config, **values), RunFolder.create(tmp_path / "run", overwrite=True))


def test_a_prompt_without_room_for_a_completion_is_named(config: PPOConfig, write_jsonl: Callable[..., str]) -> None:
    path = write_jsonl("long.jsonl", {"prompt": "ann wants animals"}, {"prompt": "ann wants animals " * 20})
    with pytest.raises(UserError, match="long.jsonl.*2"):
        asked(replace(config, prompts_file=path), agents.load_agent(config))


# ------------------------------------------------------------------------------------------- small parts


def test_micro_batches_come_back_in_order() -> None:
    mask = torch.arange(6) < torch.tensor([2, 6, 3, 5, 1])[:, None]
    batch = Batch(torch.arange(30).view(5, 6), mask, mask)
    plan = batch.plan(2)
    assert [rows.tolist() for rows in plan] == [[1, 3], [2, 0], [4]]
    assert batch.rows(plan[1]).input_ids.shape == (2, 3)
    torch.testing.assert_close(in_micro_batches(lambda p: p.input_ids * p.mask, batch, plan), batch.input_ids * mask)
    torch.testing.assert_close(in_micro_batches(lambda p: p.input_ids[:, 0], batch, plan), batch.input_ids[:, 0])


def test_variety_counts_texts_and_word_pairs() -> None:
    assert variety(["a b a", "a b a", "c"]) == {"distinct": 2 / 3, "distinct_2": 0.5}
    assert variety(["a"]) == {"distinct": 1.0, "distinct_2": 1.0}


# --------------------------------------------------------------------- ways to charge the KL, to learn and to sample


def steps(config: PPOConfig, folder: Path, **values: Any) -> list[dict[str, float]]:
    """Metrics of a whole run."""
    run = RunFolder.create(folder)
    ppo.train_ppo(replace(config, **values), run)
    return metrics(run.path)


@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_the_exact_kl_is_that_of_the_whole_laws(config: PPOConfig, monkeypatch: pytest.MonkeyPatch, kl_in: str) -> None:
    config = replace(config, kl_estimator="exact", kl_in=kl_in, kl_coef=0.3, temperature=0.8, score_clip=0.0)
    agent = agents.load_agent(config)
    for parameter in agent.policy.parameters():
        parameter.data.mul_(1.5)
    seen: list[Any] = []
    learn = ppo.update
    monkeypatch.setattr(
        ppo, "update", lambda agent, sampled, *rest: seen.append(sampled) or learn(agent, sampled, *rest)
    )
    batch_scores: list[Tensor] = []
    score = agent.rewards.__class__.__call__
    monkeypatch.setattr(
        agent.rewards.__class__, "__call__", lambda *args: batch_scores.append(score(*args)) or batch_scores[-1]
    )
    truth = copy.deepcopy(agent.policy)
    figures = ppo.train_step(agent, asked(config, agent), config, 0, Timer())
    batch, made = seen[0].batch, seen[0].made
    with torch.no_grad(), agent.reference() as reference:
        own, other = (
            (model(batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1].double() / 0.8).log_softmax(-1)
            for model in (truth, reference)
        )
    kl = torch.nn.functional.pad((own.exp() * (own - other)).sum(-1), (1, 0)) * batch.mask
    torch.testing.assert_close(made.kl.double(), kl, atol=2e-5, rtol=1e-4)
    assert float(kl.sum(1).mean()) > 0.01
    wanted = batch_scores[0] - 0.3 * made.kl.sum(1) * (kl_in == "reward")
    torch.testing.assert_close(made.rewards.sum(1), wanted, atol=1e-4, rtol=1e-4)
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
    agent = agents.load_agent(config)
    agent.rewards = Rewards(None, [(1.0, lambda prompt, completions: [1.0] * len(completions))])
    torch.manual_seed(0)
    for parameter in agent.policy.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    prompts = asked(config, agent)
    made = [ppo.train_step(agent, prompts, config, step, Timer()) for step in range(12)]
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


def test_the_price_of_the_kl_follows_its_target(config: PPOConfig, tmp_path: Path) -> None:
    rows = steps(config, tmp_path / "far", kl_target=1e-3, kl_coef=0.1, lr=1e-2, max_steps=4, objective="grpo")
    prices = [row["objective/kl_coef"] for row in rows]
    assert prices[0] == 0.1 and prices[1] == pytest.approx(0.1 * 0.98) and prices[3] == pytest.approx(prices[2] * 1.02)
    price = KLPrice(0.1, 2.0)
    price.update(2.2)
    assert price.coef == pytest.approx(0.1 * 1.01)


def test_an_update_stops_when_the_policy_has_moved_far(config: PPOConfig, tmp_path: Path) -> None:
    common = {"epochs": 5, "num_minibatches": 2, "lr": 1e-2, "max_steps": 1}
    assert steps(config, tmp_path / "whole", **common)[0]["policy/updates"] == 10
    assert 1 < steps(config, tmp_path / "short", early_stop_kl=1e-3, **common)[0]["policy/updates"] < 10


def test_the_critic_warms_up_alone(config: PPOConfig, tmp_path: Path) -> None:
    rows = steps(config, tmp_path / "run", critic_warmup=2)
    assert [("policy/ratio" in row, "loss/value_avg" in row) for row in rows] == [(False, True)] * 2 + [(True, True)]
    frozen = steps(config, tmp_path / "frozen", critic_warmup=3, max_steps=3)
    assert all(abs(row["objective/kl"]) < 1e-4 for row in frozen)


@pytest.mark.parametrize("objective", ["ppo", "dpo"])
def test_gradient_checkpointing_changes_nothing(config: PPOConfig, tmp_path: Path, objective: str) -> None:
    plain = steps(config, tmp_path / "plain", objective=objective)
    spared = steps(config, tmp_path / "spared", objective=objective, gradient_checkpointing=True)
    for one, other in zip(plain, spared, strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-5)


def test_with_lora_the_reference_is_the_policy_without_it(config: PPOConfig, tmp_path: Path) -> None:
    config = replace(config, lora_rank=4, objective="grpo", lr=1e-2)
    agent = agents.load_agent(config)
    prompts = asked(config, agent)
    separate = models.load_causal_lm(config.model, "float32")
    for step in range(2):
        ppo.train_step(agent, prompts, config, step, Timer())
    ids = torch.tensor([prompts.ids[0]])
    learned = agent.policy(ids).logits
    with agent.reference() as reference:
        assert torch.equal(reference(ids).logits, separate(ids).logits)
    assert not torch.allclose(learned, separate(ids).logits)
    torch.testing.assert_close(agent.merged_policy()(ids).logits, learned, atol=1e-4, rtol=1e-4)
    assert torch.equal(agent.policy(ids).logits, learned)  # merging left the one that learns alone


def test_lora_runs_resumes_and_saves_a_plain_model(config: PPOConfig, tmp_path: Path, stop_at: Any) -> None:
    config = replace(config, lora_rank=4, save_steps=1)
    whole = RunFolder.create(tmp_path / "whole")
    ppo.train_ppo(config, whole)
    cut = RunFolder.create(tmp_path / "cut")
    ppo.train_ppo(replace(config, max_steps=2), cut)
    (cut.path / "summary.json").unlink()
    ppo.train_ppo(config, RunFolder.create(cut.path, resume=True))
    one, other = weights(whole.path), weights(cut.path)
    assert one.keys() == load_file(Path(config.model) / "model.safetensors").keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------------------------------ preferences


def test_dpo_learns_what_people_preferred(config: PPOConfig, write_jsonl: Any, tmp_path: Path) -> None:
    prompts = [json.loads(line)["prompt"] for line in Path(config.prompts_file).read_text().splitlines()[:8]]
    rows = [{"prompt": p, "completions": [" the cat", " a dog", " red"], "ratings": [3, 1, 2]} for p in prompts]
    path = write_jsonl("feedback.jsonl", *rows)
    config = replace(config, objective="dpo", prompts_file=path, reward_model="", kl_coef=0.5, max_steps=8, lr=5e-3)
    config = replace(config, num_minibatches=1)
    rows = steps(config, tmp_path / "run")
    assert rows[0]["loss/policy_avg"] == pytest.approx(math.log(2), abs=0.05)
    assert rows[-1]["loss/policy_avg"] < 0.3 and rows[-1]["rewards/accuracies"] == 1


def test_dpo_pairs_completions_of_one_prompt(
    config: PPOConfig, write_jsonl: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Feedback brings two completions a prompt, whatever samples_per_prompt says."""
    prompts = [json.loads(line)["prompt"] for line in Path(config.prompts_file).read_text().splitlines()[:4]]
    ratings = [[1, 9], [2, 8], [7, 3], [6, 4]]  # over all prompts the extremes are those of the first
    rows = [{"prompt": p, "completions": [" x", " y"], "ratings": r} for p, r in zip(prompts, ratings, strict=True)]
    config = replace(config, objective="dpo", prompts_file=write_jsonl("feedback.jsonl", *rows), reward_model="")
    assert config.samples_per_prompt == 4
    seen: list[Any] = []
    learn = ppo.update
    monkeypatch.setattr(ppo, "update", lambda agent, made, *rest: seen.append(made) or learn(agent, made, *rest))
    agent = agents.load_agent(config)
    ppo.train_step(agent, asked(config, agent), config, 0, Timer())
    batch = seen[0].batch
    begins = [row[: int(mask.long().argmax())].tolist() for row, mask in zip(batch.input_ids, batch.mask, strict=True)]
    assert len(begins) == 8 and begins[0::2] == begins[1::2] and len({tuple(ids) for ids in begins}) == 4
    assert seen[0].better.all()


def test_dpo_takes_the_best_and_the_worst_sample(config: PPOConfig) -> None:
    scores = torch.tensor([1.0, 3.0, 2.0, 5.0, 5.0, 5.0])
    assert objectives.best_and_worst(scores, 3).tolist() == [1, 0, 3, 3]
    logprobs = torch.tensor([[-1.0, -2.0], [-1.5, 0.0], [-1.0, 0.0], [-1.0, 0.0]]).requires_grad_()
    reference = torch.tensor([[-2.0, -2.0], [-1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    loss, margins = objectives.dpo_loss(logprobs, reference, torch.tensor([True, False]), 0.1)
    assert margins.tolist() == pytest.approx([0.15, 0.0])
    assert loss.item() == pytest.approx(-math.log(1 / (1 + math.exp(-0.15))))
    loss.backward()
    assert not logprobs.grad[2:].any()  # type: ignore[index]  # a tie teaches nothing


def test_dpo_on_prompts_alone_needs_something_that_scores(config: PPOConfig) -> None:
    with pytest.raises(UserError, match="say what samples are worth"):
        read_asked(config.prompts_file, feedback=True, scored=False)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kl_estimator": "exact", "top_k": 5}, "whole vocabulary"),
        ({"kl_in": "loss"}, "no gradient on average"),
        ({"kl_in": "loss-importance", "kl_estimator": "exact"}, "take loss"),
        ({"objective": "dpo", "kl_estimator": "exact"}, "in its own loss"),
        ({"objective": "dpo", "kl_estimator": "k2", "kl_in": "loss"}, "in its own loss"),
        ({"kl_target": 1.0, "kl_coef": 0.0}, "above 0"),
        ({"critic_warmup": 1, "objective": "rloo"}, "with a critic"),
        ({"objective": "dapo", "samples_per_prompt": 1}, "2 or more"),
    ],
)
def test_options_that_do_not_go_together_are_refused(config: PPOConfig, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(config, **values).validate()


def test_what_goes_wrong_silently_is_said_once() -> None:
    good = {"objective/entropy": 2.0, "sample/ended": 0.5, "objective/scores_std": 1.0}
    watch = Watch()
    assert watch.look(good) == []
    for name, value, word in (
        ("objective/entropy", 0.3, "entropy has fallen from 2.00 to 0.30"),
        ("sample/ended", 0.0, "no completion"),
        ("objective/scores_std", 0.0, "same score"),
    ):
        (message,) = watch.look({**good, name: value})
        assert word in message and watch.look({**good, name: value}) == []
