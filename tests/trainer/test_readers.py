# SPDX-License-Identifier: Apache-2.0
"""Feedback in other tools' formats, kinds of data file, and `rlhf-fast data check`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_fast import cli
from rlhf_fast.data.examples import read_prompts, read_sft
from rlhf_fast.data.files import read_lines
from rlhf_fast.errors import UserError
from rlhf_fast.feedback.agreement import agreement
from rlhf_fast.feedback.schema import Ranking, read_feedback

USER = {"role": "user", "content": "q"}


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def argilla_ranks(first: int, second: int) -> list[dict[str, Any]]:
    return [{"rank": second, "value": "response-2"}, {"rank": first, "value": "response-1"}]


TRL = [
    {"prompt": "q", "chosen": " good", "rejected": " bad"},
    {"chosen": "q one two", "rejected": "q one three"},
    {"chosen": [USER, *answer("good")], "rejected": [USER, *answer("bad")], "score_chosen": 9, "score_rejected": 4},
]
NEMO = {"context": [USER], "completions": [{"rank": r, "completion": answer(t)} for r, t in ((1, "b"), (0, "a"))]}
ARGILLA_1 = {
    "prompt": "q",
    "response-1": "a",
    "response-2": "b",
    "ranking": [
        {"user_id": "u1", "status": "submitted", "value": argilla_ranks(2, 1)},
        {"user_id": "u2", "status": "discarded", "value": None},
        {"user_id": "u3", "status": "submitted", "value": argilla_ranks(1, 1)},
    ],
}
ARGILLA_2: dict[str, Any] = {
    "id": "7",
    "fields": {"instruction": "q", "reply-1": "a", "reply-2": "b"},
    "responses": {"ranking": [{"value": ["reply-2", "reply-1"], "user_id": "u4"}]},
}
ARGILLA_FLAT = {  # `instruction` is a word of Alpaca too
    **ARGILLA_2["fields"],
    "ranking": [{"value": ["reply-2", "reply-1"], "user_id": "u5"}],
}
ITEMS = [{"id": "x", "title": "a"}, {"id": "y", "title": "A", "body": "b"}, {"id": "z", "title": "c"}]
STUDIO = {
    "data": {"prompt": "q", "items": ITEMS},
    "annotations": [
        {"completed_by": 3, "result": [{"type": "ranker", "value": {"ranker": {"rank": ["y", "z", "x"]}}}]},
        {"completed_by": {"id": 4, "email": "e@x"},
         "result": [{"type": "ranker", "value": {"ranker": {"good": ["x"], "bad": ["y", "z"]}}}]},
        {"completed_by": 5, "was_cancelled": True, "result": []},
    ],
}  # fmt: skip
PAIRWISE = {
    "data": {"prompt": "q", "answer1": "a", "answer2": "b"},
    "annotations": [{"completed_by": 3, "result": [{"type": "pairwise", "value": {"selected": "right"}}]}],
}


def test_trl_preferences_with_and_without_a_prompt(write_jsonl: Any) -> None:
    plain, implicit, messages = read_feedback(write_jsonl("trl.jsonl", *TRL))
    assert (plain.prompt, plain.completions, plain.pairs()) == ("q", [" good", " bad"], [(0, 1)])
    assert (implicit.prompt, implicit.completions) == ("q one", [" two", " three"])
    assert (messages.prompt, messages.completions) == ([USER], ["good", "bad"])
    assert messages.ratings == [9.0, 4.0]


def test_nemo_counts_ranks_from_zero(write_jsonl: Any) -> None:
    (ranking,) = read_feedback(write_jsonl("nemo.jsonl", NEMO))
    assert (ranking.prompt, ranking.completions, ranking.pairs()) == ([USER], ["b", "a"], [(1, 0)])


def test_argilla_gives_one_ranking_for_each_submitted_answer(write_jsonl: Any) -> None:
    first, tied, second, flat = read_feedback(write_jsonl("argilla.jsonl", ARGILLA_1, ARGILLA_2, ARGILLA_FLAT))
    assert (first.annotator, first.completions, first.pairs()) == ("u1", ["a", "b"], [(1, 0)])
    assert (tied.annotator, tied.pairs()) == ("u3", [])
    for one in (second, flat):
        assert (one.prompt, one.completions, one.pairs()) == ("q", ["a", "b"], [(1, 0)])


def test_label_studio_rankers_buckets_and_pairs(tmp_path: Path) -> None:
    path = tmp_path / "export.json"  # one JSON list, as Label Studio exports it
    path.write_text(json.dumps([STUDIO, PAIRWISE]))
    ranked, bucketed, pair = read_feedback(path)
    assert ranked.completions == ["a", "b", "c"] and ranked.goodness == [-3, -1, -2] and ranked.annotator == "3"
    assert bucketed.pairs() == [(0, 1), (0, 2)] and bucketed.annotator == "e@x"
    assert pair.pairs() == [(1, 0)] and pair.where == f"{path}, item 2"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "a", "rejected": answer("b")}, 'looks like a row of TRL, but "chosen" and "rejected" are not of'),
        ({"completions": [{"rank": 0}]}, "looks like a row of NeMo, but 'completion' is missing"),
        ({**ARGILLA_2, "fields": {"prompt": "q"}}, "looks like a row of Argilla, but its ranking names"),
        ({"data": {}, "annotations": []}, "looks like a row of Label Studio, but none of its fields is a prompt"),
    ],
)
def test_a_row_of_another_tool_that_is_wrong_is_named(write_jsonl: Any, row: Any, message: str) -> None:
    path = write_jsonl("f.jsonl", TRL[0], row)
    with pytest.raises(UserError, match=message) as caught:
        read_feedback(path, strict=True)
    assert str(caught.value).startswith(f"{path}:2: ")


def test_the_last_word_of_an_annotator_counts(write_jsonl: Any) -> None:
    row = {"prompt": "p", "completions": ["a", "b"]}
    path = write_jsonl(
        "f.jsonl",
        {**row, "ranks": [1, 2], "annotator": "ann"},
        {**row, "ranks": [1, 2], "annotator": "ben"},
        {**row, "ranks": [2, 1], "annotator": "ann"},
        {**row, "annotator": "ben", "undone": True},
    )
    (left,) = read_feedback(path)
    assert (left.annotator, left.pairs()) == ("ann", [(1, 0)])


def test_parquet_csv_and_data_sets_hold_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": "a, b", "completion": 'line one\nand "two"'}, {"prompt": "c", "completion": "d"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    (tmp_path / "t.csv").write_text('prompt,completion\n"a, b","line one\nand ""two"""\nc,d\n')
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for source, where in (
        (f"{tmp_path}/t.parquet", f"{tmp_path}/t.parquet, row 2"),
        (f"{tmp_path}/t.csv", f"{tmp_path}/t.csv:4"),
        (f"datasets:{tmp_path}/hub:train", f"datasets:{tmp_path}/hub:train, row 2"),
    ):
        found = read_lines(source, lambda row, where: (row, where))
        assert [row for row, _ in found] == rows and found[1][1] == where
    (tmp_path / "bad.csv").write_text("prompt,completion\na,b,c\n")
    with pytest.raises(UserError, match=r"bad.csv:2: wanted 2 cells"):
        read_lines(tmp_path / "bad.csv", lambda row, where: row)
    with pytest.raises(UserError, match="cannot load the data set 'datasets:/nowhere'"):
        read_lines("datasets:/nowhere", lambda row, where: row)


