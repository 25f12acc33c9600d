# SPDX-License-Identifier: Apache-2.0
"""The label page: its server, whom it serves, and the page in a real browser (skipped where there is none)."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import quote

import pytest

from rlhf_fast import cli
from rlhf_fast.feedback import answer_file as answer_file_module
from rlhf_fast.feedback.answer_file import AnswerFile
from rlhf_fast.feedback.label_server import LabelServer
from rlhf_fast.feedback.schema import read_feedback

EVIL = "<script>document.title = 'pwned'</script><img src=x onerror=\"document.title='pwned'\">"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDE, PHONE = {"width": 1280, "height": 800}, {"width": 360, "height": 640}


@pytest.fixture
def source(write_jsonl: Any) -> str:
    """Three prompts with three completions each; the first holds markup."""
    rows = [{"prompt": f"prompt {i}", "completions": [f"a{i}", f"b{i}", f"c{i}"], "model": "secret"} for i in range(3)]
    rows[0] |= {"prompt": f"look {EVIL}", "completions": [EVIL, "b0", "c0"]}
    return write_jsonl("completions.jsonl", *rows)


class Client:
    """Asks a server, as the page does."""

    def __init__(self, server: LabelServer) -> None:
        self.address, self.token = server.server_address[:2], server.token

    def __call__(self, path: str, body: Any = None, token: str | None = None, **headers: str) -> tuple[int, Any]:
        """(status, what the JSON holds)."""
        connection = http.client.HTTPConnection(*self.address, timeout=30)  # type: ignore[arg-type]
        headers = {"Authorization": f"Bearer {self.token if token is None else token}", **headers}
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request("GET" if body is None else "POST", path, data, headers)
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        return answer.status, json.loads(text) if answer.headers["Content-Type"] == "application/json" else text


@pytest.fixture
def ask(source: str, tmp_path: Path) -> Iterator[Client]:
    server = LabelServer(AnswerFile(source, tmp_path / "answers.jsonl", criteria=("helpful",)), ("127.0.0.1", 0))
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield Client(server)
    server.shutdown()
    server.server_close()
    thread.join()


def test_without_the_token_nothing_is_shown_or_written(ask: Client, tmp_path: Path) -> None:
    for token in ("", "x", ask.token[:-1], ask.token + "x", "\xff"):
        for path, body in (("/api/task?annotator=a", None), ("/api/skip", {"annotator": "a", "place": 0})):
            status, answer = ask(path, body, token=token)
            assert status == 401 and "prompt" not in json.dumps(answer.get("completions", ""))
    assert (tmp_path / "answers.jsonl").read_text() == ""
    for path in ("/", "/style.css", "/app.js"):  # the same for everybody: nothing of the file
        status, text = ask(path, token="")
        assert status == 200 and b"prompt 1" not in text and ask.token.encode() not in text


def test_the_page_forbids_what_it_does_not_need(ask: Client) -> None:
    connection = http.client.HTTPConnection(*ask.address, timeout=30)  # type: ignore[arg-type]
    for path in ("/", "/app.js", "/api/task", "/nothing"):
        connection.request("GET", path)
        answer = connection.getresponse()
        assert answer.read() and "Python" not in answer.headers["Server"]
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'; script-src 'self'" in policy and "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy and answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cache-Control"] == "no-store" and answer.headers["Referrer-Policy"] == "no-referrer"
    connection.close()


def test_no_file_but_the_pages_own_is_served(ask: Client) -> None:
    for path in ("/../label.py", "/label_page/app.js", "/%2e%2e/label.py", "//etc/passwd", "/api", "/answers.jsonl"):
        assert ask(path)[0] == 404
    assert ask("/api/nothing", {})[0] == 404


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("answer", b"{"),
        ("answer", []),
        ("answer", {"annotator": "a", "place": 9, "numbers": [1, 2, 3]}),
        ("answer", {"annotator": "a", "place": -1, "numbers": [1, 2, 3]}),
        ("answer", {"annotator": "a", "place": True, "numbers": [1, 2, 3]}),
        ("answer", {"annotator": "a", "place": 0, "numbers": [1, 2]}),
        ("answer", {"annotator": "a", "place": 0, "numbers": "123"}),
        ("answer", {"annotator": "a", "place": 0, "numbers": [1, 2, 3], "criteria": {"other": [1, 2, 3]}}),
        ("answer", {"annotator": " ", "place": 0, "numbers": [1, 2, 3]}),
        ("answer", {"annotator": "a\x1b[2J", "place": 0, "numbers": [1, 2, 3]}),
        ("skip", {"annotator": "a" * 101, "place": 0}),
        ("undo", {"annotator": 3}),
        ("answer", b"[" * 60_000),
    ],
)
def test_a_wrong_request_is_refused_and_writes_nothing(ask: Client, tmp_path: Path, path: str, body: Any) -> None:
    status, answer = ask(f"/api/{path}", body)
    assert status == 400 and answer["error"]
    assert (tmp_path / "answers.jsonl").read_text() == ""
    assert ask("/api/task?annotator=a")[0] == 200  # and the server goes on


def test_a_large_request_is_refused_unread(ask: Client) -> None:
    assert ask("/api/answer", b"x", **{"Content-Length": str(2**40)})[0] == 413
    assert ask("/api/answer", b"x" * 2**17)[0] == 413


def test_tasks_answers_and_agreement_over_http(ask: Client, tmp_path: Path) -> None:
    assert ask("/api/task")[1] == {
        "annotator": "",
        "total": 3,
        "task": "rank",
        "criteria": ["helpful"],
        "best_rating": 7,
    }
    status, task = ask(f"/api/task?annotator={quote('Ánn B.')}")
    assert status == 200 and task["annotator"] == "Ánn B." and task["place"] == 0 and "secret" not in json.dumps(task)
    assert task["prompt"] == [{"role": "", "text": f"look {EVIL}"}] and sorted(task["completions"]) == sorted(
        [EVIL, "b0", "c0"]
    )
    for name in ("ann", "ben"):
        _, task = ask(f"/api/task?annotator={name}")
        numbers = [1 if text == "b0" else 2 for text in task["completions"]]
        answer = {"annotator": name, "place": 0, "numbers": numbers, "criteria": {"helpful": [4, 4, 4]}}
        status, task = ask("/api/answer", answer)
        assert status == 200 and task["done"] == 1 and task["place"] == 1
    assert task["agreement"] == {"pairs": 3, "raw": 1.0, "alpha": 1.0}
    _, task = ask("/api/undo", {"annotator": "ben"})
    assert task["undone"] and task["place"] == 0 and task["agreement"] is None
    assert not ask("/api/undo", {"annotator": "ben"})[1]["undone"]
    (ranking,) = read_feedback(tmp_path / "answers.jsonl")
    assert ranking.goodness == [-2, -1, -2] and ranking.criteria == {"helpful": [4, 4, 4]}


def test_an_address_that_is_taken_is_named(source: str, ask: Client, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["label", source, "--port", str(ask.address[1])]) == 2
    assert re.search(r"the page on --host 127.0.0.1 --port \d+: .*in use; --port 0 takes", capsys.readouterr().err)


@pytest.mark.parametrize("port", ["70000", "-1", "x"])
def test_a_port_that_cannot_be_is_named(source: str, port: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["label", source, f"--port={port}"])
    assert f"argument --port: wanted a port from 0 (any free one) to 65535, got {port}" in capsys.readouterr().err


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")
def test_the_page_is_served_over_ipv6(source: str, tmp_path: Path) -> None:
    with serving(source, "--host", "::1", "--output", str(tmp_path / "answers.jsonl")) as address:
        found = re.fullmatch(r"http://\[::1\]:(\d+)/#token=(.+)", address)
        assert found is not None
        connection = http.client.HTTPConnection("::1", int(found[1]), timeout=60)
        connection.request("GET", "/api/task?annotator=a", headers={"Authorization": f"Bearer {found[2]}"})
        assert json.loads(connection.getresponse().read())["place"] == 0
        connection.close()


def test_a_request_reads_the_answers_once(ask: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Path] = []
    really_read = answer_file_module.read_rows
    monkeypatch.setattr(answer_file_module, "read_rows", lambda path: reads.append(path) or really_read(path))
    assert ask("/api/skip", {"annotator": "a", "place": 0})[1]["done"] == 1 and len(reads) == 1
    assert ask("/api/task?annotator=b")[1]["done"] == 0 and len(reads) == 1
    other = AnswerFile(tmp_path / "completions.jsonl", tmp_path / "answers.jsonl")  # another process, say
    other.skip("b", 0)
    assert ask("/api/task?annotator=b")[1]["done"] == 1 and len(reads) == 2


@contextmanager
def serving(source: str, *options: str) -> Iterator[str]:
    """The address of `rlhf-fast label` in a process of its own, which is killed at the end."""
    command = [sys.executable, "-m", "rlhf_fast.cli", "label", source, "--port", "0", *options]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        yield next(line for line in server.stdout if line.startswith("open ")).split()[1]
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


def wait_for(done: Callable[[], bool]) -> None:
    """Until it is so; the test fails after a minute."""
    until = time.monotonic() + 60
    while not done():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if BROWSER is None:
        pytest.skip("no Chromium on this machine")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


def begin(browser: Any, address: str, size: dict[str, int], **options: Any) -> Any:
    """The first task, reached by the keyboard alone."""
    page = browser.new_page(viewport=size, **options)
    page.set_default_timeout(60_000)  # milliseconds: other tests may hold both cores
    page.goto(address)
    page.wait_for_selector("#begin")
    page.keyboard.type("ann")  # the field has the focus
    page.keyboard.press("Enter")
    page.wait_for_selector("#prompt")
    return page


def fits(page: Any) -> bool:
    """Whether nothing is wider than the window, and each button is large enough for a finger."""
    width = page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    boxes = [one.bounding_box() for one in page.locator("button:visible").all()]
    return width and all(box["height"] >= 34 and box["width"] >= 30 for box in boxes)


def test_three_prompts_ranked_by_keys_with_a_kill_in_between(source: str, browser: Any) -> None:
    answers = Path(source).with_suffix(".labels.jsonl")
    with serving(source) as address:
        page = browser.new_page()
        page.goto(address)
        page.wait_for_selector("text=Put answers in order")
        assert [one.inner_text() for one in page.locator("button:visible").all()] == ["Begin"]  # none that does nothing
        assert "There are 3 prompts" in page.content()
        page = begin(browser, address, WIDE)
        shown = page.locator(".completion").all_inner_texts()
        assert sorted(shown) == sorted([EVIL, "b0", "c0"])  # as text
        assert page.title() == "rlhf-fast label" and "secret" not in page.content()
        assert page.locator("#undo").count() == 0  # nothing to undo yet
        page.keyboard.press("Enter")
        page.wait_for_selector("text=Give each completion a number first")
        page.keyboard.press("9")
        page.wait_for_selector("text=1 to 3, please")
        for key in ("1", "2", "1", "Enter"):
            page.keyboard.press(key)
        page.wait_for_selector("text=ann: 1 of 3 done")
        page.keyboard.press("s")
        page.wait_for_selector("text=ann: 2 of 3 done")
        page.keyboard.press("u")
        page.wait_for_selector("text=Undone.")
        for key in ("3", "ArrowUp", "Backspace", "1", "2", "2", "ArrowDown", "Enter"):
            page.keyboard.press(key)
        wait_for(lambda: answers.read_text().count('"ranks"') == 2)
    page.keyboard.press("s")
    page.wait_for_selector("text=The server does not answer. Nothing that was saved is lost")
    with serving(source) as address:
        page = begin(browser, address, WIDE)
        page.wait_for_selector("text=ann: 2 of 3 done")
        page.keyboard.press("?")
        page.wait_for_selector("#key-list")
        for key in ("2", "2", "1", "Enter"):
            page.keyboard.press(key)
        page.wait_for_selector("text=Done: all 3 prompts. Thank you.")
        assert {one.inner_text().partition(" ")[0] for one in page.locator("button:visible").all()} == {"Undo", "Keys"}
    by_prompt = {str(ranking.prompt): ranking for ranking in read_feedback(answers)}
    first = by_prompt[f"look {EVIL}"]
    assert {text: -rank for text, rank in zip(first.completions, first.goodness, strict=True)}[shown[1]] == 2
    assert sorted(first.goodness) == [-2, -1, -1] and sorted(by_prompt["prompt 1"].goodness) == [-2, -2, -1]
    assert sorted(by_prompt["prompt 2"].goodness) == [-2, -2, -1]


@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
def test_two_completions_side_by_side_or_below_each_other(browser: Any, size: Any, write_jsonl: Any) -> None:
    long = "word " * 300 + "x" * 500
    rows = [{"prompt": f"{i} {long}", "completions": [f"left {long}", f"right {long}"]} for i in range(3)]
    rows[0]["prompt"] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    source = write_jsonl("pairs.jsonl", *rows)
    with serving(source) as address:
        page = begin(browser, address, size)
        assert page.locator(".turn").all_inner_texts() == ["system: Be brief.", "user: Hi"]
        first, second = (card.bounding_box() for card in page.locator(".card").all())
        assert (first["y"] == second["y"] and first["x"] < second["x"]) == (size is WIDE)
        assert (first["x"] == second["x"] and first["y"] < second["y"]) == (size is PHONE)
        assert fits(page) and all(one.is_visible() for one in page.locator("[data-side]").all())
        better = page.locator(".completion").first.inner_text()[:5].strip()
        page.keyboard.press("ArrowLeft")  # one key an answer
        page.wait_for_selector("text=ann: 1 of 3 done")
        page.keyboard.press("t")
        page.wait_for_selector("text=ann: 2 of 3 done")
        page.click("[data-side='1']")
        page.wait_for_selector("text=Done: all 3")
    answered = read_feedback(Path(source).with_suffix(".labels.jsonl"))
    best = answered[0].completions[answered[0].goodness.index(-1)]
    assert str(best).startswith(better) and [sorted(r.goodness) for r in answered] == [[-2, -1], [-1, -1], [-2, -1]]


def test_criteria_on_a_phone_in_the_dark(browser: Any, write_jsonl: Any) -> None:
    source = write_jsonl("pairs.jsonl", *({"prompt": f"p{i}", "completions": [f"a{i}", f"b{i}"]} for i in range(2)))
    with serving(source, "--criteria", "helpful", "honest") as address:
        page = begin(browser, address, PHONE, color_scheme="dark")
        light = begin(browser, address, PHONE, color_scheme="light")
        colors = [p.evaluate("getComputedStyle(document.body).backgroundColor") for p in (page, light)]
        assert colors[0] != colors[1] and fits(page)
        page.keyboard.press("ArrowRight")
        page.keyboard.press("5")
        page.keyboard.press("Enter")
        page.wait_for_selector('text=Rate all answers by "helpful", or none of them.')
        for key in ("ArrowDown", "3", "Enter"):  # past "honest" of A, to "helpful" of B
            page.keyboard.press(key)
        page.wait_for_selector("text=ann: 1 of 2 done")
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("Enter")
        page.wait_for_selector("text=Done: all 2")
    rows = [json.loads(line) for line in Path(source).with_suffix(".labels.jsonl").read_text().splitlines()]
    assert sorted(rows[0]["criteria"]["helpful"]) == [3, 5] and "criteria" not in rows[1]
    better = rows[0]["ranks"].index(1)
    assert rows[0]["criteria"]["helpful"][better] == 3 and list(rows[0]["criteria"]) == ["helpful"]


def test_a_page_without_the_token_says_what_to_do(source: str, browser: Any) -> None:
    with serving(source) as address:
        page = browser.new_page()
        page.goto(address.partition("#")[0])
        page.wait_for_selector("text=open the address that rlhf-fast label printed")
        assert not page.locator("button:visible").count()
