# SPDX-License-Identifier: Apache-2.0
"""Labelling: what is kept of answers whatever happens, and the page in a real browser (skipped where there is none)."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rlhf_fast.errors import UserError
from rlhf_fast.feedback.answer_file import AnswerFile
from rlhf_fast.feedback.schema import read_feedback

EVIL = "<script>document.title = 'pwned'</script><img src=x onerror=\"document.title='pwned'\">"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def source(write_jsonl: Any) -> str:
    """Three prompts with three completions each; the first holds markup."""
    rows = [{"prompt": f"prompt {i}", "completions": [f"a{i}", f"b{i}", f"c{i}"], "model": "secret"} for i in range(3)]
    rows[0] |= {"prompt": f"look {EVIL}", "completions": [EVIL, "b0", "c0"]}
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
    with pytest.raises(ValueError, match="between 1 and 7"):
        answer_file.answer("ann", 2, [8, 1, 1])


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


@contextmanager
def serving(source: str, port: int) -> Iterator[None]:
    """`rlhf-fast label` in a process of its own, which is killed at the end without a chance to tidy up."""
    command = [sys.executable, "-m", "rlhf_fast.cli", "label", source, "--port", str(port)]
    server = subprocess.Popen(command)
    try:
        until = time.monotonic() + 120
        while time.monotonic() < until and server.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield
    finally:
        server.kill()
        server.wait()


def wait_for(done: Callable[[], bool]) -> None:
    """Until it is so; the test fails after a minute."""
    until = time.monotonic() + 60
    while not done():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_three_prompts_ranked_in_a_browser_with_a_kill_in_between(source: str) -> None:
    pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    answers = Path(source).with_suffix(".labels.jsonl")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def page_of(browser: Any) -> Any:
        page = browser.new_page()
        page.set_default_timeout(120_000)  # milliseconds: other tests may hold both cores
        page.goto(f"http://127.0.0.1:{port}", timeout=120_000)
        page.locator("#name textarea, #name input").fill("ann")
        page.locator("#name textarea, #name input").press("Enter")
        page.wait_for_selector("#prompt textarea:visible")
        page.locator("body").click(position={"x": 2, "y": 2})  # out of the name's field, where keys are text
        return page

    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        with serving(source, port):
            page = page_of(browser)
            shown = [area.input_value() for area in page.locator(".text textarea:visible").all()]
            assert sorted(shown) == sorted([EVIL, "b0", "c0"])  # as text
            assert page.title() == "rlhf-fast label" and "secret" not in page.content()
            page.keyboard.press("Enter")
            page.wait_for_selector("text=Give each completion a number first")
            for key in ("1", "2", "1", "Enter"):
                page.keyboard.press(key)
            page.wait_for_selector("text=1 of 3 done")
            page.keyboard.press("s")
            page.wait_for_selector("text=2 of 3 done")
            page.keyboard.press("u")
            page.wait_for_selector("text=Undone. 1 of 3 done")
            for key in ("3", "2", "1", "Enter"):
                page.keyboard.press(key)
            wait_for(lambda: answers.read_text().count('"ranks"') == 2)
        with serving(source, port):
            page = page_of(browser)
            page.wait_for_selector("text=2 of 3 done")
            for key in ("2", "2", "1", "Enter"):
                page.keyboard.press(key)
            page.wait_for_selector("text=Done: all 3 prompts")
        browser.close()
    by_prompt = {str(ranking.prompt): ranking for ranking in read_feedback(answers)}
    first = by_prompt[f"look {EVIL}"]
    assert {text: -rank for text, rank in zip(first.completions, first.goodness, strict=True)}[shown[1]] == 2
    assert sorted(first.goodness) == [-2, -1, -1] and sorted(by_prompt["prompt 1"].goodness) == [-3, -2, -1]
    assert sorted(by_prompt["prompt 2"].goodness) == [-2, -2, -1]