@pytest.mark.parametrize(("mark", "shown"), [(";", "';'"), ("\t", r"'\t'"), ("|", "'|'")])
def test_a_csv_with_another_delimiter_is_named_with_its_columns(
    mark: str, shown: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "f.csv"
    path.write_text(f"prompt{mark}completion\na, b{mark}c\n")
    assert cli.main(["data", "check", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"{path}: its first line is one column" in error and f"separated by commas, not by {shown}" in error
    path.write_text("prompt\na; b\n")  # one column that holds such a mark is fine
    assert cli.main(["data", "check", str(path)]) == 0


def test_data_check_names_the_columns_that_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "f.csv").write_text("question,reply\n" + "a,b\n" * 30)
    assert cli.main(["data", "check", str(tmp_path / "f.csv")]) == 2
    shown = capsys.readouterr().out
    assert "columns of the first row: question, reply" in shown and "the keys of the row: 'question', 'reply'" in shown
    assert len(shown.splitlines()) < 20 and "(30 rows: also " in shown and "30 wrong lines" in shown
    with pytest.raises(UserError, match="the keys of the row: 'question', 'reply'"):
        read_prompts(tmp_path / "f.csv")


def test_the_same_reason_is_named_once_with_its_places(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"p{i}", "completion": "c" if i % 2 else i} for i in range(40)]
    (tmp_path / "f.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    assert len(read_sft(tmp_path / "f.jsonl")) == 20
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"rlhf-fast: 21 of 41 rows of {tmp_path}/f.jsonl were left out") and len(lines) == 3
    assert "got 0 (20 rows: also " in lines[1] and f"{tmp_path}/f.jsonl:19, ..." in lines[1]
    assert "not valid JSON" in lines[2]


def rated(annotator: str, goodness: list[float], prompt: str = "p") -> Ranking:
    size = len(goodness)
    return Ranking(prompt, ["x"] * size, [True] * size, goodness, "f:1", annotator=annotator)


def test_agreement_by_hand() -> None:
    assert agreement([rated("ann", [1, 2]), rated("ben", [1, 2], "other")]) is None
    whole = agreement([rated("ann", [3, 2, 1]), rated("ben", [30, 20, 10])])
    assert whole == (3, 1.0, 1.0)
    # Of the three pairs one is turned round: in both orders 12 answers, half of them "better". Observed disagreement
    # 1/3, expected 2 x 6 x 6 / (12 x 11) = 6/11.
    mixed = agreement([rated("ann", [3, 2, 1]), rated("ben", [3, 1, 2])])
    assert mixed is not None and mixed.pairs == 3 and mixed.raw == pytest.approx(2 / 3)
    assert mixed.alpha == pytest.approx(1 - (1 / 3) / (6 / 11))
    three = agreement([rated("ann", [2, 1]), rated("ben", [2, 1]), rated("cleo", [1, 1])])
    assert three is not None and three.pairs == 3 and three.raw == pytest.approx(1 / 3)


def test_data_check_points_at_every_wrong_line(write_jsonl: Any, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"prompt": "p", "completions": ["a", "b", "c"]}
    good = [{**row, "annotator": who, "ranks": ranks} for who, ranks in (("ann", [1, 2, 2]), ("ben", [1, 2, 3]))]
    path = write_jsonl("f.jsonl", good[0], "{", {**row, "ranks": [1]}, good[1], row)
    assert cli.main(["data", "check", path]) == 2
    text = capsys.readouterr().out
    assert f"{path}:2: not valid JSON" in text and f'{path}:3: "ranks" must be 3 finite numbers' in text
    for line in ("3, of which 2 are rated", "pairs: 5, and 1 ties", "ann (1), ben (1)", "2 wrong lines"):
        assert line in text
    assert "agreement of ann and ben: 67% of 3 pairs, Krippendorff's alpha" in text
    assert cli.main(["data", "check", write_jsonl("good.jsonl", *good)]) == 0
    assert "no line is wrong" in capsys.readouterr().out


def test_data_check_reads_demonstrations_and_prompts_too(write_jsonl: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl("sft.jsonl", {"prompt": "a", "completion": "b"}, {"prompt": "a"})
    assert cli.main(["data", "check", path]) == 2
    assert "demonstrations: 1" in (text := capsys.readouterr().out) and f"{path}:2: " in text
    assert cli.main(["data", "check", write_jsonl("prompts.jsonl", {"prompt": "a"}, {"prompt": "a"})]) == 0
    assert "prompts: 2\n  different prompts: 1" in capsys.readouterr().out
