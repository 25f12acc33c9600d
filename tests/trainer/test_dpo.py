# SPDX-License-Identifier: Apache-2.0
"""DPO: pairs of sampled completions, or of those that people ranked."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ppo_runs import load_agent, prompts_of, replace, steps, train_step

from rlhf_fast.errors import UserError
from rlhf_fast.report.doctor import diagnose
from rlhf_fast.report.page import write_report
from rlhf_fast.rollout.rollout import Rollout
from rlhf_fast.run.progress import Timer
from rlhf_fast.run.records import read_jsonl
from rlhf_fast.trainer import PPOConfig
from rlhf_fast.trainer.rl import ppo
from rlhf_fast.trainer.rl.objectives.dpo import PairOptions, best_and_worst, pair_figures, pair_loss
from rlhf_fast.trainer.rl.pace import Duration, Pace
from rlhf_fast.trainer.rl.prompts import read_data, read_prompts_or_feedback
from rlhf_fast.trainer.rl.score import choose_samples
from rlhf_fast.trainer.rl.settings import Settings


def test_dpo_learns_what_people_preferred(config: PPOConfig, write_jsonl: Any, tmp_path: Path) -> None:
    prompts = [json.loads(line)["prompt"] for line in Path(config.prompts_file).read_text().splitlines()[:8]]
    rows = [{"prompt": p, "completions": [" the cat", " a dog", " red"], "ratings": [3, 1, 2]} for p in prompts]
    path = write_jsonl("feedback.jsonl", *rows)
    config = replace(config, objective="dpo", prompts_file=path, reward_model="", kl_coef=0.5, max_steps=8, lr=5e-3)
    config = replace(config, num_minibatches=1, eval_prompts_file=write_jsonl("held_out.jsonl", {"prompt": prompts[0]}))
    rows = steps(config, tmp_path / "ppo")
    assert rows[0]["loss/policy_avg"] == pytest.approx(math.log(2), abs=0.05)
    last = rows[-1]
    assert last["loss/policy_avg"] < 0.3 and last["rewards/accuracies"] == 1
    assert last["rewards/chosen"] - last["rewards/rejected"] == pytest.approx(last["rewards/margins"])
    assert last["rewards/margins"] == pytest.approx(-math.log(math.exp(last["loss/policy_avg"]) - 1), rel=0.5)
    # People's texts are not samples: what the policy thinks of them is no KL, no reward, and no sign of a collapse.
    assert not [name for name in last if name.startswith("sample/") or name in ("objective/kl", "objective/scores")]
    assert not [finding for finding in diagnose(tmp_path) if "log-probs are not of the distribution" in finding.text]
    # Nothing scores the samples of held-out prompts: they have no reward, not one of 0.
    summary = json.loads((tmp_path / "ppo" / "summary.json").read_text())
    assert "kl_after" in summary and not [name for name in summary if name.startswith("reward")]
    samples = read_jsonl(tmp_path / "ppo" / "samples.jsonl")
    assert len(samples) == 2 * config.eval_samples and not any("reward" in row for row in samples)
    assert [finding for finding in diagnose(tmp_path) if "nothing scores the samples" in finding.text]
    assert samples[0]["completion"].split()[0] in write_report(tmp_path).read_text().partition("Held-out samples")[2]
    config = replace(config, eval_steps=2, keep_best=True)
    with pytest.raises(UserError, match="keep_best compares rewards: set reward_model or reward_functions"):
        config.validate()


def test_dpo_pairs_completions_of_one_prompt(
    config: PPOConfig, write_jsonl: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Feedback brings two completions a prompt, whatever samples_per_prompt says."""
    prompts = [json.loads(line)["prompt"] for line in Path(config.prompts_file).read_text().splitlines()[:4]]
    ratings = [[1, 9], [2, 8], [7, 3], [6, 4]]  # over all prompts the extremes are those of the first
    rows = [{"prompt": p, "completions": [" cat", " dog"], "ratings": r} for p, r in zip(prompts, ratings, strict=True)]
    config = replace(config, objective="dpo", prompts_file=write_jsonl("feedback.jsonl", *rows), reward_model="")
    assert config.samples_per_prompt == 4
    seen: list[Any] = []
    learn = ppo.update
    monkeypatch.setattr(
        ppo, "update", lambda agent, found, *rest, **more: seen.append(found) or learn(agent, found, *rest, **more)
    )
    agent = load_agent(config)
    train_step(agent, prompts_of(config, agent), config, 0)
    batch = seen[0].batch
    begins = [row[: int(mask.long().argmax())].tolist() for row, mask in zip(batch.input_ids, batch.mask, strict=True)]
    assert len(begins) == 8 and begins[0::2] == begins[1::2] and len({tuple(ids) for ids in begins}) == 4
    assert (seen[0].rewards[0::2] > seen[0].rewards[1::2]).all()


