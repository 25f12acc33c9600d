# SPDX-License-Identifier: Apache-2.0
"""The three phases of RLHF on plain Hugging Face models: SFT, reward model, PPO.

`rlhf-fast` is the command; from Python each phase is a configuration and a function:

    from rlhf_fast.trainer import PPOConfig, RunFolder, train_ppo
    summary = train_ppo(PPOConfig(model="runs/sft/model", ...), RunFolder.create("runs/ppo"))

The heavy libraries (transformers and what it brings) are imported when a phase starts, not here.
"""

from __future__ import annotations

import importlib
from typing import Any

from rlhf_fast.errors import Interrupted, UserError
from rlhf_fast.run.folder import RunFolder
from rlhf_fast.run.options import load_config

from .collection import CollectConfig
from .pipeline import PipelineConfig
from .reward.config import RewardConfig
from .rl.config import PPOConfig
from .sft.config import SFTConfig

_LAZY = {
    "train_sft": ".sft.train",
    "collect": ".collection",
    "train_reward": ".reward.train",
    "train_ppo": ".rl.ppo",
    "run_pipeline": ".pipeline",
    "write_report": "rlhf_fast.report.page",
}

__all__ = [
    "CollectConfig",
    "Interrupted",
    "PPOConfig",
    "PipelineConfig",
    "RewardConfig",
    "RunFolder",
    "SFTConfig",
    "UserError",
    "load_config",
    *_LAZY,
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
