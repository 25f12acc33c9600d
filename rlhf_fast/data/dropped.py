# SPDX-License-Identifier: Apache-2.0
"""Rows that teach nothing or cannot be used: left out, counted by reason, the first ten named; errors with `strict`."""

from __future__ import annotations

from pathlib import Path

from rlhf_fast.errors import UserError
from rlhf_fast.run.progress import notice

NAMED = 10
UNUSABLE = "they cannot be used (strict makes that an error)"


class Dropped:
    """Collects what is left out of one source; `report` says it."""

    def __init__(self, source: str | Path, strict: bool = False) -> None:
        """With `strict` a row that cannot be used is raised at once; what only teaches nothing is not."""
        self.source, self.strict = source, strict
        self.by_reason: dict[str, list[UserError]] = {}

    def add(self, error: UserError, reason: str = UNUSABLE) -> None:
        """Leave a row out, or raise its error."""
        if self.strict and reason == UNUSABLE:
            raise error
        self.by_reason.setdefault(reason, []).append(error)

    def count(self) -> int:
        """How many rows have been left out."""
        return sum(map(len, self.by_reason.values()))

    def report(self, kept: int) -> None:
        """Say what was left out beside the `kept` rows; UserError if nothing is left."""
        texts = [self._text(reason, errors, kept + self.count()) for reason, errors in self.by_reason.items()]
        if texts and not kept:
            only = [error for errors in self.by_reason.values() for error in errors]
            raise UserError(str(only[0]) if len(only) == 1 else "\n".join([*texts, f"{self.source}: no row is left"]))
        for text in texts:
            notice(text)

    def _text(self, reason: str, errors: list[UserError], total: int) -> str:
        lines = [f"{len(errors)} of {total} rows of {self.source} were left out: {reason}", *map(str, errors[:NAMED])]
        if len(errors) > NAMED:
            lines.append(f"... and {len(errors) - NAMED} more")
        return "\n  ".join(lines)
