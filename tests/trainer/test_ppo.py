# SPDX-License-Identifier: Apache-2.0
"""PPO's loop: invariance to how a batch is cut, exact resume, what learns when, held-out prompts, LoRA."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ppo_runs import load_agent, metrics, prompts_of, replace, steps, train_step, weights
from safetensors.torch import load_file

from rlhf_fast.errors import Interrupted
from rlhf_fast.models import loading as models
from rlhf_fast.models.optim import AdamW
from rlhf_fast.run.folder import RunFolder
from rlhf_fast.run.progress import Timer
from rlhf_fast.trainer import PPOConfig
from rlhf_fast.trainer.rl import agent as agents
from rlhf_fast.trainer.rl import learn, objectives, ppo
from rlhf_fast.trainer.rl.kl_controller import KLController
from rlhf_fast.trainer.rl.metrics import Watch
from rlhf_fast.trainer.rl.pace import Pace
from rlhf_fast.trainer.rl.prompts import Prompts
from rlhf_fast.trainer.rl.settings import Settings


def gradients(config: PPOConfig) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics of one step, and the norms of all gradients at the first step of each optimizer."""
    agent = load_agent(config)
    prompts = prompts_of(config, agent)
    norms: dict[str, float] = {}

    def watch(model: str, optimizer: AdamW) -> None:
        step = optimizer.step

        def watched(norm: float | None = None) -> float:
            for name, parameter in getattr(agent, model).named_parameters():
                if parameter.grad is not None:
                    norms.setdefault(f"{model}.{name}", float(parameter.grad.norm()))
            return step(norm)

        optimizer.step = watched  # type: ignore[method-assign]

    watch("policy", agent.policy_optimizer)
    if agent.critic_optimizer is not None:
        watch("critic", agent.critic_optimizer)
    return train_step(agent, prompts, config, 0), norms


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
    last = metrics(run.path)[-1]
    assert summary["steps"] == 3 and summary["kl_final"] == last.get("objective/kl")
    assert ("objective/kl" in last) == (config.resolved().kl_coef != 0)
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
    known = list[int]()  # rows of metrics that a resumed run judges
    for dtype in ("float32", "bfloat16"):
        config = replace(config, dtype=dtype)
        straight, stopped = tmp_path / f"straight-{dtype}", tmp_path / f"stopped-{dtype}"
        ppo.train_ppo(config, RunFolder.create(straight))
        with monkeypatch.context() as patch:
            patch.setattr(ppo, "StopFlag", stop_at(1))
            with pytest.raises(Interrupted, match="stopped after 1 of 3 steps; --resume goes on"):
                ppo.train_ppo(config, RunFolder.create(stopped))
        assert not (stopped / "model").exists() and (stopped / "checkpoints" / "step-1").is_dir()
        with monkeypatch.context() as patch:
            patch.setattr(ppo, "Watch", lambda rows: known.append(len(rows)) or Watch(rows))
            summary = ppo.train_ppo(config, RunFolder.create(stopped, resume=True))
        assert summary["steps"] == 3 and metrics(stopped) == metrics(straight)
        ours, theirs = weights(straight), weights(stopped)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours) and ours.keys() == theirs.keys()
        assert ppo.train_ppo(config, RunFolder.create(stopped, resume=True)) == summary  # a finished run is left alone
    assert known == [1, 1]


def test_an_adapted_kl_coef_comes_back_unless_the_options_change_it(config: PPOConfig, tmp_path: Path) -> None:
    agent, run = load_agent(config), RunFolder.create(tmp_path / "run", resume=True)
    agent.kl_controller = KLController(0.9, target=1.0)
    settings = Settings(config)
    pace = Pace(settings.duration, settings.sizes, Timer())
    agents.save(agent, pace, run, 1)
    for target, changed, coef in ((1.0, (), 0.9), (1.0, ("kl_coef",), 0.1), (0.0, ("kl_target",), 0.1)):
        agent.kl_controller = KLController(0.1, target)
        run.changed = frozenset(changed)
        assert agents.restore(agent, pace, run) == 1 and agent.kl_controller.coef == coef


def test_checkpoints_come_every_save_steps_and_at_the_end(config: PPOConfig, tmp_path: Path) -> None:
    ppo.train_ppo(replace(config, save_steps=2), RunFolder.create(tmp_path / "run"))
    assert {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()} == {"step-2", "step-3"}


