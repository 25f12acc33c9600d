# SPDX-License-Identifier: Apache-2.0
"""Phase 2a: several completions of each prompt, and what people (or a rater function) think of them.

One line of a feedback file is one prompt with its K completions:

    {"prompt": text or messages, "completions": [text, ...], "ended": [bool, ...],
     "ratings": [number, ...] and/or "ranks": [int, ...], "annotator": text, "sampling": {...}, "model": text}

Higher ratings are better, rank 1 is best, equal numbers are ties; where a line has both, the ranks count.
`ended` tells which completions ended by themselves (all, when it is missing). Only the prompt, the
completions and one of ratings and ranks are needed, so a file written by hand is as good as a collected one.
Lines are appended as they come: a run that stops loses nothing, and `--resume` goes on behind the last line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from rlhf_fast.data.examples import Prompt, check_prompt, read_lines
from rlhf_fast.run.errors import UserError


@dataclass(frozen=True)
class Ranking:
    """One line of a feedback file, checked. `goodness` (K,): higher is better, equal is a tie."""

    prompt: Prompt
    completions: list[str]
    ended: list[bool]
    goodness: list[float]
    where: str

    def pairs(self) -> list[tuple[int, int]]:
        """(better, worse) for each of the C(K, 2) pairs that is not a tie."""
        pairs = []
        for i, j in combinations(range(len(self.goodness)), 2):
            if self.goodness[i] != self.goodness[j]:
                pairs.append((i, j) if self.goodness[i] > self.goodness[j] else (j, i))
        return pairs


def read_feedback(path: str | Path) -> list[Ranking]:
    """The rated lines of a feedback file; lines that nobody has rated yet are left out.

    Raises UserError for a malformed line (file and line named) or if no line is rated.
    """
    rankings = [ranking for ranking in read_lines(path, _ranking) if ranking is not None]
    if not rankings:
        raise UserError(
            f'{path}: no line is rated yet; write "ratings" (higher is better) or "ranks" (1 is best) into it'
        )
    return rankings


def _ranking(row: dict[str, Any], where: str) -> Ranking | None:
    prompt = check_prompt(row.get("prompt"), where)
    completions = row.get("completions")
    if not isinstance(completions, list) or len(completions) < 2 or not all(isinstance(c, str) for c in completions):
        raise UserError(f'{where}: "completions" must be a list of two or more texts, got {repr(completions)[:60]}')
    size = len(completions)
    ended = row.get("ended")
    if ended is None:
        ended = [True] * size
    elif not isinstance(ended, list) or len(ended) != size or not all(isinstance(e, bool) for e in ended):
        raise UserError(f'{where}: "ended" must be {size} booleans, one for each completion, got {repr(ended)[:60]}')
    if row.get("ranks") is not None:
        ranks = _numbers(row["ranks"], "ranks", size, where)
        if any(rank < 1 or rank != int(rank) for rank in ranks):
            raise UserError(f'{where}: "ranks" must be whole numbers from 1 (best), got {row["ranks"]!r}')
        return Ranking(prompt, completions, ended, [-rank for rank in ranks], where)
    if row.get("ratings") is not None:
        return Ranking(prompt, completions, ended, _numbers(row["ratings"], "ratings", size, where), where)
    return None


def _numbers(values: Any, name: str, size: int, where: str) -> list[float]:
    if isinstance(values, list) and len(values) == size and all(map(_is_number, values)):
        return [float(value) for value in values]
    raise UserError(
        f'{where}: "{name}" must be {size} finite numbers, one for each completion, got {repr(values)[:60]}'
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