def test_dpo_takes_the_best_and_the_worst_sample() -> None:
    scores = torch.tensor([1.0, 3.0, 2.0, 5.0, 5.0, 5.0])
    assert best_and_worst(scores, 3).tolist() == [1, 0, 3, 3]
    log_ratios = torch.tensor([[1.0, -0.5], [-1.0, -1.0]]).requires_grad_()
    rewards = torch.tensor([[3.0, 1.0], [5.0, 5.0]])
    loss = pair_loss(log_ratios, rewards, PairOptions(beta=0.1))
    assert loss.item() == pytest.approx(-math.log(1 / (1 + math.exp(-0.15))))
    (found,) = pair_figures(log_ratios.detach(), rewards, 0.1).tolist()  # of the first prompt alone
    assert found == pytest.approx([0.1, -0.05, 1])
    loss.backward()
    assert not log_ratios.grad[1].any()  # type: ignore[index]  # a tie teaches nothing
    assert pair_figures(torch.zeros(1, 2), torch.tensor([[2.0, 1.0]]), 0.1)[0, 2] == 0  # nothing was raised more
    near, rounding = torch.tensor([[1.0, 1.0078125]]), torch.full((1, 2), 2.0**-6)  # scores of one text in bfloat16
    assert pair_loss(torch.tensor([[1.0, -1.0]]), near, PairOptions(), rounding) == 0


def test_the_best_and_the_worst_are_those_of_the_rewards_with_all_penalties(config: PPOConfig) -> None:
    """The first score of each prompt is the highest, and that of a sample that was cut off."""
    config = replace(config, objective="dpo", missing_eos_penalty=4.0)
    ids = torch.arange(6)[:, None].repeat(1, 3)
    real, ended = torch.ones(6, 3, dtype=torch.bool), torch.tensor([False, True, True, False, True, True])
    scores = torch.tensor([3.0, 1.0, 2.0, 9.0, 7.0, 6.0])
    rollout = Rollout(ids, real, real & (torch.arange(3) > 0), list("abcdef"), ended, scores=scores, rounding=scores)
    chosen, unit = choose_samples(rollout, Settings(config.resolved()).step.score, prompts=2)
    assert unit == 2 and chosen.texts == ["c", "a", "e", "d"] and chosen.input_ids[:, 0].tolist() == [2, 0, 4, 3]
    assert chosen.rounding is not None and chosen.rounding.tolist() == [2.0, 3.0, 7.0, 9.0]
    every = Settings(replace(config, dpo_pairs="all").resolved()).step.score
    assert choose_samples(rollout, every, prompts=2) == (rollout, 3)


def test_an_update_knows_how_exact_scores_in_16_bits_are(config: PPOConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(config, objective="dpo", samples_per_prompt=3)
    seen: list[Any] = []
    learn = ppo.update
    monkeypatch.setattr(
        ppo, "update", lambda agent, found, *rest, **more: seen.append(found) or learn(agent, found, *rest, **more)
    )
    agent = load_agent(config)
    agent.rewards.model.bfloat16()
    train_step(agent, prompts_of(config, agent), config, 0)
    (found,) = seen
    assert len(found.rewards) == 8  # the best and the worst of each prompt
    assert found.rounding is not None and torch.equal(found.rounding, 2**-6 * found.rewards.abs().clamp(min=1))


@pytest.mark.parametrize("options", [PairOptions(0.3), PairOptions(0.3, label_smoothing=0.2), PairOptions(0.3, "ipo")])
def test_every_two_samples_that_differ_are_a_pair(options: PairOptions) -> None:
    generator = torch.Generator().manual_seed(0)
    log_ratios = torch.randn(3, 4, generator=generator)
    rewards = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 2.0, 1.0 + 1e-8], [7.0, 7.0, 7.0, 7.0]])
    total = accuracy = gap = 0.0
    for row, goodness in zip(log_ratios.tolist(), rewards.tolist(), strict=True):
        pairs = [(i, j) for i in range(4) for j in range(4) if goodness[i] - goodness[j] > 1e-5]
        for i, j in pairs:
            margin, beta, smoothing = row[i] - row[j], options.beta, options.label_smoothing
            if options.loss == "ipo":
                loss = (margin - 1 / (2 * beta)) ** 2
            else:
                loss = (1 - smoothing) * math.log1p(math.exp(-beta * margin))
                loss += smoothing * math.log1p(math.exp(beta * margin))
            total += loss / len(pairs)
            accuracy += (margin > 0) / len(pairs)
            gap += margin / len(pairs)
    assert float(pair_loss(log_ratios, rewards, options)) == pytest.approx(total, rel=1e-5)
    near = rewards.where(rewards != 2, 1.01)  # as good as 1 for a model that rounds by 1/64, not for people
    assert float(pair_loss(log_ratios, near, options, torch.full_like(near, 2.0**-6))) == pytest.approx(
        float(pair_loss(log_ratios, rewards.where(rewards != 2, 1.0), options))
    )
    chosen, rejected, right = pair_figures(log_ratios, rewards, options.beta).sum(0).tolist()
    assert right == pytest.approx(accuracy) and chosen - rejected == pytest.approx(options.beta * gap, rel=1e-5)


