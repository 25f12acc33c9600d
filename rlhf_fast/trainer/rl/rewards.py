# SPDX-License-Identifier: Apache-2.0
"""Rewards of completions: a reward model's normalised score, Python functions, or a weighted sum of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.data.examples import PromptLine
from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.feedback.raters import RaterError
from rlhf_fast.models.batches import in_micro_batches
from rlhf_fast.models.heads import sequence_scores
from rlhf_fast.models.loading import score_normalizer
from rlhf_fast.rollout.rollout import Rollout

from .checks import check_finite
from .reward_functions import RewardFunction
from .reward_reader import Reader

# Rounding error of a score in bfloat16 or float16, relative to max(|score|, 1), the spread of normalised scores:
# the hidden state has 8 or 11 bits. It depends on which rows are in a batch, so scores of equal completions can differ
# by it.
SCORE_ROUNDING = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}


@dataclass(frozen=True)
class Rewards:
    """reward = score of the model (if any) + sum of weight x function; one number per completion."""

    model: Any | None
    functions: Sequence[RewardFunction]
    score_clip: float = 0.0  # limit of the model's score if that is normalised; 0: none
    reader: Reader | None = None  # for a model with another vocabulary than the policy's

    @property
    def clips(self) -> bool:
        """Whether scores are clipped: only if the model normalises them to mean 0 and deviation 1."""
        return self.score_clip > 0 and self.model is not None and score_normalizer(self.model) != (0.0, 1.0)

    def __call__(self, rollout: Rollout, plan: list[Tensor], prompts: Sequence[PromptLine]) -> Scores:
        """Rewards of completions, those of one prompt next to each other; `plan` has the micro-batches for the model.

        Raises RaterError naming the sample if a function raises or returns a number that is not finite.
        """
        device, texts = rollout.input_ids.device, rollout.texts
        total, rounding, parts = torch.zeros(len(texts), device=device), None, {}
        if self.model is not None:
            if self.reader is None:
                scores = in_micro_batches(lambda part: sequence_scores(self.model, part), rollout.batch, plan)
            else:
                scores = self.reader.scores(self.model, prompts, texts, rollout.ended.tolist())
            check_finite("the score", scores)
            total = scores
            if self.functions:
                parts["rewards/reward_model"] = scores
            if self.clips:
                total = scores.clamp(-self.score_clip, self.score_clip)
                parts["objective/scores_clipped"] = (total != scores).float()
            # Functions are exact, so their sum with the model's score is as exact as that.
            rounding = SCORE_ROUNDING.get(self.model.dtype, 0.0) * total.abs().clamp(min=1)
        of_functions = self.of_functions(prompts, texts).to(device)
        if self.clips:
            parts["objective/scores"] = scores + of_functions.total  # before clipping
        return Scores(total + of_functions.total, {**parts, **of_functions.parts}, rounding)

    def of_functions(self, prompts: Sequence[PromptLine], texts: Sequence[str]) -> Scores:
        """The weighted sum of the functions alone, and each function's own numbers: NaN, which adds 0, for None.

        Raises RaterError naming a completion that neither a function nor the reward model scores.
        """
        total, parts = torch.zeros(len(texts)), {}
        for function in self.functions:
            values = torch.tensor(function.of_prompts(prompts, texts))
            total = total + function.weight * values.nan_to_num(0.0)
            parts[f"rewards/{function.name}"] = values
        if self.model is None and parts:
            unscored = torch.stack(list(parts.values())).isnan().all(0).nonzero().flatten().tolist()
            if unscored:
                line, names = (
                    prompts[unscored[0] * len(prompts) // len(texts)],
                    ", ".join(parts).replace("rewards/", ""),
                )
                raise RaterError(
                    f"{names}: no reward function scores {texts[unscored[0]][:80]!r} of the prompt {line.where}, all "
                    f"returned None ({len(unscored)} of {len(texts)} completions); return a number for each completion "
                    "from at least one"
                )
        return Scores(total, parts)

    def add_to(self, rows: list[dict[str, Any]], prompts: Sequence[PromptLine]) -> dict[str, float]:
        """Add the functions' rewards to each evaluation row's "reward" (the model's score); returns the means.

        They are "reward" and, for each function, "rewards/NAME", which a row has too. With a `reader` the model's score
        is missing in the rows and is computed here. Where nothing scores (offline dpo), rows and means have no reward.
        `prompts` (P,) are in the order of `rows`, each with equally many.
        """
        if self.model is None and not self.functions:
            return {}
        texts = [row["completion"] for row in rows]
        if self.reader is not None:
            scores = self.reader.scores(self.model, prompts, texts, [row["ended"] for row in rows])
            for row, score in zip(rows, scores.tolist(), strict=True):
                row["reward"] = score
        found = ranks().once(lambda: self.of_functions(prompts, texts))
        for place, (row, number) in enumerate(zip(rows, found.total.tolist(), strict=True)):
            row["reward"] = row.get("reward", 0.0) + number
            row |= {name: float(part[place]) for name, part in found.parts.items() if not part[place].isnan()}
        means = {name: float(part.nanmean()) for name, part in found.parts.items() if not part.isnan().all()}
        return {"reward": sum(row["reward"] for row in rows) / len(rows), **means}


class Scores(NamedTuple):
    """Rewards of completions, and their terms, whose means become metrics."""

    total: Tensor  # (B,)
    parts: dict[str, Tensor]  # metric -> (B,), NaN where a function returned None
    rounding: Tensor | None = None  # (B,) as in `Rollout`

    def to(self, device: torch.device) -> Scores:
        """A copy on `device`."""
        parts = {name: values.to(device) for name, values in self.parts.items()}
        return Scores(self.total.to(device), parts, None if self.rounding is None else self.rounding.to(device))


class LengthRules(NamedTuple):
    """Penalties for a completion that did not end by itself, or came close to the length limit."""

    missing_eos_penalty: float = 0.0
    missing_eos_score: float | None = None
    overlong_penalty: float = 0.0
    overlong_buffer: float = 0.2
    max_new_tokens: int = 1

    def soft_punishment(self, lengths: Tensor) -> Tensor:
        """(B,) penalty on length: 0 before the buffer, growing linearly within it (Yu et al. 2025, eq. 13)."""
        buffer = self.overlong_buffer * self.max_new_tokens
        return self.overlong_penalty * ((lengths - (self.max_new_tokens - buffer)) / buffer).clamp(0, 1)

    def apply(self, rollout: Rollout, *, punish: bool = True) -> Tensor:
        """(B,) the rewards for advantages; without `punish`, before the soft penalty on length."""
        assert rollout.scores is not None
        rewards = rollout.scores
        if self.missing_eos_score is not None:
            rewards = torch.where(rollout.ended, rewards, self.missing_eos_score)
        rewards = rewards - self.missing_eos_penalty * ~rollout.ended
        return rewards - self.soft_punishment(rollout.response_mask.sum(1)) if punish else rewards
