# SPDX-License-Identifier: Apache-2.0
"""Rows of a data file, each with the place it was read from, so that errors can name it.

    data.jsonl                 one JSON object a line, UTF-8        "data.jsonl:7"
    data.json                  one list of objects                  "data.json, item 7"
    data.parquet, data.csv     one example a row                   "data.parquet, row 7", "data.csv:7"
    datasets:NAME[:SPLIT]      the data set `datasets.load_dataset(NAME)`, split train by default

JSON and CSV may be compressed (`.jsonl.gz`), up to 1 GiB unpacked. Empty CSV cells are left out. A CSV cell is text,
except that messages and the columns that hold lists (`completions`, `ranks`, ...) are JSON.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rlhf_fast.errors import UserError

from .dropped import Dropped
from .messages import filled_in_removed, is_messages

Row = dict[str, Any]
RowAndPlace = tuple[Row | UserError, str]  # a row or its error, and where it was read
T = TypeVar("T")
HUB = "datasets:"
LISTS = {"completions", "ranks", "ratings", "ended", "tools", "completion_ids"}  # columns that never hold text
MOST_CHARACTERS = 2**31 - 1  # in a CSV cell; the module's own limit is 131072
PARQUET_ROWS = 1024  # read at once
MOST_EXPANDED = 2**30  # bytes that a compressed file may expand to: a small one can hold terabytes


def read_lines(source: str | Path, parse: Callable[[Row, str], T], strict: bool = False) -> list[T]:
    """`parse(row, where)` of each row of `source`. Rows for which it raises a UserError are dropped and listed.

    Raises UserError for the first such row with `strict`, and if no row is usable.
    """
    parsed, dropped = [], Dropped(source, strict)
    for row, where in read_rows(source):
        try:
            if isinstance(row, UserError):
                raise row
            parsed.append(parse(row, where))
        except UserError as error:
            dropped.add(error)
    dropped.report(len(parsed))
    if not parsed:
        raise no_data(source)
    return parsed


def no_data(source: str | Path) -> UserError:
    """The error for a source without a row, naming the form of its format."""
    forms = {".parquet": "rows", ".csv": "a line of column names and lines of cells", ".json": "a list of objects"}
    wanted = forms.get(_kind(Path(source)), "one JSON object on each line")
    return UserError(f"{source} holds no data: wanted {'rows' if str(source).startswith(HUB) else wanted}")


def _kind(path: Path) -> str:
    """The suffix that tells the format, before .gz."""
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def read_rows(source: str | Path) -> Iterator[RowAndPlace]:
    """(row, where) of each row; an unreadable row gives its error instead."""
    if str(source).startswith(HUB):
        return _hub(str(source))
    path = Path(source)
    if not path.is_file():
        reason = "it is a folder" if path.is_dir() else "No such file"
        raise UserError(f"cannot read the data file {path}: {reason}")
    return {".parquet": _parquet, ".csv": _csv, ".json": _json}.get(_kind(path), _jsonl)(path)


def _jsonl(path: Path) -> Iterator[RowAndPlace]:
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                row = _object(_parsed(line), where, _may_hold_surrogates(line))
            except json.JSONDecodeError as error:
                row = UserError(f"{where}: not valid JSON ({error.msg} at column {error.colno})")
            except ValueError as error:
                row = UserError(f"{where}: {error}")
            yield row, where


def _json(path: Path) -> Iterator[RowAndPlace]:
    text = _text(path)
    try:
        rows = _parsed(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # it has one object a line
            yield from _jsonl(path)
            return
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg} at column {error.colno})") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    suspect = _may_hold_surrogates(text)
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], start=1):
        where = f"{path}, item {number}"
        yield _object(row, where, suspect), where


def _parsed(text: str) -> Any:
    """Parse JSON; ValueError if it is malformed or too deep."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("not valid JSON (nested too deeply)") from None


