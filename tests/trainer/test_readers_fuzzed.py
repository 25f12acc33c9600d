# SPDX-License-Identifier: Apache-2.0
"""Readers on files that nobody meant to write: whatever is in one, the answer is rows or a UserError that names it."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rlhf_fast.data.examples import demonstration, prompt_line
from rlhf_fast.data.files import read_rows
from rlhf_fast.errors import UserError
from rlhf_fast.feedback.schema import Ranking, each_ranking

ODD = st.sampled_from(
    ["\u2028", "\u2029", "\x85", "\x0b", "\x1c", "\r", "\n", "\r\n", "\x00", "\ufeff", "\ud83d", "\U0001f600", '"', ","]
)
TEXT = st.lists(ODD | st.text(max_size=3), max_size=6).map("".join)
WRITABLE = TEXT.filter(lambda text: not any("\ud800" <= char <= "\udfff" for char in text))
MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "system", 3]),
        "content": TEXT | st.none() | st.lists(TEXT, max_size=2),
    },
    optional={"tool_calls": st.none() | st.just([{"function": {"name": "f", "arguments": "{"}}]), "name": st.none()},
)
SIDE = TEXT | st.lists(MESSAGE, max_size=3) | st.none() | st.integers()
NUMBER = st.integers(-3, 9) | st.floats() | st.just(10**400) | st.booleans() | st.none()
ROW = st.fixed_dictionaries(
    {},
    optional={
        "prompt": SIDE,
        "completion": SIDE,
        "messages": SIDE,
        "text": SIDE,
        "chosen": SIDE,
        "rejected": SIDE,
        "tools": TEXT | st.just([{}]) | st.none(),
        "completions": st.lists(
            SIDE | st.dictionaries(st.sampled_from(["rank", "completion"]), SIDE | NUMBER), max_size=3
        ),
        "ranks": st.lists(NUMBER, max_size=3),
        "ratings": st.lists(NUMBER, max_size=3) | NUMBER,
        "score_chosen": NUMBER,
        "score_rejected": NUMBER,
        "margin": NUMBER,
        "completion_ids": st.lists(st.lists(NUMBER, max_size=2), max_size=3),
        "fields": st.dictionaries(st.sampled_from(["prompt", "a", "b"]), SIDE),
        "responses": st.dictionaries(
            st.just("ranking"), st.lists(st.dictionaries(st.sampled_from(["user_id", "value"]), SIDE))
        ),
        "data": st.dictionaries(st.sampled_from(["prompt", "items", "answer1", "answer2"]), SIDE),
        "annotations": st.lists(st.dictionaries(st.just("result"), st.lists(st.dictionaries(st.just("type"), TEXT)))),
    },
)
some = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read_everything(path: Path) -> list[Any]:
    """Rows by every reader; whatever cannot be used is a UserError with the file's name."""
    found: list[Any] = []
    try:
        rows = list(read_rows(path))
    except UserError as error:
        assert path.name in str(error)
        return found
    for row, where in rows:
        assert path.name in where and (isinstance(row, dict) or path.name in str(row))
        for parse in (prompt_line, demonstration) if isinstance(row, dict) else ():
            try:
                parse(row, where)
            except UserError as error:
                assert str(error).startswith(where)
        found.append(row)
    for ranking in each_ranking(path):
        assert isinstance(ranking, Ranking) or path.name in str(ranking)
    return found


def written(value: Any, escaped: bool) -> str:
    """JSON, where only half of a surrogate pair must be escaped: other characters may stand as they are."""
    text = json.dumps(value, ensure_ascii=escaped)
    return json.dumps(value) if any("\ud800" <= char <= "\udfff" for char in text) else text


@some
@given(
    rows=st.lists(ROW, max_size=4), end=st.sampled_from(["\n", "\r\n"]), bom=st.booleans(),
    kind=st.sampled_from("lwgx"), escaped=st.booleans(),
)  # fmt: skip
@example([{"prompt": "a\u2028b\u2029c\x85d"}], "\n", False, "l", False)  # line ends to str.splitlines, not to JSON
def test_json_of_any_content(tmp_path: Path, rows: list[Any], end: str, bom: bool, kind: str, escaped: bool) -> None:
    name = {"l": "f.jsonl", "w": "f.json", "g": "f.jsonl.gz", "x": "f.jsonl"}[kind]
    text = written(rows, escaped) if kind == "w" else "".join(written(row, escaped) + end for row in rows)
    data = ("\ufeff" * bom + text).encode()
    data = gzip.compress(data) if kind == "g" else data
    (tmp_path / name).write_bytes(data[: len(data) // 2] if kind == "x" else data)  # x: cut short
    found = read_everything(tmp_path / name)
    assert kind == "x" or len(found) == len(rows)  # nothing is lost, and nothing split


@some
@given(
    data=st.binary(max_size=40),
    name=st.sampled_from(["f.jsonl", "f.json", "f.csv", "f.parquet", "f.jsonl.gz", "f.csv.gz"]),
)
def test_bytes_of_any_kind(tmp_path: Path, data: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(data)
    read_everything(tmp_path / name)


@some
@given(rows=st.lists(st.tuples(WRITABLE, WRITABLE), min_size=1, max_size=4))
def test_csv_cells_come_back_as_they_were_written(tmp_path: Path, rows: list[tuple[str, str]]) -> None:
    file = io.StringIO(newline="")
    csv.writer(file).writerows([("prompt", "completion"), *rows])
    (tmp_path / "f.csv").write_bytes(file.getvalue().encode())
    found = read_everything(tmp_path / "f.csv")
    assert found == [{k: v for k, v in zip(("prompt", "completion"), row, strict=True) if v} for row in rows]


@pytest.mark.parametrize("line", ["[" * 100_000, '{"a": ' * 100_000, '{"prompt": 1' + "0" * 5000 + "}"])
def test_json_without_bounds_is_one_bad_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "f.jsonl").write_text(line + '\n{"prompt": "a"}\n')
    first, second = read_everything(tmp_path / "f.jsonl")
    assert isinstance(first, UserError) and second == {"prompt": "a"}
