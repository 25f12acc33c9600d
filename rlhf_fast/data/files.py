# SPDX-License-Identifier: Apache-2.0
"""Rows of a data file, each with the place it was read from, so that whatever is wrong with one can be found.

    data.jsonl                 one JSON object a line, UTF-8        "data.jsonl:7"
    data.json                  one list of objects                  "data.json, item 7"
    data.parquet, data.csv     one row an example                   "data.parquet, row 7", "data.csv:7"
    datasets:NAME[:SPLIT]      whatever `datasets.load_dataset` finds under NAME, split train unless given

CSV cells that hold JSON lists are read as such, empty ones are left out.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from rlhf_fast.errors import UserError

Row = dict[str, Any]
T = TypeVar("T")
HUB = "datasets:"


def read_lines(source: str | Path, parse: Callable[[Row, str], T]) -> list[T]:
    """`parse(row, where)` of each row of `source`; UserError for the first bad row, or if there is none."""
    parsed = []
    for row, where in read_rows(source):
        if isinstance(row, UserError):
            raise row
        parsed.append(parse(row, where))
    if not parsed:
        raise UserError(f"{source} holds no data: wanted one JSON object on each line")
    return parsed


def read_rows(source: str | Path) -> Iterator[tuple[Row | UserError, str]]:
    """(row, where it stands) of each row; for one that cannot be read, the error stands in its place."""
    if str(source).startswith(HUB):
        return _hub(str(source))
    path = Path(source)
    if not path.is_file():
        reason = "it is a folder" if path.is_dir() else "No such file"
        raise UserError(f"cannot read the data file {path}: {reason}")
    readers = {".parquet": _parquet, ".csv": _csv, ".json": _json}
    return readers.get(path.suffix, _jsonl)(path)


def _jsonl(path: Path) -> Iterator[tuple[Row | UserError, str]]:
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                yield UserError(f"{where}: not valid JSON ({error.msg} at column {error.colno})"), where
                continue
            yield _object(row, where), where


def _json(path: Path) -> Iterator[tuple[Row | UserError, str]]:
    text = _text(path)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object a line after all
            yield from _jsonl(path)
            return
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg} at column {error.colno})") from None
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], start=1):
        where = f"{path}, item {number}"
        yield _object(row, where), where


def _csv(path: Path) -> Iterator[tuple[Row | UserError, str]]:
    reader = csv.DictReader(_text(path).splitlines(keepends=True))
    before = 1
    for cells in reader:
        before, number = reader.line_num, before + 1  # a quoted cell may hold line breaks: a row's first line counts
        where = f"{path}:{number}"
        if None in cells or None in cells.values():
            yield (
                UserError(f"{where}: wanted {len(reader.fieldnames or [])} cells, as many as in the first line"),
                where,
            )
        else:
            yield {name: _cell(value) for name, value in cells.items() if value}, where


def _cell(text: str) -> Any:
    if text.startswith("["):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text


def _parquet(path: Path) -> Iterator[tuple[Row | UserError, str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"cannot read the data file {path}: {error}") from None
    for number, row in enumerate(rows, start=1):
        yield {name: value for name, value in row.items() if value is not None}, f"{path}, row {number}"


def _hub(source: str) -> Iterator[tuple[Row | UserError, str]]:
    from datasets import load_dataset

    name, _, split = source.removeprefix(HUB).partition(":")
    try:
        rows = load_dataset(name, split=split or "train")
    except Exception as error:
        raise UserError(f"cannot load the data set {source!r}: {str(error).strip().splitlines()[0]}") from None
    for number, row in enumerate(rows, start=1):
        yield {key: value for key, value in row.items() if value is not None}, f"{source}, row {number}"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read the data file {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from None


def _object(row: Any, where: str) -> Row | UserError:
    if isinstance(row, dict):
        return row
    return UserError(f'{where}: wanted a JSON object such as {{"prompt": "..."}}, got {json.dumps(row)[:60]}')