def test_the_time_limit_ends_the_phase_early(
    config: PPOConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder.create(tmp_path / "run")
    summary = ppo.train_ppo(replace(config, max_seconds=0.01, min_steps=1), run)
    assert summary["steps"] == 1 and (run.path / "model" / "config.json").exists()
    assert "ends the phase after 1 steps" in capsys.readouterr().err


def test_prompts_come_once_before_any_comes_again() -> None:
    prompts = Prompts([], [[0]] * 8)
    chosen = [i for place in range(0, 24, 4) for i in prompts.draw(place, 4, seed=0)]
    assert all(sorted(chosen[start : start + 8]) == list(range(8)) for start in (0, 8, 16))
    assert chosen[:8] != chosen[8:16] and chosen == prompts.draw(0, 24, seed=0)
    assert chosen != prompts.draw(0, 24, seed=1)


def test_the_critic_starts_on_the_scores(config: PPOConfig) -> None:
    agent = load_agent(config)
    mask = torch.arange(5) < torch.tensor([5, 2, 3])[:, None]
    scores = torch.tensor([1.0, -1.0, 0.5])
    before = (2.0 * scores[:, None] - 3.0 + 0.1 * torch.randn(3, 5)) * mask
    weight, bias = agent.critic.score.weight.clone(), agent.critic.score.bias.clone()
    after = agents.calibrate_critic(agent.critic, before, scores, mask)
    targets = scores[:, None].expand(3, 5)[mask]
    assert ((after[mask] - targets) ** 2).mean() < 0.02 and not after[~mask].any()
    slope = (agent.critic.score.weight / weight).mean()
    torch.testing.assert_close(after[mask], (slope * before + agent.critic.score.bias - slope * bias)[mask])


def test_each_epoch_has_the_minibatches_in_an_order_of_its_own(
    config: PPOConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, objective="grpo", epochs=4, num_minibatches=4)
    order: list[tuple[int, ...]] = []
    one_step = learn.learn

    def noted(gradients: Any, plan: list[torch.Tensor], *rest: Any) -> Any:
        order.append(tuple(torch.cat(plan).tolist()))
        return one_step(gradients, plan, *rest)

    monkeypatch.setattr(learn, "learn", noted)
    agent = load_agent(config)
    prompts = prompts_of(config, agent)
    train_step(agent, prompts, config, 0)
    epochs = [tuple(order[i : i + 4]) for i in range(0, 16, 4)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs) and len(set(epochs)) > 2
    train_step(agent, prompts, config, 1)
    first, second = ({frozenset(part) for part in order[i : i + 4]} for i in (0, 16))
    assert first != second  # each step divides its samples anew


def test_an_update_stops_when_the_policy_has_moved_far(config: PPOConfig, tmp_path: Path) -> None:
    common = {"epochs": 5, "num_minibatches": 2, "lr": 1e-2, "max_steps": 1}
    assert steps(config, tmp_path / "whole", **common)[0]["policy/updates"] == 10
    assert 1 < steps(config, tmp_path / "short", early_stop_kl=1e-3, **common)[0]["policy/updates"] < 10


def test_an_update_stops_behind_the_minibatch_that_moved_too_far(
    config: PPOConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    distances = iter([0.02, 0.04, 0.03, 0.07, 0.01])
    monkeypatch.setattr(learn, "learn", lambda *rest: {"policy/approxkl_avg": next(distances)})
    config = replace(config, objective="grpo", epochs=3, num_minibatches=2, early_stop_kl=0.05)
    agent = load_agent(config)
    figures = train_step(agent, prompts_of(config, agent), config, 0)
    assert figures["policy/updates"] == 4 and figures["policy/approxkl_avg"] == pytest.approx(0.04)


def test_the_gap_of_two_passes_is_the_largest_of_a_steps_first_minibatch(
    config: PPOConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, micro_batch_size=6, num_minibatches=1, epochs=2)
    agent = load_agent(config)
    prompts, gaps = prompts_of(config, agent), iter([0.1, 0.3, 0.2, 0.0, 0.0, 0.0])
    monkeypatch.setattr(learn, "check_ratio", lambda *rest: next(gaps))
    assert [train_step(agent, prompts, config, step)["policy/ratio_gap"] for step in range(2)] == [0.3, 0.0]


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
    agent = load_agent(config)
    prompts = prompts_of(config, agent)
    separate = models.load_causal_lm(config.model, "float32")
    for step in range(2):
        train_step(agent, prompts, config, step)
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
