# SPDX-License-Identifier: Apache-2.0
"""Reading back what a run has written, however far it came."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file; none if it is missing. A last line truncated by a kill is left out."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").split("\n"):  # splitlines would also split inside of texts
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
    return rows
