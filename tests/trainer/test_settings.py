# SPDX-License-Identifier: Apache-2.0
"""The config of RL in bundles: no option is lost on the way."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from rlhf_fast.trainer import PPOConfig
from rlhf_fast.trainer.rl.settings import Settings

# Read by `train_ppo` itself, or by the run's folder.
READ_ELSEWHERE = {"output_dir", "overwrite", "resume", "save_total_limit", "trackers", "rater", "prompt_epochs"} | {
    "push_to_hub"
}
OTHER: dict[str, Any] = {
    "objective": "dapo", "kl_estimator": "k3", "kl_in": "loss", "importance_ratio": "sequence", "dpo_loss": "ipo",
    "dpo_pairs": "all", "lr_schedule": "cosine", "sampler": "vllm-server", "sampler_correction": "mask",
    "dtype": "float32", "overlong": "error", "kl_coef": 0.7, "cliprange": 0.7, "cliprange_high": 0.7,
    "score_clip": 0.7, "overlong_penalty": 0.7, "overlong_filter": True, "missing_eos_score": 0.7,
    "num_minibatches": 4, "dynamic_sampling": 3, "eval_prompts_file": "x.jsonl", "ptx_file": "x.jsonl",
    "min_new_tokens": 3, "gamma": 0.7, "sampler_cap": 3.0,
}  # fmt: skip


def changed(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1 if isinstance(value, int) else value + 0.25
    return (*value, "x") if isinstance(value, tuple) else f"{value}x"


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(PPOConfig) if f.name not in READ_ELSEWHERE])
def test_every_option_is_in_a_bundle(name: str) -> None:
    config = PPOConfig(top_k=5, reward_model="", reward_functions=())
    other = dataclasses.replace(config, **{name: OTHER[name] if name in OTHER else changed(getattr(config, name))})
    assert vars(Settings(other)) != vars(Settings(config))


def test_a_step_has_the_coefficient_and_the_pairs_of_its_samples() -> None:
    step = Settings(PPOConfig(objective="dpo", kl_coef=0.1, reward_model="", prompts_file="x")).step.at(0.7, 4)
    advantages, loss = step.score.advantages, step.update.loss
    assert (advantages.kl.coef, loss.kl.coef) == (0.7, 0.7)
    assert (loss.pairs.beta, loss.pairs.samples) == (0.7, 4)
