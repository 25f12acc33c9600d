# SPDX-License-Identifier: Apache-2.0
"""Rows that are unusable or teach nothing: dropped, counted by reason, the first ten listed; `strict` raises."""

from __future__ import annotations

from pathlib import Path

from rlhf_fast.errors import UserError
from rlhf_fast.run.progress import notice

NAMED = 10
UNUSABLE = "they cannot be used (strict makes that an error)"


class Dropped:
    """Collects the rows dropped from one source; `report` prints them."""

    def __init__(self, source: str | Path, strict: bool = False) -> None:
        """With `strict` an unusable row raises its error at once; a row that merely teaches nothing does not."""
        self.source, self.strict = source, strict
        self.by_reason: dict[str, list[UserError]] = {}

    def add(self, error: UserError, reason: str = UNUSABLE) -> None:
        """Drop a row, or raise its error."""
        if self.strict and reason == UNUSABLE:
            raise error
        self.by_reason.setdefault(reason, []).append(error)

    def count(self) -> int:
        """Number of rows dropped."""
        return sum(map(len, self.by_reason.values()))

    def report(self, usable: int) -> None:
        """Print what was dropped beside the `usable` rows; UserError if no row is usable."""
        texts = [self._text(reason, errors, usable + self.count()) for reason, errors in self.by_reason.items()]
        if texts and not usable:
            all_errors = [error for errors in self.by_reason.values() for error in errors]
            raise UserError(
                str(all_errors[0]) if len(all_errors) == 1 else "\n".join([*texts, f"{self.source}: no row is left"])
            )
        for text in texts:
            notice(text)

    def _text(self, reason: str, errors: list[UserError], total: int) -> str:
        lines = [f"{len(errors)} of {total} rows of {self.source} were left out: {reason}", *map(str, errors[:NAMED])]
        if len(errors) > NAMED:
            lines.append(f"... and {len(errors) - NAMED} more")
        return "\n  ".join(lines)
