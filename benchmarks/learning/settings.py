# SPDX-License-Identifier: Apache-2.0
"""What both sides are told, for each task."""

from __future__ import annotations

from typing import Any

Curve = list[dict[str, Any]]  # one dict a measurement, with its step

EVERY = 5  # steps between measurements
SFT = {"steps": 150, "batch": 64, "lr": 3e-3}  # linear decay
REWARD = {"epochs": 4, "batch": 16, "lr": 1e-3}  # linear decay, trunk and head alike
DPO = {"epochs": 2, "batch": 16, "lr": 5e-5, "beta": 0.1}
RL: dict[str, Any] = {
    "steps": 60, "prompts": 8, "samples": 8, "lr": 1e-3, "kl_coef": {"ppo": 0.05, "grpo": 0.04, "rloo": 0.05},
}  # fmt: skip
BETAS = (0.9, 0.95)  # of AdamW in RL and DPO
