# SPDX-License-Identifier: Apache-2.0
"""What PPO is paid: a reward model's normalised score, Python functions, or a weighted sum of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.data.examples import Prompt
from rlhf_fast.errors import UserError
from rlhf_fast.feedback.raters import Rater, load_rater
from rlhf_fast.models.batches import Batch, in_micro_batches
from rlhf_fast.models.heads import sequence_scores

from .checks import check_finite


@dataclass(frozen=True)
class Rewards:
    """reward = score of the model (where there is one) + sum of weight x function; one number a completion."""

    model: Any | None
    functions: list[tuple[float, Rater]]

    def __bool__(self) -> bool:
        """False if nothing says what a completion is worth."""
        return self.model is not None or bool(self.functions)

    def __call__(self, batch: Batch, plan: list[Tensor], prompts: Sequence[Prompt], texts: Sequence[str]) -> Tensor:
        """(B,) rewards of the completions `texts` (B,), those of one prompt next to each other.

        Raises RaterError naming the sample if a function raises or returns what is no finite number.
        """
        total = torch.zeros(len(texts), device=batch.input_ids.device)
        if self.model is not None:
            scores = in_micro_batches(lambda part: sequence_scores(self.model, part), batch, plan)
            check_finite("the score", scores)
            total += scores
        return total + self.of_functions(prompts, texts).to(total.device)

    def of_functions(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> Tensor:
        """(B,) weighted sum of the functions alone."""
        samples = len(texts) // len(prompts)
        total = torch.zeros(len(texts))
        for weight, function in self.functions:
            for place, prompt in enumerate(prompts):
                rows = slice(place * samples, (place + 1) * samples)
                total[rows] += weight * torch.tensor(function(prompt, list(texts[rows])))
        return total

    def pay(self, rows: list[dict[str, Any]]) -> float:
        """Turn the model's score in each row of an evaluation into the whole reward; returns the mean."""
        for row in rows:
            row["reward"] = row.get("reward", 0.0) + float(self.of_functions([row["prompt"]], [row["completion"]]))
        return sum(row["reward"] for row in rows) / len(rows)


def load_functions(specs: Sequence[str]) -> list[tuple[float, Rater]]:
    """(weight, function) of each "module:function", "file.py:function" or "0.5*file.py:function" in the options."""
    functions = []
    for text in specs:
        weight, star, spec = text.rpartition("*")
        try:
            functions.append((float(weight) if star else 1.0, load_rater(spec.strip())))
        except ValueError:
            raise UserError(f"reward_functions: {weight!r} before the * in {text!r} is no number") from None
    return functions
