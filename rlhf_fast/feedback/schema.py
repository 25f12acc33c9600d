# SPDX-License-Identifier: Apache-2.0
"""The feedback schema: a prompt, its K completions, and their ratings or ranks.

    {"prompt": text or messages, "tools": [...], "completions": [text or messages, ...], "ended": [bool, ...],
     "ratings": [number, ...] and/or "ranks": [int, ...], "criteria": {"helpful": [number, ...], ...},
     "annotator": text, "sampling": {...}, "model": text,
     "completion_ids": [[int, ...], ...], "vocabulary": text}

Higher ratings are better, rank 1 is best, equal numbers are ties; where a line has both, the ranks count. `criteria`
are ratings of single qualities under names of your choice; a reward model may learn from one of them instead. `ended`
says which completions ended by themselves (if it is missing, all did). Only the prompt, the completions and ratings or
ranks are required, so a file may be written by hand. `completion_ids` are the tokens that a model sampled, including
the token or the `stop` text of `sampling` that ended the completion, and `vocabulary` identifies their tokenizer; they
are used instead of the text if they decode to it. A file only grows: if one annotator has several lines about the same
prompt and completions, the last counts. `readers.py` converts other tools' rows to this schema.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from rlhf_fast.data.dropped import Dropped
from rlhf_fast.data.files import RowAndPlace, no_data, read_rows
from rlhf_fast.data.messages import Chat, Completion, Prompt, check_completion, check_prompt, completion_text
from rlhf_fast.errors import UserError
from rlhf_fast.run.progress import notice

from .readers import FORMATS, to_schema


@dataclass(frozen=True)
class Ranking:
    """One line of a feedback file, checked. `goodness` (K,): higher is better, equal is a tie; empty if not rated."""

    prompt: Prompt
    completions: list[Completion]
    ended: list[bool]
    goodness: list[float]
    where: str
    ratings: list[float] | None = None
    criteria: dict[str, list[float]] = field(default_factory=dict)  # name -> (K,) ratings
    annotator: str | None = None
    model: str | None = None
    completion_ids: list[list[int]] | None = None  # as sampled
    vocabulary: str | None = None  # `encoding.vocabulary_id` of the tokenizer of completion_ids
    sampling: dict[str, Any] | None = None  # options that they were sampled with

    @property
    def stop(self) -> tuple[str, ...]:
        """The texts that ended completions: at the end of their tokens, but not in their text."""
        texts = (self.sampling or {}).get("stop")
        return tuple(text for text in texts if isinstance(text, str)) if isinstance(texts, list) else ()

    @property
    def texts(self) -> list[str]:
        """The completions as people read them."""
        return [completion_text(completion) for completion in self.completions]

    def row(self) -> dict[str, Any]:
        """The prompt and completions as an unrated line of a feedback file."""
        row: dict[str, Any] = {
            "prompt": self.prompt,
            "completions": self.completions,
            "ended": self.ended,
            "model": self.model,
        }
        if isinstance(self.prompt, Chat):
            row |= self.prompt.columns()
        if self.sampling is not None:
            row["sampling"] = self.sampling
        if self.completion_ids is not None:
            row |= {"completion_ids": self.completion_ids, "vocabulary": self.vocabulary}
        return row

    def pairs(self) -> list[tuple[int, int]]:
        """(better, worse) for each of the C(K, 2) pairs that is not a tie."""
        pairs = []
        for i, j in combinations(range(len(self.goodness)), 2):
            if self.goodness[i] != self.goodness[j]:
                pairs.append((i, j) if self.goodness[i] > self.goodness[j] else (j, i))
        return pairs

    def by(self, criterion: str) -> Ranking:
        """The ranking by the ratings of one criterion: not rated if it has none."""
        ratings = self.criteria.get(criterion)
        return replace(self, goodness=ratings or [], ratings=ratings)

    def key(self) -> str:
        """Equal for lines about the same prompt and completions."""
        return json.dumps([self.prompt, self.completions])


def read_feedback(path: str | Path, strict: bool = False, criterion: str = "") -> list[Ranking]:
    """The rated lines of a feedback file in any format; lines that nobody has rated yet are left out.

    With `criterion` a line's ratings are those of this criterion, and lines without them are left out. Malformed lines
    are left out and named. Raises UserError for the first of them with `strict`, and if no line is rated.
    """
    rankings: list[Ranking] = []
    dropped = Dropped(path, strict)
    for ranking in each_ranking(path):
        if isinstance(ranking, UserError):
            dropped.add(ranking)
        else:
            rankings.append(ranking)
    dropped.report(len(rankings))
    if not rankings:
        raise no_data(path)
    latest = latest_lines(rankings)
    if criterion:
        return _rated_by(criterion, latest, path)
    rated = [ranking for ranking in latest if ranking.goodness]
    if not rated:
        raise UserError(
            f'{path}: no line is rated yet; write "ratings" (higher is better) or "ranks" (1 is best) into it, '
            "or open it with rlhf-fast label"
        )
    return rated


def _rated_by(criterion: str, rankings: list[Ranking], path: str | Path) -> list[Ranking]:
    """The rankings that have ratings of the criterion, ordered by those; reports how many have not."""
    rated = [by for ranking in rankings if (by := ranking.by(criterion)).goodness]
    if not rated:
        names = ", ".join(dict.fromkeys(name for ranking in rankings for name in ranking.criteria)) or "none"
        raise UserError(f"{path}: no line is rated by the criterion {criterion!r}; its criteria: {names}")
    if others := sum(bool(ranking.goodness) and criterion not in ranking.criteria for ranking in rankings):
        notice(f"{others} rated lines of {path} were left out, as they have no ratings of {criterion!r}")
    return rated


def holds_feedback(path: str | Path) -> bool:
    """True if the first valid line of a data file has completions, in any format; False for a file of prompts."""
    row = next((row for row, _ in read_rows(path) if isinstance(row, dict)), {})
    return "completions" in row or any(fits(row) for fits, _ in FORMATS.values())


def each_ranking(path: str | Path) -> Iterator[Ranking | UserError]:
    """Every line, rated or not; a malformed one gives its error instead."""
    return rankings_of(read_rows(path))


def rankings_of(rows: Iterable[RowAndPlace]) -> Iterator[Ranking | UserError]:
    """The same for rows that have been read."""
    for row, where in rows:
        try:
            if isinstance(row, UserError):
                raise row
            for converted in to_schema(row, where):
                yield parse(converted, where)
        except UserError as error:
            yield error


def latest_lines(rankings: list[Ranking]) -> list[Ranking]:
    """The rankings without those that their annotator replaced by a later line about the same completions."""
    last: dict[tuple[str, str] | int, Ranking] = {}
    for place, ranking in enumerate(rankings):
        key = place if ranking.annotator is None else (ranking.annotator, ranking.key())
        last.pop(key, None)
        last[key] = ranking
    return list(last.values())


def parse(row: dict[str, Any], where: str) -> Ranking:
    """A row of the schema, checked; UserError names what is wrong."""
    prompt = check_prompt(row.get("prompt"), where, row=row)
    if row.get("completions") is None:
        keys = ", ".join(map(repr, row))[:200] or "none"
        raise UserError(
            f'{where}: "completions" must be a list of two or more texts, got nothing; the keys of the row: {keys}'
        )
    completions = _completions(row.get("completions"), where)
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
    texts = {name: row.get(name) for name in ("annotator", "model", "vocabulary")}
    for name, text in texts.items():
        if not isinstance(text, str | None):
            raise UserError(f'{where}: "{name}" must be text, got {repr(text)[:60]}')
    ids = _token_ids(row.get("completion_ids"), size, where)
    criteria = _criteria(row.get("criteria"), size, where)
    sampling = row["sampling"] if isinstance(row.get("sampling"), dict) else None
    return Ranking(
        prompt, completions, ended, goodness, where, ratings, criteria, completion_ids=ids, sampling=sampling, **texts
    )


def _criteria(values: Any, size: int, where: str) -> dict[str, list[float]]:
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(name, str) and name for name in values):
        raise UserError(f'{where}: "criteria" must be an object such as {{"helpful": [5, 2]}}, got {repr(values)[:60]}')
    return {
        name: _numbers(numbers, f"criteria.{name}", size, where)
        for name, numbers in values.items()
        if numbers is not None
    }


def _completions(values: Any, where: str) -> list[Completion]:
    if isinstance(values, list) and len(values) >= 2 and all(isinstance(c, str | list | dict) for c in values):
        return [c if isinstance(c, str) else check_completion(c, where, "completions") for c in values]
    raise UserError(f'{where}: "completions" must be a list of two or more texts, got {repr(values)[:60]}')


def _token_ids(values: Any, size: int, where: str) -> list[list[int]] | None:
    if values is None:
        return None
    if isinstance(values, list) and len(values) == size and all(map(_are_ids, values)):
        return values
    raise UserError(f'{where}: "completion_ids" must be {size} lists of token ids, got {repr(values)[:60]}')


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(i, int) and 0 <= i < 2**31 for i in value)


def _numbers(values: Any, name: str, size: int, where: str) -> list[float]:
    if isinstance(values, list) and len(values) == size and all(map(_is_number, values)):
        return [float(value) for value in values]
    raise UserError(
        f'{where}: "{name}" must be {size} finite numbers, one for each completion, got {repr(values)[:60]}'
    )


def _is_number(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False
