# SPDX-License-Identifier: Apache-2.0
"""Rewards: a model, functions, or a weighted sum; and a function that fails stops the run without a loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_fast import cli
from rlhf_fast.data.examples import PromptLine
from rlhf_fast.errors import UserError
from rlhf_fast.models.batches import Batch
from rlhf_fast.models.heads import sequence_scores
from rlhf_fast.models.loading import load_reward_model, load_tokenizer
from rlhf_fast.run.folder import RunFolder
from rlhf_fast.trainer import PPOConfig
from rlhf_fast.trainer.rl.ppo import train_ppo
from rlhf_fast.trainer.rl.reward_functions import load_functions
from rlhf_fast.trainer.rl.rewards import Rewards


@pytest.fixture
def rules(tmp_path: Path) -> str:
    """A file of reward functions; `flaky` fails from its ninth call on while the file `broken` exists."""
    path = tmp_path / "rules.py"
    path.write_text(
        "import pathlib\n"
        "calls = []\n"
        "def words(prompt, completions): return [len(c.split()) for c in completions]\n"
        "def cats(prompt, completions): return [c.split().count('cat') for c in completions]\n"
        "def flaky(prompt, completions):\n"
        "    calls.append(prompt)\n"
        "    broken = len(calls) > 8 and (pathlib.Path(__file__).parent / 'broken').exists()\n"
        "    return [float('nan') if broken else len(c) / 10 for c in completions]\n"
    )
    return str(path)


def config(tiny: Path, folder: Path, **values: Any) -> PPOConfig:
    common = {"model": str(tiny / "model"), "prompts_file": str(tiny / "feedback_prompts.jsonl"), "dtype": "float32"}
    sizes = {"max_length": 32, "max_new_tokens": 8, "prompts_per_step": 4, "samples_per_prompt": 4, "max_steps": 4}
    return PPOConfig(**{**common, **sizes, "output_dir": str(folder), "lr": 1e-3, "critic_lr": 1e-3, **values})


def test_the_reward_is_a_weighted_sum(tiny: Path, rules: str) -> None:
    tokenizer = load_tokenizer(str(tiny / "model"))
    model = load_reward_model(str(tiny / "model"), torch.float32, tokenizer)
    ids = torch.tensor([tokenizer(text)["input_ids"] for text in ("ann cat", "ann dog", "ben cat", "ben red")])
    batch = Batch(ids, torch.ones_like(ids).bool(), torch.ones_like(ids).bool())
    functions = load_functions((f"2*{rules}:cats", f"-0.5 * {rules}:words"))
    texts = ["cat", "dog", "cat cat", "red"]
    lines = [PromptLine("ann", "f:1"), PromptLine("ben", "f:2")]
    total = Rewards(model, functions)(batch, [torch.arange(4)], lines, texts).total
    with torch.no_grad():
        scores = sequence_scores(model, batch)
    torch.testing.assert_close(total, scores + torch.tensor([1.5, -0.5, 3.0, -0.5]))
    assert Rewards(None, functions).of_functions(lines[:1], texts).total.tolist() == [1.5, -0.5, 3.0, -0.5]
    rows = [
        {"prompt": "ann", "completion": "cat", "reward": 2.0},
        {"prompt": "ann", "completion": "dog", "reward": 0.0},
    ]
    assert Rewards(model, functions).add_functions(rows, lines[:1]) == pytest.approx((3.5 - 0.5) / 2)


def test_wrong_functions_are_named(rules: str) -> None:
    with pytest.raises(UserError, match="'two' before the [*] in 'two[*].*' is no number"):
        load_functions((f"two*{rules}:cats",))
    with pytest.raises(UserError, match="has no function 'dogs'"):
        load_functions((f"{rules}:dogs",))


def test_functions_alone_teach_the_policy(tiny: Path, tmp_path: Path, rules: str) -> None:
    settings = config(
        tiny,
        tmp_path / "run",
        reward_functions=(f"{rules}:words",),
        eval_prompts_file=str(tiny / "heldout.jsonl"),
        objective="rloo",
        max_steps=15,
        kl_coef=0.0,
        score_clip=0.0,
    )
    summary = train_ppo(settings, RunFolder.create(settings.output_dir))
    assert summary["reward_after"] > summary["reward_before"] + 0.5
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert all(row["reward"] == len(row["completion"].split()) for row in rows)


def test_a_function_that_fails_stops_the_run_and_resume_goes_on_as_if_it_had_not(
    tiny: Path, tmp_path: Path, rules: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = config(tiny, tmp_path / "whole", reward_functions=(f"{rules}:flaky",))
    train_ppo(whole, RunFolder.create(whole.output_dir))
    (tmp_path / "broken").touch()
    options = ["ppo", "--config", str(tmp_path / "c.yaml")]
    stopped = config(tiny, tmp_path / "run", reward_functions=(f"{rules}:flaky",))
    names = ("model", "prompts_file", "dtype", "max_length", "max_new_tokens", "prompts_per_step", "max_steps")
    lines = {name: getattr(stopped, name) for name in (*names, "samples_per_prompt", "lr", "critic_lr", "output_dir")}
    (tmp_path / "c.yaml").write_text(json.dumps({**lines, "reward_functions": ["rules.py:flaky"]}))
    assert cli.main(options) == 2
    error = capsys.readouterr().err
    assert "rules.py:flaky' on the prompt '" in error and "returned nan for '" in error
    assert "saved after 2 steps, --resume goes on from there" in error and "Traceback" not in error
    (tmp_path / "broken").unlink()
    assert cli.main([*options, "--resume"]) == 0
    ours, theirs = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