def test_all_pairs_of_a_ranking_by_epochs(config: PPOConfig, write_jsonl: Any, tmp_path: Path) -> None:
    """Three completions of which two tie are two pairs; four such prompts, two pairs a step, two passes: 8 steps."""
    prompts = [json.loads(line)["prompt"] for line in Path(config.prompts_file).read_text().splitlines()[:4]]
    rows = [{"prompt": p, "completions": [" the cat", " a dog", " red"], "ratings": [3, 1, 1]} for p in prompts]
    config = replace(config, objective="dpo", dpo_pairs="all", reward_model="", num_minibatches=1, prompts_per_step=2)
    config = replace(config, prompts_file=write_jsonl("feedback.jsonl", *rows), prompt_epochs=2, max_steps=99, lr=5e-3)
    figures = steps(config, tmp_path / "run")
    assert len(figures) == 8 and figures[0]["loss/policy_avg"] == pytest.approx(math.log(2), abs=0.05)
    assert figures[-1]["rewards/accuracies"] == 1


@pytest.mark.parametrize(
    "values", [{"dpo_pairs": "all"}, {"dpo_loss": "ipo", "dpo_pairs": "all", "label_smoothing": 0.0}]
)
def test_online_pairs_do_not_depend_on_the_micro_batches(
    config: PPOConfig, tmp_path: Path, values: dict[str, Any]
) -> None:
    config = replace(config, objective="dpo", max_steps=2, **values)
    whole, cut = (steps(config, tmp_path / f"{size}", micro_batch_size=size) for size in (64, 1))
    for one, other in zip(whole, cut, strict=True):
        assert other == pytest.approx(one, rel=2e-3, abs=2e-4)


@pytest.mark.parametrize("values", [{"kl_target": 1.0}, {"missing_eos_penalty": 1.0}, {"missing_eos_score": 0.0}])
def test_people_do_not_rank_by_options_of_samples(config: PPOConfig, write_jsonl: Any, values: dict[str, Any]) -> None:
    row = {"prompt": "ann", "completions": [" cat", " dog"], "ratings": [1, 2]}
    config = replace(config, objective="dpo", prompts_file=write_jsonl("feedback.jsonl", row), **values)
    config.validate()  # with prompts alone there are samples
    with pytest.raises(
        UserError, match=f"holds ranked completions, so nothing is sampled: leave out {[*values][0]}, or"
    ):
        read_data(Settings(config).data, [], None)


def test_minibatches_share_prompts_not_samples(config: PPOConfig) -> None:
    """The samples of a prompt stay together, so four minibatches cannot share six prompts, whose samples are 24."""
    config = replace(config, objective="dpo", prompts_per_step=6)
    assert (
        config.resolved().num_minibatches == 2 and replace(config, prompts_per_step=3).resolved().num_minibatches == 1
    )
    with pytest.raises(UserError, match="num_minibatches 4 must divide prompts_per_step = 6"):
        replace(config, num_minibatches=4).validate()
    replace(config, num_minibatches=4, objective="rloo").validate()
    pace = Pace(Duration(9, 1, 1.0), Settings(replace(config, prompts_per_step=8, num_minibatches=4)).sizes, Timer())
    assert pace._valid(7) == 4


def test_dpo_on_prompts_alone_needs_something_that_scores(config: PPOConfig) -> None:
    with pytest.raises(UserError, match="say what samples are worth"):
        read_prompts_or_feedback(config.prompts_file, feedback=True, scored=False)


def test_people_who_rate_99_and_100_prefer_one(config: PPOConfig, write_jsonl: Any) -> None:
    """A reward model in 16 bits, here for evaluations alone, says nothing about how exact people's ratings are."""
    prompts = [json.loads(line)["prompt"] for line in Path(config.prompts_file).read_text().splitlines()[:4]]
    rows = [{"prompt": p, "completions": [" cat", " dog"], "ratings": [99, 100]} for p in prompts]
    config = replace(config, objective="dpo", prompts_file=write_jsonl("feedback.jsonl", *rows), dtype="bfloat16")
    agent = load_agent(config)
    assert train_step(agent, prompts_of(config, agent), config, 0)["loss/policy_avg"] == pytest.approx(
        math.log(2), rel=0.2
    )
