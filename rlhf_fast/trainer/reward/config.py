# SPDX-License-Identifier: Apache-2.0
"""Options of the reward model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from rlhf_fast.errors import UserError
from rlhf_fast.run.options import NOT_NEGATIVE, POSITIVE, Range, RunOptions, SamplerOptions

PROPER_FRACTION = Range(lambda value: 0 <= value < 1, "between 0 and 1")


@dataclass
class RewardOptions(SamplerOptions):
    """A scalar head on the model, trained on all pairs of every ranking."""

    CHANGEABLE = frozenset({"lr", "head_lr", "centering", "dropout"})
    EXTENDS = frozenset({"epochs"})

    feedback_file: str = ""
    """Feedback: {"prompt", "completions", "ratings" and/or "ranks"} on each line, or a file of another tool."""
    criterion: str = ""
    """Learn from the feedback's ratings of this criterion, such as "helpful", instead of the overall ones."""
    loss: Literal["bradley_terry", "margin", "plackett_luce", "best_of_k", "regression"] = "bradley_terry"
    """Loss on a ranking: of its pairs, pairs with margins, its order, its best, or of the ratings themselves."""
    centering: Annotated[float, NOT_NEGATIVE] = 0.0
    """Weight of the squared sum of two scores, to keep scores near 0; 0.01 is usual."""
    eval_fraction: Annotated[float, PROPER_FRACTION] = 0.2
    """Share of the prompts held out to measure pair accuracy."""
    epochs: Annotated[float, POSITIVE] = 1.0
    """Passes over the training rankings; more overfit (Ouyang et al. 2022)."""
    dropout: bool = False
    """Train with the dropout rates of the model's configuration; off: without dropout."""
    batch_size: Annotated[int, POSITIVE] = 8
    """Rankings per optimizer step."""
    lr: Annotated[float | None, POSITIVE] = None
    """Peak learning rate of the trunk. None: by the model's size, 1.5e-4 for 135M weights, 1e-5 for 8B."""
    head_lr: Annotated[float, POSITIVE] = 1e-3
    """Peak learning rate of the new scalar head."""


@dataclass
class RewardConfig(RewardOptions, RunOptions):
    """Train a reward model on rankings or ratings."""

    def validate(self) -> None:
        """Raise UserError if an option is out of its range, or does not go with another."""
        super().validate()
        if not self.feedback_file:
            raise UserError("feedback_file must be the name of a JSONL file, got ''")
