# SPDX-License-Identifier: Apache-2.0
"""Labelling: what is kept of answers whatever happens. The page: test_label_page.py."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from rlhf_fast import cli
from rlhf_fast.errors import UserError
from rlhf_fast.feedback.answer_file import AnswerFile
from rlhf_fast.feedback.schema import read_feedback


@pytest.fixture
def source(write_jsonl: Any) -> str:
    """Three prompts with three completions each."""
    rows = [{"prompt": f"prompt {i}", "completions": [f"a{i}", f"b{i}", f"c{i}"], "model": "secret"} for i in range(3)]
    return write_jsonl("completions.jsonl", *rows)


def numbers(answer_file: AnswerFile, annotator: str, place: int, by_text: dict[str, int]) -> list[int]:
    """What to answer, in the order the page shows, for each completion to get its number."""
    completions = answer_file.items[place].completions
    return [by_text[completions[k][0]] for k in answer_file.order(annotator, place)]


def test_answers_skips_and_undo_survive_a_restart(source: str, tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    answer_file = AnswerFile(source, answers)
    answer_file.answer("ann", 1, numbers(answer_file, "ann", 1, {"a": 3, "b": 1, "c": 3}))
    answer_file.skip("ann", 0)
    assert (
        answer_file.next("ann") == 2 and answer_file.progress("ann") == (2, 3) and answer_file.progress("ben") == (0, 3)
    )
    answer_file = AnswerFile(source, answers)  # as after a kill
    assert answer_file.next("ann") == 2
    assert answer_file.undo("ann") == 0 and answer_file.next("ann") == 0
    assert answer_file.undo("ann") == 1 and answer_file.undo("ann") is None and answer_file.progress("ann") == (0, 3)
    answer_file.answer("ann", 1, numbers(answer_file, "ann", 1, {"a": 2, "b": 1, "c": 3}))
    answer_file.answer("ben", 1, numbers(answer_file, "ben", 1, {"a": 1, "b": 3, "c": 3}))
    ann, ben = read_feedback(answers)
    assert (ann.annotator, ann.goodness, ann.model) == ("ann", [-2, -1, -3], "secret")
    assert (ben.annotator, ben.goodness) == ("ben", [-1, -2, -2])  # ranks without gaps


def test_completions_are_shuffled_for_each_annotator_and_ratings_kept(source: str, tmp_path: Path) -> None:
    answer_file = AnswerFile(source, tmp_path / "answers.jsonl", rate=True)
    orders = {tuple(answer_file.order(name, 0)) for name in "abcdefgh"}
    assert len(orders) > 2 and answer_file.order("a", 0) == answer_file.order("a", 0)
    answer_file.answer("ann", 2, numbers(answer_file, "ann", 2, {"a": 7, "b": 1, "c": 7}))
    assert read_feedback(tmp_path / "answers.jsonl")[0].ratings == [7, 1, 7]
    for wrong in ([8, 1, 1], [0, 1, 1], [1, 1], [1, 1, None], [1, 1, True], [1, 1, 2.0]):
        with pytest.raises(ValueError, match="wanted 3 whole numbers between 1 and 7"):
            answer_file.answer("ann", 2, wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="between 1 and 3"):
        AnswerFile(source, tmp_path / "answers.jsonl").answer("ann", 2, [4, 1, 1])


def test_ratings_by_criterion_are_kept_and_can_be_learned_from(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = tmp_path / "answers.jsonl"
    answer_file = AnswerFile(source, answers, criteria=("helpful", "honest"))
    overall = numbers(answer_file, "ann", 0, {"a": 1, "b": 2, "c": 2})
    helpful = numbers(answer_file, "ann", 0, {"a": 2, "b": 7, "c": 1})
    answer_file.answer("ann", 0, overall, {"helpful": helpful})
    answer_file.answer("ann", 1, overall)
    for wrong in ({"kind": helpful}, {"helpful": [1, 2]}, {"honest": [8, 1, 1]}):
        with pytest.raises(ValueError):
            answer_file.answer("ann", 2, overall, wrong)
    whole, plain = read_feedback(answers)
    assert whole.goodness == [-1, -2, -2] and whole.criteria == {"helpful": [2, 7, 1]} and plain.criteria == {}
    (by,) = read_feedback(answers, criterion="helpful")
    assert by.goodness == by.ratings == [2, 7, 1] and by.pairs() == [(1, 0), (0, 2), (1, 2)]
    assert "1 rated lines of" in capsys.readouterr().err
    with pytest.raises(UserError, match="no line is rated by the criterion 'kind'; its criteria: helpful"):
        read_feedback(answers, criterion="kind")
    assert cli.main(["data", "check", str(answers)]) == 0
    assert "criteria: helpful (1 lines)" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["helpful"], {"": [1, 2]}, {"helpful": [1]}, {"helpful": ["a", "b"]}, "helpful"])
def test_wrong_criteria_are_named(wrong: Any, write_jsonl: Any) -> None:
    path = write_jsonl("f.jsonl", {"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2], "criteria": wrong})
    with pytest.raises(UserError, match=r'f.jsonl:1: "criteria'):
        read_feedback(path)


def test_pairs_shows_every_two_completions_with_what_belongs_to_them(tmp_path: Path, write_jsonl: Any) -> None:
    row = {"prompt": "p", "completions": ["a", "b", "c"], "ended": [True, False, True], "ranks": [1, 2, 3]}
    row |= {"completion_ids": [[1], [2, 3], [4]], "vocabulary": "v", "criteria": {"helpful": [1, 2, 3]}}
    answer_file = AnswerFile(write_jsonl("f.jsonl", row), tmp_path / "answers.jsonl", pairs=True)
    assert [item.completions for item in answer_file.items] == [["a", "b"], ["a", "c"], ["b", "c"]]
    answer_file.answer("ann", 2, [1, 2])
    (answered,) = read_feedback(tmp_path / "answers.jsonl")
    assert answered.ended == [False, True] and answered.completion_ids == [[2, 3], [4]] and not answered.criteria
    assert sorted(answered.goodness) == [-2, -1]


def test_agreement_of_annotators_so_far(source: str, tmp_path: Path) -> None:
    answer_file = AnswerFile(source, tmp_path / "answers.jsonl")
    ranks = {"a": 1, "b": 2, "c": 3}
    answer_file.answer("ann", 0, numbers(answer_file, "ann", 0, ranks))
    assert answer_file.agreement() is None
    answer_file.answer("ben", 0, numbers(answer_file, "ben", 0, {"a": 1, "b": 3, "c": 2}))
    found = answer_file.agreement()
    assert found is not None and found.pairs == 3 and found.raw == pytest.approx(2 / 3)
    answer_file.undo("ben")
    assert answer_file.agreement() is None


def test_a_line_cut_short_by_a_crash_is_taken_away_and_a_whole_one_is_kept(source: str, tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    answer_file = AnswerFile(source, answers)
    answer_file.skip("ann", 0)
    whole = answers.read_text()
    answers.write_text(whole + '{"prompt": "prompt 1", "comp')
    answer_file.skip("ann", 1)
    answers.write_text(answers.read_text().rstrip("\n"))  # as some editors leave a file
    answer_file.skip("ann", 2)
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [row["prompt"] for row in rows[1:]] == ["prompt 1", "prompt 2"] and answer_file.next("ann") is None


def test_a_line_cut_within_a_character_is_taken_away_at_the_start(source: str, tmp_path: Path) -> None:
    """A full disk cuts anywhere; a file that is no UTF-8 could not be read, so nothing would ever be appended to it."""
    answers = tmp_path / "answers.jsonl"
    AnswerFile(source, answers).skip("ann", 0)
    whole = answers.read_bytes()
    answers.write_bytes(whole + '{"prompt": "日本'.encode()[:-1])
    assert AnswerFile(source, answers).progress("ann") == (1, 3)
    assert answers.read_bytes() == whole


def test_an_answer_that_is_written_in_part_is_an_error_and_leaves_nothing(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = tmp_path / "answers.jsonl"
    answer_file = AnswerFile(source, answers)
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:9]))
    with pytest.raises(OSError, match="No space left"):
        answer_file.skip("ann", 0)
    assert answers.read_bytes() == b""


def _skip_often(source: str, answers: str, name: str) -> None:
    answer_file = AnswerFile(source, answers)
    for _ in range(50):
        answer_file.skip(name, 0)


def test_annotators_in_several_processes_do_not_overwrite_one_another(source: str, tmp_path: Path) -> None:
    answers = str(tmp_path / "answers.jsonl")
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_skip_often, args=(source, answers, name)) for name in ("ann", "ben", "cleo")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    rows = [json.loads(line)["annotator"] for line in Path(answers).read_text().splitlines()]
    assert sorted(rows) == ["ann"] * 50 + ["ben"] * 50 + ["cleo"] * 50


def test_wrong_files_are_refused(source: str, tmp_path: Path, write_jsonl: Any) -> None:
    with pytest.raises(UserError, match="answers cannot be written to"):
        AnswerFile(source, source)
    with pytest.raises(UserError, match="cannot write the answers to .*: Is a directory"):
        AnswerFile(source, tmp_path)
    with pytest.raises(UserError, match=r'bad.jsonl:1: "completions" must be'):
        AnswerFile(write_jsonl("bad.jsonl", {"prompt": "p"}), tmp_path / "answers.jsonl")
