# SPDX-License-Identifier: Apache-2.0
"""DAPO's dynamic sampling: prompts whose samples all earned the same are replaced, in rounds, up to a bound."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import phases
from safetensors.torch import load_file
from torch import Tensor

from rlhf_fast.errors import Interrupted, UserError
from rlhf_fast.models.batches import Support
from rlhf_fast.rollout.builtin import generate
from rlhf_fast.rollout.rollout import Rollout
from rlhf_fast.run.folder import RunFolder
from rlhf_fast.trainer import PPOConfig
from rlhf_fast.trainer.rl import ppo
from rlhf_fast.trainer.rl.dynamic_sampling import refill
from rlhf_fast.trainer.rl.metrics import Watch
from rlhf_fast.trainer.rl.rewards import LengthRules

SAMPLES = 2


def rollout(first: int, scores: list[float], width: int = 5) -> Rollout:
    """Prompts numbered from `first`, two samples each, whose first token is the prompt's number and whose last two are
    sampled; each of these keeps as many ids as the prompt's number says."""
    rows, prompts = len(scores), [first + i // SAMPLES for i in range(len(scores))]
    columns = torch.arange(width).expand(rows, width)
    counts = torch.tensor(prompts).repeat_interleave(2)
    support = Support.of_counts(counts.repeat_interleave(counts), counts)
    ids = columns.clone()
    ids[:, 0] = torch.tensor(prompts)
    return Rollout(
        ids,
        torch.ones(rows, width, dtype=torch.bool),
        columns >= width - 2,
        [f"{prompt}-{row % SAMPLES}" for row, prompt in enumerate(prompts)],
        torch.tensor([row % 2 == 0 for row in range(rows)]),
        support,
        torch.tensor(scores).float(),
    )


def earned(made: Rollout) -> Tensor:
    assert made.scores is not None
    return made.scores


ROUNDS = [
    rollout(1, [0, 1, 1, 1, 0, 0]),  # 1 teaches; 2 and 3 do not
    rollout(4, [5, 5, 2, 3, 7, 7], width=7),  # 5 teaches
    rollout(7, [1, 2, 1, 2, 3, 3]),  # 7 and 8 teach, one more than is needed
    rollout(10, [0, 1, 0, 1, 0, 1]),  # never asked
]


def test_rounds_are_drawn_until_the_batch_is_full() -> None:
    asked: list[int] = []

    def draw(extra: int) -> Rollout:
        asked.append(extra)
        return ROUNDS[extra]

    made, figures = refill(draw, earned, wanted=3, rounds=9)
    assert asked == [0, 1, 2] and made.texts == ["1-0", "1-1", "5-0", "5-1", "7-0", "7-1"]
    assert made.scores is not None and made.scores.tolist() == [0, 1, 2, 3, 1, 2]
    assert made.input_ids[:, 0].tolist() == [1, 1, 5, 5, 7, 7] and made.ended.tolist() == [True, False] * 3
    assert made.response_mask.sum(1).tolist() == [2] * 6 and made.attention_mask.sum(1).tolist() == [5, 5, 7, 7, 5, 5]
    assert made.support is not None and made.support.offsets.diff().tolist() == [1] * 4 + [5] * 4 + [7] * 4
    assert made.support.ids.tolist() == [1] * 4 + [5] * 20 + [7] * 28
    mean = sum(float(earned(one).sum()) for one in ROUNDS[:3]) / 18
    assert figures == pytest.approx(
        {"sample/extra_rounds": 2, "sample/dropped": 5, "sample/unfilled": 0, "sample/scores_drawn": mean}
    )


def test_as_many_as_are_wanted_are_enough() -> None:
    _, figures = refill(lambda extra: [ROUNDS[0], ROUNDS[2]][extra], earned, wanted=3, rounds=9)
    assert figures["sample/extra_rounds"] == 1 and figures["sample/dropped"] == 3


def test_at_the_bound_the_oldest_fill_the_batch() -> None:
    made, figures = refill(lambda extra: ROUNDS[extra], earned, wanted=3, rounds=1)
    assert made.texts == ["1-0", "1-1", "5-0", "5-1", "2-0", "2-1"]
    assert [figures[f"sample/{name}"] for name in ("extra_rounds", "dropped", "unfilled")] == [1, 3, 1]
    good = {"objective/entropy": 2.0, "sample/ended": 0.5, "objective/scores_std": 1.0}
    watch = Watch()
    (message,) = watch.look({**good, **figures})
    assert "1 prompts of this step teach nothing" in message and "dynamic_sampling 1 found no others" in message
    assert watch.look({**good, **figures}) == []


def test_without_extra_rounds_nothing_is_touched() -> None:
    made, figures = refill(lambda extra: ROUNDS[extra], earned, wanted=3, rounds=0)
    assert made is ROUNDS[0] and figures == {}


def test_joining_and_choosing_keep_rows_whole() -> None:
    both = Rollout.concatenate(ROUNDS[:2])
    for part, rows in ((ROUNDS[0], torch.arange(6)), (ROUNDS[1], torch.arange(6, 12))):
        back = both.rows(rows)
        for one, other in zip(vars(back).values(), vars(part).values(), strict=True):
            assert all(map(torch.equal, one, other)) if isinstance(one, Support) else str(one) == str(other)


@pytest.fixture
def config(job_data: Path) -> PPOConfig:
    job = phases.jobs(job_data)["dynamic"]
    assert isinstance(job, PPOConfig)
    return dataclasses.replace(job, save_steps=0)


def samples_seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What each step learns from."""
    seen: list[Any] = []
    learn = ppo.update
    monkeypatch.setattr(
        ppo, "update", lambda agent, found, *rest, **more: seen.append(found) or learn(agent, found, *rest, **more)
    )
    return seen


@pytest.mark.parametrize("objective", ["dapo", "rloo", "dpo"])
def test_every_prompt_of_a_full_batch_teaches(
    config: PPOConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str
) -> None:
    seen = samples_seen(monkeypatch)
    config = dataclasses.replace(
        config, objective=objective, dynamic_sampling=20, kl_coef=0.0 if objective != "dpo" else 0.1
    )
    ppo.train_ppo(config, RunFolder.create(tmp_path / "run"))
    rows = phases.metrics(tmp_path / "run")
    assert sum(row["sample/dropped"] for row in rows) > 0 and all(row["sample/unfilled"] == 0 for row in rows)
    for found in seen:
        if objective == "dpo":
            assert (found.rewards[0::2] > found.rewards[1::2]).all()
        else:
            assert (found.advantages.abs().sum(1) > 0).all()


def test_equal_up_to_rounding_is_equal() -> None:
    """The scores of the first two prompts differ by float32's rounding, or by bfloat16's."""
    near = rollout(1, [6.65, float(torch.nextafter(torch.tensor(6.65), torch.tensor(9.0))), 1.0, 1.0078125, 0, 1])
    rounded = [dataclasses.replace(one, rounding=torch.full((6,), 2.0**-6)) for one in (near, ROUNDS[1])]
    found, figures = refill(rounded.__getitem__, earned, wanted=3, rounds=1)
    assert found.texts[:4] == ["3-0", "3-1", "5-0", "5-1"] and figures["sample/unfilled"] == 1
    _, figures = refill(lambda extra: [near, ROUNDS[1]][extra], earned, wanted=3, rounds=1)
    assert figures["sample/unfilled"] == 0  # of functions, 1.0078 is not 1


def test_the_soft_punishment_of_length_makes_no_difference() -> None:
    """Yu et al. 2025, eq. 11: two right answers teach nothing, however long they are."""
    rules = LengthRules(overlong_penalty=1.0, overlong_buffer=0.5, max_new_tokens=4, missing_eos_penalty=0.25)
    made = rollout(1, [1, 1])
    assert rules.apply(made, punish=False).tolist() == [1.0, 0.75]
    assert rules.apply(made).tolist() == [1.0, 0.75]  # two tokens of four
    made.response_mask[:] = torch.tensor([[False, True, True, True, False], [True] * 4 + [False]])
    assert rules.apply(made).tolist() == [0.5, -0.25]


def test_samples_that_differ_in_length_alone_are_drawn_anew(
    config: PPOConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one.py").write_text("def one(prompt, completions): return [1.0] * len(completions)\n")
    one = dataclasses.replace(config, reward_functions=(f"{tmp_path}/one.py:one",), dynamic_sampling=1, max_steps=2)
    one = dataclasses.replace(one, overlong_penalty=1.0, overlong_buffer=1.0, missing_eos_penalty=0.0)
    prompts, seeds = list[tuple[int, ...]](), set[int]()

    def noted(model: Any, tokenizer: Any, ids: list[list[int]], *rest: Any, **more: Any) -> Rollout:
        prompts.extend(map(tuple, ids))
        seeds.add(more["seed"])
        return generate(model, tokenizer, ids, *rest, **more)

    one = dataclasses.replace(one, top_k=0)
    monkeypatch.setattr(ppo, "check_distribution", lambda *rest: pytest.fail("of selected samples, which may differ"))
    ppo.train_ppo(one, RunFolder.create(tmp_path / "run"), noted)
    for row in phases.metrics(tmp_path / "run"):
        assert row["sample/unfilled"] == one.prompts_per_step and row["sample/extra_rounds"] == 1
    assert len(set(prompts)) == len(prompts) == 4 * one.prompts_per_step and len(seeds) == 4  # none twice
    other = dataclasses.replace(one, seed=one.seed + 1, max_steps=1)
    ppo.train_ppo(other, RunFolder.create(tmp_path / "other"), noted)
    assert len(seeds) == 6


def test_an_interrupted_run_goes_on_behind_the_prompts_it_has_asked(
    config: PPOConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: Callable[[int], Any]
) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    ppo.train_ppo(config, RunFolder.create(straight))
    with monkeypatch.context() as patch:
        patch.setattr(ppo, "StopFlag", stop_at(2))
        with pytest.raises(Interrupted, match="stopped after 2 of 3 steps"):
            ppo.train_ppo(config, RunFolder.create(stopped))
    ppo.train_ppo(config, RunFolder.create(stopped, resume=True))
    assert phases.metrics(straight) == phases.metrics(stopped)
    assert sum(row["sample/extra_rounds"] for row in phases.metrics(straight)[:2]) > 0
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (straight, stopped))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("objective", ["ppo", "reinforce++"])
def test_objectives_that_compare_nothing_refuse_it(config: PPOConfig, objective: str) -> None:
    with pytest.raises(
        UserError, match=f"dynamic_sampling is for an objective that compares .*'{re.escape(objective)}'"
    ):
        dataclasses.replace(config, objective=objective).validate()
