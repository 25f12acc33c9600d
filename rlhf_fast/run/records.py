# SPDX-License-Identifier: Apache-2.0
"""Reading back what a run has written, however far it came."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf_fast.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file; none if it is missing. A last line truncated by a kill is left out.

    Raises UserError naming the line, if another one is damaged.
    """
    rows = []
    for number, line in enumerate(whole_lines(path), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if line:
                raise UserError(f"{path}:{number}: not valid JSON ({error}): {_WAY_OUT}") from None
    with suppress(ValueError):
        rows.append(json.loads(_last_line(path)))
    return rows


def whole_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file; none if it is missing. One truncated by a kill, which has no line break, is left out.

    Raises UserError naming the line, if one is not UTF-8.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # not splitlines, which also splits at other separators
    decoded = []
    for number, line in enumerate(lines, start=1):
        try:
            decoded.append(line.decode())
        except UnicodeDecodeError as error:
            raise UserError(f"{path}:{number}: not UTF-8 text ({error.reason}): {_WAY_OUT}") from None
    return decoded


def _last_line(path: Path) -> bytes:
    """What follows the last line break: nothing, a line truncated by a kill, or one that a person wrote."""
    return path.read_bytes().rpartition(b"\n")[2] if path.exists() else b""


_WAY_OUT = "the file was damaged after it was written; remove this line"
