# SPDX-License-Identifier: Apache-2.0
"""Short runs of PPO for the tests of its parts; where they begin is the fixture `config` of tests/trainer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers.phases import metrics
from rlhf_fast.rollout.builtin import generate
from rlhf_fast.rollout.rollout import Sampler
from rlhf_fast.run.folder import RunFolder
from rlhf_fast.run.progress import Timer
from rlhf_fast.trainer import PPOConfig
from rlhf_fast.trainer.rl import agent as agents
from rlhf_fast.trainer.rl import ppo
from rlhf_fast.trainer.rl.agent import Agent
from rlhf_fast.trainer.rl.prompts import Prompts, read_prompts_or_feedback
from rlhf_fast.trainer.rl.settings import Settings


def replace(config: PPOConfig, **values: Any) -> PPOConfig:
    return dataclasses.replace(config, **values)


def load_agent(config: PPOConfig) -> Agent:
    return agents.load_agent(Settings(config).agent)


def prompts_of(config: PPOConfig, agent: Agent) -> Prompts:
    """What `train_ppo` makes of the prompts file."""
    feedback = config.objective == "dpo"
    lines = read_prompts_or_feedback(config.prompts_file, feedback=feedback, scored=True)
    return agents.encode_prompts(lines, agent, Settings(config).prompts)


def train_step(
    agent: Agent, prompts: Prompts, config: PPOConfig, step: int, sampler: Sampler = generate
) -> dict[str, float]:
    """Metrics of one step."""
    settings = Settings(config)
    return ppo.train_step(agent, prompts, settings.step, settings.sizes, step, Timer(), sampler)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def assert_same_run(folder: Path, whole: Path) -> None:
    """Metrics and weights are equal to the last bit."""
    assert metrics(folder) == metrics(whole)
    found, wanted = weights(folder), weights(whole)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(weight, wanted[name]) for name, weight in found.items())


def steps(config: PPOConfig, folder: Path, **values: Any) -> list[dict[str, float]]:
    """Metrics of a whole run."""
    run = RunFolder.create(folder)
    ppo.train_ppo(replace(config, **values), run)
    return metrics(run.path)
