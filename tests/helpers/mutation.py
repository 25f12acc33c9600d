# SPDX-License-Identifier: Apache-2.0
"""What the lists of mutants share: a line of source broken on purpose, who noticed, and what earlier runs found."""

from __future__ import annotations

import hashlib
import json
import resource
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

FOUND = Path(__file__).resolve().parents[2] / "build" / "mutants"
# Of a test run on a broken kernel, which may go round for ever: seconds of work, not of the clock, so that a busy
# machine kills nothing. Whole kernels take about a tenth of it.
CPU_SECONDS = 600


class Tried(NamedTuple):
    file: str
    old: str
    new: str
    noticed_by: str  # '' if nobody
    equivalent: str = ""  # why nobody can notice, for a mutant that is not run


def break_file(path: Path, old: str, new: str, which: int = 0) -> None:
    """Replaces the `which`-th occurrence of `old`, which must be there."""
    parts = path.read_text().split(old)
    assert len(parts) > which + 1, f"{path.name} no longer has {old!r}"
    path.write_text(old.join(parts[: which + 1]) + new + old.join(parts[which + 1 :]))


def limit_work() -> None:
    """Ends this process once it has worked for CPU_SECONDS."""
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))


class Found:
    """What was found with the same sources, a line each in a file of build/, so that a run that was stopped goes on.

    Processes may share the file: each takes the mutants that no line names when it comes to them.
    """

    def __init__(self, name: str, sources: Iterable[bytes]) -> None:
        digest = hashlib.sha256(b"\0".join(sources))
        self.path = FOUND / f"{name}-{digest.hexdigest()[:16]}.jsonl"

    def by(self, mutant: Iterable[object], find: Callable[[], str]) -> str:
        """Who notices this mutant: remembered, or found now and remembered."""
        key = [str(part) for part in mutant]
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            known, way = json.loads(line)
            if known == key:
                return str(way)
        way = find()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps([key, way]) + "\n")
        return way


def report(tried: Iterable[Tried]) -> int:
    """Prints the list as it grows, and how many were caught, are equivalent, and survive; 1 if any survive."""
    caught = equivalent = survivors = 0
    for file, old, new, way, why in tried:
        caught += bool(way)
        equivalent += bool(why)
        survivors += not (way or why)
        result = f"caught by {way}" if way else f"equivalent: {why}" if why else "SURVIVES"
        print(f"{result:24} {file}: {old.strip()!r} -> {new.strip()!r}", flush=True)
    print(f"{caught + equivalent + survivors} mutants: {caught} caught, {equivalent} equivalent, {survivors} survive")
    return int(survivors > 0)
