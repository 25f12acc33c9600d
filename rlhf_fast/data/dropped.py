# SPDX-License-Identifier: Apache-2.0
"""Rows that are unusable or teach nothing: dropped, counted by reason, the first of each listed; `strict` raises."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from rlhf_fast.errors import UserError
from rlhf_fast.run.progress import notice

NAMED = 10  # reasons, and rows of each reason
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
        head = f"{len(errors)} of {total} rows of {self.source} were left out: {reason}"
        return "\n  ".join([head, *grouped(list(map(str, errors)), NAMED)])


def grouped(messages: Sequence[str], most: int) -> list[str]:
    """The messages "place: reason", each reason once with its first places and their number; at most `most` reasons.

    Reasons that differ in numbers and in what they quote alone are one.
    """
    groups: dict[str, list[str]] = {}
    for message in messages:
        _, _, reason = message.partition(": ")
        groups.setdefault(re.sub(r"got .*|'.*?'|\d+", "", reason, flags=re.DOTALL), []).append(message)
    lines = []
    for same in list(groups.values())[:most]:
        places = [message.partition(": ")[0] for message in same[1:]]
        others = ", ".join(places[: NAMED - 1]) + (", ..." if len(places) >= NAMED else "")
        lines.append(same[0] + (f" ({len(same)} rows: also {others})" if places else ""))
    if rest := sum(map(len, list(groups.values())[most:])):
        lines.append(f"... and {rest} more")
    return lines
