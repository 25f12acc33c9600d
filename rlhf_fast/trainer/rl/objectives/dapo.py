# SPDX-License-Identifier: Apache-2.0
"""DAPO: GRPO with another upper clip, a mean over tokens, dynamic sampling, and a penalty on samples that are too long.

Yu et al. 2025, arXiv 2503.14476: clip-higher in section 3.1, dynamic sampling in 3.2, the mean over tokens in 3.3 (eq.
12), overlong filtering and the soft punishment (eq. 13) in 3.4; no KL (section 2.3).
"""

from __future__ import annotations

from .grpo import group_normalised
from .objective import Objective, by_token

DAPO = Objective(
    "dapo",
    group_normalised,
    by_token,
    defaults={
        "kl_coef": 0.0,
        "kl_in": "loss",
        "cliprange_high": 0.28,
        "dynamic_sampling": 10,
        "overlong_filter": True,
        "overlong_penalty": 1.0,
    },
)
