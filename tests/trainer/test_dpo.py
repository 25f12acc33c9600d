# SPDX-License-Identifier: Apache-2.0
"""DPO: pairs of sampled completions, or of those that people ranked."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ppo_runs import asked, replace, steps

from rlhf_fast.errors import UserError
from rlhf_fast.run.progress import Timer
from rlhf_fast.trainer import PPOConfig
from rlhf_fast.trainer.rl import agent as agents
from rlhf_fast.trainer.rl import objectives, ppo
from rlhf_fast.trainer.rl.prompts import read_asked


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
