# SPDX-License-Identifier: Apache-2.0
"""CISPO: REINFORCE whose importance weight is clipped and constant (MiniMax-M1 2025, arXiv 2506.13585, section 3.1)."""

from __future__ import annotations

from .grpo import group_normalised
from .objective import Objective, by_token

CISPO = Objective(
    "cispo",
    group_normalised,
    by_token,
    token_loss="cispo",
    # No lower bound, as in the paper; the upper one is 5 (Khatri et al. 2025, arXiv 2510.13786, tried 4 to 8).
    defaults={"kl_coef": 0.0, "kl_in": "loss", "cliprange": 1.0, "cliprange_high": 4.0},
)
