# SPDX-License-Identifier: Apache-2.0
"""The tiny pipeline end to end, on the native and on the torch backend: every phase, and what it must reach."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_fast.errors import UserError
from rlhf_fast.run.options import load_config
from rlhf_fast.trainer import PipelineConfig
from rlhf_fast.trainer.pipeline import run_pipeline

FILES = {
    "sft.train_file": "sft",
    "sft.eval_file": "heldout",
    "collect.prompts_file": "feedback_prompts",
    "ppo.prompts_file": "feedback_prompts",
    "ppo.eval_prompts_file": "heldout",
}


TINY = Path(__file__).parents[2] / "examples" / "tiny"


def tiny_config(tiny: Path, folder: Path) -> PipelineConfig:
    """examples/tiny/tiny.yaml with the data of the test session."""
    files = {key: str(tiny / f"{name}.jsonl") for key, name in FILES.items()}
    overrides = {**files, "model": str(tiny / "model"), "output_dir": str(folder)}
    return load_config(PipelineConfig, TINY / "tiny.yaml", overrides)


@pytest.mark.parametrize("backend", ["native", "torch"], indirect=True)  # interpreters would take an hour
def test_the_tiny_pipeline_learns(backend: str, tiny: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny, tmp_path / "run")
    config.trackers = ("tensorboard",)
    summary = run_pipeline(config)

    ppo = summary["ppo"]
    assert summary["sft"]["loss_before"] - summary["sft"]["loss_after"] > 0.8
    assert summary["reward"]["heldout_pair_accuracy"] >= 0.90
    assert ppo["gold_after"] >= 0.70 and ppo["gold_after"] - ppo["gold_before"] >= 0.25
    assert ppo["reward_after"] > ppo["reward_before"] and 0 <= ppo["kl_final"] <= 8
    assert ppo["steps"] == 60 and ppo["entropy_after"] > 0.5

    folder = tmp_path / "run"
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert set(summary["seconds"]) == {"total", "sft", "collect", "reward", "ppo"}
    assert summary["backend"]["linear_token_logprobs/cpu"].startswith(backend)
    page = (folder / "report.html").read_text()
    assert all(title in page for title in ("Supervised fine-tuning", "Feedback", "Reward model", "PPO"))
    for phase in ("sft", "reward", "ppo"):
        assert (folder / phase / "model" / "model.safetensors").exists() and (folder / phase / "metrics.jsonl").exists()
        assert (folder / phase / "config.yaml").exists() and list((folder / phase / phase).glob("*/hparams.yml"))

    with pytest.raises(UserError, match="exists and is not empty; .* --resume .* --overwrite"):
        run_pipeline(config)
    config.resume = True
    assert run_pipeline(config)["ppo"] == ppo


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("ppo.eval_prompts_file", "bad.jsonl", r"bad.jsonl:2: not valid JSON"),
        ("ppo.ptx_file", "bad.jsonl", r"bad.jsonl:1: wanted the keys .* or \"text\""),
        ("ppo.max_new_tokens", 9999, r"max_new_tokens \(9999\) must leave room for a prompt in max_length"),
        ("ppo.reward_model", "no/such/model", r"there is no folder 'no/such/model'"),
        ("ppo.reward_functions", ("rules.py:score",), r"'rules.py:score' takes answer, which no row of .* has"),
        ("ppo.rater", "rules.py:score", r"rater 'rules.py:score' takes answer, which no row of .*heldout.jsonl has"),
        ("collect.rater", "rules.py:score", r"takes answer, which no row of .*feedback_prompts.jsonl has"),
    ],
)
def test_what_is_wrong_with_a_later_phase_is_found_before_the_first_begins(
    tiny: Path, tmp_path: Path, write_jsonl: Any, monkeypatch: pytest.MonkeyPatch, option: str, value: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rules.py").write_text("def score(prompt, completions, answer): return [0.0] * len(completions)\n")
    write_jsonl("bad.jsonl", {"prompt": "ann wants food"}, "{")
    config = tiny_config(tiny, tmp_path / "run")
    config.strict = True
    section, name = option.split(".")
    setattr(getattr(config, section), name, value)
    with pytest.raises(UserError, match=message):
        run_pipeline(config)
    assert not (tmp_path / "run").exists()
