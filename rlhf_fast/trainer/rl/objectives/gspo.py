# SPDX-License-Identifier: Apache-2.0
"""GSPO: GRPO with one ratio a sequence, the geometric mean of its tokens' (Zheng et al. 2025, arXiv 2507.18071)."""

from __future__ import annotations

from .grpo import group_normalised
from .objective import Objective, by_sequence

GSPO = Objective(
    "gspo",
    group_normalised,
    by_sequence,
    # Section 5.1: the ranges are so narrow because the ratio is a mean; its batches have four minibatches.
    defaults={
        "kl_coef": 0.0,
        "kl_in": "loss",
        "importance_ratio": "sequence-mean",
        "cliprange": 3e-4,
        "cliprange_high": 4e-4,
        "num_minibatches": 4,
    },
)
