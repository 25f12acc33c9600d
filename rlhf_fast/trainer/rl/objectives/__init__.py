# SPDX-License-Identifier: Apache-2.0
"""The objectives of RL: one file each, and a line here that imports it; docs/objectives.md has their sources.

A new one is a file with an `Objective` in it and its line below. Nothing else names them: the option `objective`, its
help and its checks read this table.
"""

# ruff: noqa: F401 - the table below uses the imports

from __future__ import annotations

from .cispo import CISPO
from .dapo import DAPO
from .dpo import DPO
from .dr_grpo import DR_GRPO
from .grpo import GRPO
from .gspo import GSPO
from .objective import Objective
from .ppo import PPO
from .reinforce import REINFORCE, REINFORCE_BASELINE
from .rloo import RLOO

OBJECTIVES = {value.name: value for value in list(vars().values()) if isinstance(value, Objective)}
