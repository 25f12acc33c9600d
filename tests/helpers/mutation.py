# SPDX-License-Identifier: Apache-2.0
"""What the lists of mutants share: a line of source broken on purpose, and the report of who noticed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def break_file(path: Path, old: str, new: str, which: int = 0) -> None:
    """Replaces the `which`-th occurrence of `old`, which must be there."""
    parts = path.read_text().split(old)
    assert len(parts) > which + 1, f"{path.name} no longer has {old!r}"
    path.write_text(old.join(parts[: which + 1]) + new + old.join(parts[which + 1 :]))


def report(tried: Iterable[tuple[str, str, str, str]]) -> int:
    """Prints (file, old, new, who noticed or ''), the count and the survivors' number; 1 if there are any."""
    count = survivors = 0
    for file, old, new, way in tried:
        count += 1
        survivors += not way
        print(f"{f'caught by {way}' if way else 'SURVIVES':24} {file}: {old.strip()!r} -> {new.strip()!r}", flush=True)
    print(f"{count} mutants, {survivors} survive")
    return int(survivors > 0)
