# SPDX-License-Identifier: Apache-2.0
"""What happens to a person's answers: one line each, on the disk before the next prompt is shown.

The file of answers only grows. An answer, a skip and an undo are each one line of the feedback schema; of several by
one annotator about the same prompt and completions the last counts. Lines are appended whole, under a lock and synced,
so that several annotators, also from several processes, share one file, and a kill at any moment loses nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf_fast.data.files import read_rows
from rlhf_fast.errors import UserError

from .schema import Ranking, each_ranking

BEST_RATING = 7


class Desk:
    """The prompts of one file, handed to annotators by name, and the file their answers go to."""

    def __init__(self, source: str | Path, answers: str | Path, *, rate: bool = False) -> None:
        """`rate`: 1 to 7 for each completion, else ranks. UserError for a wrong line or an unwritable file."""
        self.rate = rate
        self.items: list[Ranking] = []
        seen: set[str] = set()
        for found in each_ranking(source):
            if isinstance(found, UserError):
                raise found
            if found.key() not in seen:
                seen.add(found.key())
                self.items.append(found)
        if not self.items:
            raise UserError(f"{source} holds nothing to label")
        self.path = Path(answers)
        if self.path.resolve() == Path(source).resolve():
            raise UserError(f"the answers need a file of their own: {source} is what is labelled")
        with self._locked():
            pass

    def best(self) -> int:
        """The largest number that a completion may get: 7 when rating, else as many ranks as completions."""
        return BEST_RATING if self.rate else max(len(item.completions) for item in self.items)

    def next(self, annotator: str) -> int | None:
        """The first item that `annotator` has neither answered nor skipped; None when all are done."""
        done = self._done(annotator)
        return next((place for place, item in enumerate(self.items) if item.key() not in done), None)

    def progress(self, annotator: str) -> tuple[int, int]:
        """(done, all)."""
        return len(self._done(annotator)), len(self.items)

    def order(self, annotator: str, place: int) -> list[int]:
        """Shuffled completions of an item: the same at every look of one annotator, another for each of them."""
        item = self.items[place]
        order = list(range(len(item.completions)))
        random.Random(annotator + item.key()).shuffle(order)
        return order

    def answer(self, annotator: str, place: int, numbers: Sequence[int]) -> None:
        """Keep the ranks (1 is best) or ratings of an item's completions, in the order they were shown in."""
        placed = dict(zip(self.order(annotator, place), map(int, numbers), strict=True))
        given = [placed[k] for k in range(len(placed))]
        if not all(1 <= number <= self.best() for number in given):
            raise ValueError(f"answers must be between 1 and {self.best()}, got {given}")
        if self.rate:
            self._append(annotator, place, ratings=given)
        else:
            levels = sorted(set(given))  # 1, 1, 3 says the same as 1, 1, 2
            self._append(annotator, place, ranks=[levels.index(number) + 1 for number in given])

    def skip(self, annotator: str, place: int) -> None:
        """Keep that the annotator did not want to answer."""
        self._append(annotator, place, skipped=True)

    def undo(self, annotator: str) -> int | None:
        """Take the annotator's newest answer or skip back; its place, or None if there is none."""
        done = self._done(annotator)
        if not done:
            return None
        key = list(done)[-1]
        place = next(place for place, item in enumerate(self.items) if item.key() == key)
        self._append(annotator, place, undone=True)
        return place

    def _done(self, annotator: str) -> dict[str, dict[str, Any]]:
        """Answered or skipped items, by key, in the order of time."""
        keys = {item.key() for item in self.items}
        done: dict[str, dict[str, Any]] = {}
        for row, _ in read_rows(self.path):
            if isinstance(row, UserError) or row.get("annotator") != annotator:
                continue  # a line cut short by a kill is no answer
            key = json.dumps([row.get("prompt"), row.get("completions")])
            done.pop(key, None)
            if key in keys and not row.get("undone"):
                done[key] = row
        return done

    def _append(self, annotator: str, place: int, **answer: Any) -> None:
        item = self.items[place]
        line = json.dumps({**item.row(), "annotator": annotator, **answer}, ensure_ascii=False) + "\n"
        with self._locked() as file:
            self._mend(file)
            os.write(file, line.encode())
            os.fsync(file)

    @staticmethod
    def _mend(file: int) -> None:
        """End a last line that is whole but for its line break, and take away one that a crash cut short."""
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
