# SPDX-License-Identifier: Apache-2.0
"""The one schema of feedback: a prompt, its K completions, and what somebody thinks of them.

    {"prompt": text or messages, "completions": [text, ...], "ended": [bool, ...],
     "ratings": [number, ...] and/or "ranks": [int, ...], "annotator": text, "sampling": {...}, "model": text}

Higher ratings are better, rank 1 is best, equal numbers are ties; where a line has both, the ranks count.
`ended` tells which completions ended by themselves (all, when it is missing). Only the prompt, the completions and one
of ratings and ranks are needed, so a file written by hand is as good as a collected one. A file only grows: of several
lines of one annotator about the same prompt and completions the last counts. `readers.py` turns other tools' rows
into this.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from rlhf_fast.data.examples import Prompt, check_prompt
from rlhf_fast.data.files import read_rows
from rlhf_fast.errors import UserError

from .readers import to_schema


@dataclass(frozen=True)
class Ranking:
    """One line of a feedback file, checked. `goodness` (K,): higher is better, equal is a tie, empty is not rated."""

    prompt: Prompt
    completions: list[str]
    ended: list[bool]
    goodness: list[float]
    where: str
    ratings: list[float] | None = None
    annotator: str | None = None
    model: str | None = None

    def pairs(self) -> list[tuple[int, int]]:
        """(better, worse) for each of the C(K, 2) pairs that is not a tie."""
        pairs = []
        for i, j in combinations(range(len(self.goodness)), 2):
            if self.goodness[i] != self.goodness[j]:
                pairs.append((i, j) if self.goodness[i] > self.goodness[j] else (j, i))
        return pairs

    def key(self) -> str:
        """Equal for lines about the same prompt and completions."""
        return json.dumps([self.prompt, self.completions])


def read_feedback(path: str | Path) -> list[Ranking]:
    """The rated lines of a feedback file in any format; lines that nobody has rated yet are left out.

    Raises UserError for a malformed line (file and line named) or if no line is rated.
    """
    rankings = []
    for found in each_ranking(path):
        if isinstance(found, UserError):
            raise found
        rankings.append(found)
    if not rankings:
        raise UserError(f"{path} holds no data: wanted one JSON object on each line")
    rated = [ranking for ranking in last_words(rankings) if ranking.goodness]
    if not rated:
        raise UserError(
            f'{path}: no line is rated yet; write "ratings" (higher is better) or "ranks" (1 is best) into it, '
            "or open it with rlhf-fast label"
        )
    return rated


def holds_feedback(path: str | Path) -> bool:
    """True if the first line of a data file has completions, in any format; False for a file of prompts."""
    return isinstance(next(each_ranking(path), None), Ranking)


def each_ranking(path: str | Path) -> Iterator[Ranking | UserError]:
    """Every line, rated or not; for a malformed one, the error in its place."""
    for row, where in read_rows(path):
        try:
            if isinstance(row, UserError):
                raise row
            for converted in to_schema(row, where):
                yield parse(converted, where)
        except UserError as error:
            yield error


def last_words(rankings: list[Ranking]) -> list[Ranking]:
    """Without what an annotator has replaced by a later line about the same prompt and completions."""
    last: dict[tuple[str, str] | int, Ranking] = {}
    for place, ranking in enumerate(rankings):
        key = place if ranking.annotator is None else (ranking.annotator, ranking.key())
        last.pop(key, None)
        last[key] = ranking
    return list(last.values())


def parse(row: dict[str, Any], where: str) -> Ranking:
    """A row of the schema, checked; UserError names what is wrong."""
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
    ratings = None if row.get("ratings") is None else _numbers(row["ratings"], "ratings", size, where)
    goodness = ratings or []
    if row.get("ranks") is not None:
        ranks = _numbers(row["ranks"], "ranks", size, where)
        if any(rank < 1 or rank != int(rank) for rank in ranks):
            raise UserError(f'{where}: "ranks" must be whole numbers from 1 (best), got {row["ranks"]!r}')
        goodness = [-rank for rank in ranks]
    for name in ("annotator", "model"):
        if not isinstance(row.get(name), str | None):
            raise UserError(f'{where}: "{name}" must be text, got {repr(row[name])[:60]}')
    return Ranking(prompt, completions, ended, goodness, where, ratings, row.get("annotator"), row.get("model"))


def _numbers(values: Any, name: str, size: int, where: str) -> list[float]:
    if isinstance(values, list) and len(values) == size and all(map(_is_number, values)):
        return [float(value) for value in values]
    raise UserError(
        f'{where}: "{name}" must be {size} finite numbers, one for each completion, got {repr(values)[:60]}'
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
