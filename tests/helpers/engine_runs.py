# SPDX-License-Identifier: Apache-2.0
"""Runs that sample by an engine, for the tests; its stand-in is `vllm_stub.Stub`, a fixture of tests/trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers.ppo_runs import replace
from helpers.vllm_stub import Stub
from rlhf_fast.models import loading
from rlhf_fast.trainer import PPOConfig


def another(folder: Path) -> Any:
    """A model of the same sizes as that of `folder`, with other weights."""
    model = loading.load_causal_lm(str(folder), "float32")
    for parameter in model.parameters():
        parameter.data.mul_(0.5)
    return model


def by_engine(config: PPOConfig, stub: Stub, **values: Any) -> PPOConfig:
    """The run, with its samples from `stub`."""
    return replace(config, **{"objective": "grpo", "sampler": "vllm-server", "engine_url": (stub.url,), **values})