def _csv(path: Path) -> Iterator[RowAndPlace]:
    csv.field_size_limit(MOST_CHARACTERS)
    reader = csv.DictReader(io.StringIO(_text(path), newline=""))  # rows end at CR and LF alone, not at U+2028
    before = 1
    try:
        _check_header(path, reader.fieldnames)
        for cells in reader:
            before, number = reader.line_num, before + 1  # the row's first line: a quoted cell may hold line breaks
            where = f"{path}:{number}"
            yield _csv_row(cells, len(reader.fieldnames or []), where), where
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not valid CSV ({error})") from None


def _check_header(path: Path, names: Sequence[str] | None) -> None:
    """UserError for a file whose columns are separated by something else than commas."""
    if names and len(names) == 1 and (other := next((mark for mark in ";\t|" if mark in names[0]), None)):
        raise UserError(
            f"{path}: its first line is one column, {names[0]!r}: columns must be separated by commas, not by {other!r}"
        )


def _csv_row(cells: Row, wanted: int, where: str) -> Row | UserError:
    if None in cells or None in cells.values():
        return UserError(f"{where}: wanted {wanted} cells, as many as in the first line")
    try:
        return {name: _cell(name, text) for name, text in cells.items() if text}
    except ValueError as error:
        return UserError(f"{where}: {error}")


def _cell(name: str, text: str) -> Any:
    """A cell as text or as the JSON list it holds: messages in any column, other lists in the columns `LISTS`."""
    if not text.lstrip().startswith("["):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if is_messages(value) or (name in LISTS and isinstance(value, list)):
        return value
    if text.lstrip("[ \n").startswith("{") and ("'role'" in text or '"role"' in text):  # as pandas writes them
        raise ValueError(
            f'"{name}" looks like messages, but is not JSON: write it with json.dumps, as '
            '[{"role": "user", "content": "..."}]'
        )
    return text


def _parquet(path: Path) -> Iterator[RowAndPlace]:
    import pyarrow
    import pyarrow.parquet

    number, size = 0, 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=PARQUET_ROWS):
                size += batch.nbytes
                if size > max(MOST_EXPANDED, path.stat().st_size):
                    raise _expands(path)
                for row in batch.to_pylist():
                    number += 1
                    yield filled_in_removed(row), f"{path}, row {number}"
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"cannot read the data file {path}: {error}") from None


def _hub(source: str) -> Iterator[RowAndPlace]:
    from datasets import load_dataset

    name, _, split = source.removeprefix(HUB).partition(":")
    try:
        rows = load_dataset(name, split=split or "train")
    except Exception as error:
        raise UserError(f"cannot load the data set {source!r}: {str(error).strip().splitlines()[0]}") from None
    for number, row in enumerate(rows, start=1):
        yield filled_in_removed(row), f"{source}, row {number}"


def _text(path: Path) -> str:
    try:
        data = _unpacked(path) if path.suffix == ".gz" else path.read_bytes()
        text = data.decode("utf-8-sig")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a gzip file, or is cut short: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read the data file {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from None
    return text


def _unpacked(path: Path) -> bytes:
    with gzip.open(path) as file:
        data = file.read(MOST_EXPANDED + 1)
    if len(data) > MOST_EXPANDED:
        raise _expands(path)
    return data


def _expands(path: Path) -> UserError:
    return UserError(
        f"{path} has {path.stat().st_size} bytes and expands to more than {MOST_EXPANDED / 2**30:g} GiB: if you "
        "trust it, unpack it yourself, or split it"
    )


def _may_hold_surrogates(text: str) -> bool:
    return "\\ud" in text or "\\uD" in text


def _object(row: Any, where: str, suspect: bool) -> Row | UserError:
    """The row, or its error if it is not an object or (checked if `suspect`) holds half of a surrogate pair."""
    if not isinstance(row, dict):
        return UserError(f'{where}: wanted a JSON object such as {{"prompt": "..."}}, got {json.dumps(row)[:60]}')
    try:
        if suspect:
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return UserError(f"{where}: holds half of a surrogate pair (as in \\ud83d), which is no character")
    return row
