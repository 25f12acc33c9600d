# SPDX-License-Identifier: Apache-2.0
"""The file that annotators' answers go to: one line each, written to disk before the next prompt is shown.

The file of answers only grows. An answer, a skip and an undo are each one line of the feedback schema. If one
annotator has several lines about the same prompt and completions, the last counts. Each line is appended in one write,
under a lock, and synced: annotators in several processes can share one file, and a kill at any moment loses nothing.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

from rlhf_fast.data.files import RowAndPlace, read_rows
from rlhf_fast.errors import UserError

from .agreement import Agreement, agreement
from .schema import Ranking, each_ranking, latest_lines, rankings_of

BEST_RATING = 7


class AnswerFile:
    """The prompts of one file, and the file that the answers of named annotators are appended to."""

    def __init__(
        self,
        source: str | Path,
        answers: str | Path,
        *,
        rate: bool = False,
        pairs: bool = False,
        criteria: Sequence[str] = (),
    ) -> None:
        """With `rate`, completions are rated 1 to 7, else ranked; by each of `criteria` they may be rated besides.

        `pairs` shows every two of a prompt's completions as a prompt of their own. UserError for a wrong line or an
        unwritable file.
        """
        self.rate, self.criteria = rate, tuple(dict.fromkeys(criteria))
        rankings: dict[str, Ranking] = {}
        for ranking in each_ranking(source):
            if isinstance(ranking, UserError):
                raise ranking
            for item in _pairs(ranking) if pairs else [ranking]:
                rankings.setdefault(item.key(), item)
        self.items = list(rankings.values())
        if not self.items:
            raise UserError(f"{source} holds nothing to label")
        self.path = Path(answers)
        if self.path.resolve() == Path(source).resolve():
            raise UserError(f"answers cannot be written to {source} itself, which is being labelled: name another file")
        self._read: tuple[tuple[int, int], list[RowAndPlace]] = (0, 0), []  # size and time of change; rows
        with self._locked() as file:
            self._repair_last_line(file)

    def best(self, place: int) -> int:
        """The largest number a completion of an item may get: 7 when rating, else the number of its completions."""
        return BEST_RATING if self.rate else len(self.items[place].completions)

    def next(self, annotator: str) -> int | None:
        """The first item that `annotator` has neither answered nor skipped; None when all are done."""
        done = self._done(annotator)
        return next((place for place, item in enumerate(self.items) if item.key() not in done), None)

    def progress(self, annotator: str) -> tuple[int, int]:
        """(number of items done, number of items)."""
        return len(self._done(annotator)), len(self.items)

    def order(self, annotator: str, place: int) -> list[int]:
        """Indices of an item's completions, shuffled: always the same for one annotator, another order for others."""
        item = self.items[place]
        order = list(range(len(item.completions)))
        random.Random(annotator + item.key()).shuffle(order)
        return order

    def answer(
        self,
        annotator: str,
        place: int,
        numbers: Sequence[int],
        criteria: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """Write the ranks (1 is best) or ratings of an item's completions, given in the order they were shown.

        `criteria`: ratings 1 to 7 by some of the file's criteria, in the same order. Raises ValueError for a number out
        of range, a number missing, or a criterion that is none of them.
        """
        answers = self._in_file_order(annotator, place, numbers, self.best(place))
        rated = {}
        for name, ratings in (criteria or {}).items():
            if name not in self.criteria:
                raise ValueError(f"{name!r} is none of the criteria {', '.join(self.criteria)}")
            rated[name] = self._in_file_order(annotator, place, ratings, BEST_RATING)
        besides = {"criteria": rated} if rated else {}
        if self.rate:
            self._append(annotator, place, ratings=answers, **besides)
        else:
            levels = sorted(set(answers))  # 1, 1, 3 means the same as 1, 1, 2
            self._append(annotator, place, ranks=[levels.index(number) + 1 for number in answers], **besides)

    def _in_file_order(self, annotator: str, place: int, numbers: Sequence[int], best: int) -> list[int]:
        """Numbers given in the order shown, in the order of the file; ValueError if one is missing or out of range."""
        order = self.order(annotator, place)
        if len(numbers) != len(order) or not all(type(n) is int and 1 <= n <= best for n in numbers):
            raise ValueError(f"wanted {len(order)} whole numbers between 1 and {best}, got {list(numbers)}")
        by_completion = dict(zip(order, numbers, strict=True))
        return [by_completion[k] for k in range(len(order))]

    def skip(self, annotator: str, place: int) -> None:
        """Write that the annotator skipped the item."""
        self._append(annotator, place, skipped=True)

    def undo(self, annotator: str) -> int | None:
        """Undo the annotator's latest answer or skip; return its item's index, or None if there is none."""
        done = self._done(annotator)
        if not done:
            return None
        key = list(done)[-1]
        place = next(place for place, item in enumerate(self.items) if item.key() == key)
        self._append(annotator, place, undone=True)
        return place

    def agreement(self) -> Agreement | None:
        """How far all annotators of the file agree so far; None if no two have answered the same prompt."""
        rankings = [ranking for ranking in rankings_of(self._rows()) if isinstance(ranking, Ranking)]
        return agreement([ranking for ranking in latest_lines(rankings) if ranking.goodness])

    def _done(self, annotator: str) -> dict[str, dict[str, Any]]:
        """The lines of answered or skipped items by item key, oldest first."""
        keys = {item.key() for item in self.items}
        done: dict[str, dict[str, Any]] = {}
        for row, _ in self._rows():
            if isinstance(row, UserError) or row.get("annotator") != annotator:
                continue  # a line truncated by a kill is not an answer
            key = json.dumps([row.get("prompt"), row.get("completions")])
            done.pop(key, None)
            if key in keys and not row.get("undone"):
                done[key] = row
        return done

    def _rows(self) -> list[RowAndPlace]:
        """The file's rows, read again if anyone has written since."""
        found = self.path.stat()
        if self._read[0] != (state := (found.st_size, found.st_mtime_ns)):
            self._read = state, list(read_rows(self.path))
        return self._read[1]

    def _append(self, annotator: str, place: int, **answer: Any) -> None:
        item = self.items[place]
        line = json.dumps({**item.row(), "annotator": annotator, **answer}, ensure_ascii=False) + "\n"
        with self._locked() as file:
            self._repair_last_line(file)
            size, data = os.fstat(file).st_size, line.encode()
            if os.write(file, data) < len(data):
                os.ftruncate(file, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file)

    @staticmethod
    def _repair_last_line(file: int) -> None:
        """If a crash truncated the last line, remove it; if only its line break is missing, add that."""
        size = os.fstat(file).st_size
        text = os.pread(file, size, 0)
        tail = text[text.rfind(b"\n") + 1 :]
        if tail:
            try:
                json.loads(tail)
                os.write(file, b"\n")
            except ValueError:
                os.ftruncate(file, size - len(tail))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        import fcntl

        try:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise UserError(f"cannot write the answers to {self.path}: {error.strerror}") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
        finally:
            os.close(file)


def _pairs(ranking: Ranking) -> Iterable[Ranking]:
    """Every two of its completions as a ranking of their own, not rated."""
    for i, j in combinations(range(len(ranking.completions)), 2):
        ids = ranking.completion_ids
        yield replace(
            ranking,
            completions=[ranking.completions[i], ranking.completions[j]],
            ended=[ranking.ended[i], ranking.ended[j]],
            completion_ids=None if ids is None else [ids[i], ids[j]],
            goodness=[],
            ratings=None,
            criteria={},
        )
