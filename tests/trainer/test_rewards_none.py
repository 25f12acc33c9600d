# SPDX-License-Identifier: Apache-2.0
"""Reward functions that return None for completions that they do not score, as TRL has it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlhf_fast.feedback.raters import RaterError
from rlhf_fast.run.folder import RunFolder
from rlhf_fast.trainer.rl.ppo import train_ppo
from rlhf_fast.trainer.rl.reward_functions import load_functions
from rlhf_fast.trainer.rl.rewards import Rewards

from .test_rewards import config, lines_of


@pytest.fixture
def silent(tmp_path: Path) -> str:
    """A file of functions: `first` and `second` score completions of one letter each, `all` every one."""
    (path := tmp_path / "silent.py").write_text(
        "def first(completions, **columns): return [2.0 if 'a' in c else None for c in completions]\n"
        "def second(completions, **columns): return [3.0 if 'b' in c else None for c in completions]\n"
        "def all(completions, **columns): return [1.0] * len(completions)\n"
    )
    return str(path)


def test_none_leaves_a_function_out_of_a_samples_sum_as_in_trl(silent: str) -> None:
    """TRL: (rewards_per_func * weights).nansum(1), and the mean of each function over what it scores (nanmean)."""
    rewards = Rewards(None, load_functions((f"{silent}:first", f"0.5*{silent}:second")))
    scores = rewards.of_functions(lines_of({}, {}), ["a", "b", "ab", "a"])
    per_function = torch.tensor([[2, math.nan], [math.nan, 3], [2, 3], [2, math.nan]])
    assert torch.equal(scores.total, (per_function * torch.tensor([1.0, 0.5])).nansum(1))
    assert scores.parts["rewards/second"].isnan().tolist() == [True, False, False, True]
    rows = [{"completion": text} for text in ("a", "b")]
    means = rewards.add_to(rows, lines_of({}, {}))
    assert means == {"reward": 1.75, "rewards/first": 2.0, "rewards/second": 3.0}
    assert rows[0] == {"completion": "a", "reward": 2.0, "rewards/first": 2.0} and "rewards/first" not in rows[1]


def test_a_completion_that_nothing_scores_is_named(silent: str, tiny: Path, tmp_path: Path) -> None:
    rewards = Rewards(None, load_functions((f"{silent}:first", f"{silent}:second")))
    with pytest.raises(
        RaterError, match=r"first, second: no reward function scores 'c' of the prompt f:1, all .* \(2 of 4 comp"
    ):
        rewards.of_functions(lines_of({}, {}), ["a", "b", "c", "d"])
    everything = Rewards(None, load_functions((f"{silent}:first", f"{silent}:all")))
    assert everything.of_functions(lines_of({}), ["a", "c"]).total.tolist() == [3, 1]
    assert Rewards(object(), load_functions((f"{silent}:first",))).of_functions(lines_of({}), ["c"]).total == 0


def test_the_step_means_each_function_over_what_it_scores(silent: str, tiny: Path, tmp_path: Path) -> None:
    (path := Path(silent)).write_text(
        Path(silent).read_text() + "def few(completions, **c): return [7.0, *[None] * (len(completions) - 1)]\n"
    )
    wanted = config(tiny, tmp_path / "run", objective="grpo", reward_functions=(f"{path}:all", f"{path}:few"))
    train_ppo(replace(wanted, max_steps=1), RunFolder.create(tmp_path / "run"))
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert row["rewards/all"] == 1 and row["rewards/few"] == 7 and row["objective/scores"] == pytest.approx(1 + 7 / 16)
    assert not any(name.startswith("val/") for name in row)  # there is no critic
