# SPDX-License-Identifier: Apache-2.0
"""A run prints what its user needs and nothing else, and nothing that it prints can steer a terminal."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_fast import cli
from rlhf_fast.report import chat
from rlhf_fast.run.progress import notice
from rlhf_fast.run.terminal import printable, redacted

SEPARATOR = "=== next phase"
PHASES = """
import os, sys
from rlhf_fast import cli
for command in {commands!r}:
    print({separator!r}, file=sys.stderr, flush=True)
    print({separator!r}, flush=True)
    assert cli.main(command) == 0, command
"""


def test_each_phase_prints_what_is_needed_and_nothing_else(job_data: Path, tmp_path: Path) -> None:
    common = f"--model {job_data}/model --dtype float32 --max-length 32".split()
    short = ["--max-new-tokens", "6", "--samples-per-prompt", "2"]
    options = {
        "sft": f"--train-file {job_data}/demos.jsonl --max-steps 1 --gradient-checkpointing".split(),
        "collect": ["--prompts-file", f"{job_data}/few.jsonl", *short],
        "reward": f"--feedback-file {job_data}/feedback.jsonl --epochs 0.1 --gradient-checkpointing".split(),
        "ppo": f"--prompts-file {job_data}/few.jsonl --reward-model {job_data}/reward --max-steps 1".split()
        + [*short, "--lora-rank", "2"],
    }
    commands = [[phase, *common, *more, "--output-dir", phase] for phase, more in options.items()]
    code = PHASES.format(commands=commands, separator=SEPARATOR)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    messages = [line for line in done.stderr.splitlines() if line != SEPARATOR]
    assert [line for line in messages if not line.startswith("rlhf-fast: ")] == []
    for phase, shown in zip(options, done.stdout.split(SEPARATOR)[1:], strict=True):
        lines = [line for line in shown.splitlines() if line.strip()]
        allowed = re.compile(rf"{phase} \d+/\d+ ?.*|[┌│└].*|\s*\S*{phase}\s*")
        assert [line for line in lines if not allowed.fullmatch(line)] == [], phase
        assert lines[-1].startswith("└")


ATTACK = "\x1b]0;owned\x07\x1b[2Jfine\x9b31m\r\u202egnp.exe\ttab\nline"
TAME = r"\x1b]0;owned\x07\x1b[2Jfine\x9b31m\r\u202egnp.exe" + "\ttab\nline"


def test_control_characters_are_shown_not_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert printable(ATTACK) == TAME
    notice(ATTACK)
    cli.show({"text": ATTACK, "[red]name": 1, "list": [ATTACK]}, f"folder[bold]{ATTACK}")
    monkeypatch.setattr(cli, "_command", lambda command, arguments: (_ for _ in ()).throw(cli.UserError(ATTACK)))
    assert cli.main(["sft"]) == 2
    shown = capsys.readouterr()
    for text in (shown.out, shown.err):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text)
        assert r"\x1b]0;owned\x07" in text
    assert "[red]name" in shown.out and "[bold]" in shown.out  # brackets are text, not markup


@pytest.mark.parametrize("error", [RuntimeError, ModuleNotFoundError])
def test_an_unexpected_error_is_shown_without_escapes_and_secrets(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = "hf_" + "S3cretS3cretS3cretS3cret"
    monkeypatch.setattr(cli, "_command", lambda command, arguments: (_ for _ in ()).throw(error(f"{ATTACK} {secret}")))
    assert cli.main(["sft"]) == 1
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last)" in shown and r"\x1b]0;owned\x07" in shown
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", shown) and secret not in shown


def test_chat_shows_no_escape_of_the_model(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chat, "answer", lambda *args: ATTACK)
    lines = iter(["hello", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert cli.main(["chat", str(tiny / "model")]) == 0
    assert TAME in capsys.readouterr().out


def test_data_check_shows_no_escape_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(
        json.dumps({"prompt": "a", "completion": "b"}) + "\n" + json.dumps({ATTACK: 1, "prompt": ATTACK}) + "\n"
    )
    cli.main(["data", "check", str(path)])
    path.write_text(json.dumps({"prompt": "a", "completions": ["b", "c"], "ranks": [1, 2], "annotator": ATTACK}) + "\n")
    cli.main(["data", "check", str(path)])
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", "".join(capsys.readouterr()))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:secret@host/score", "https://***@host/score"),
        ("https://host/score?api_key=abc&x=1", "https://host/score?api_key=***&x=1"),
        ("https://host/?token=abc", "https://host/?token=***"),
        ("hf_abcdefghijklmnopqrstuvwxyz", "***"),
        ("max_new_tokens=64 at a@b.c", "max_new_tokens=64 at a@b.c"),
        ("the token: 'x', eos_token='y'", "the token: 'x', eos_token='y'"),
        ("{'Authorization': 'Bearer abc.def', 'x': 1}", "{'Authorization': 'Bearer ***', 'x': 1}"),
        ("Authorization: Bearer abc", "Authorization: Bearer ***"),
        ('{"token": "abc", "n": 2}', '{"token": "***", "n": 2}'),
        ("sent correct-horse-battery", "sent ***"),
    ],
)
def test_secrets_are_not_shown(text: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "correct-horse-battery")
    monkeypatch.setenv("OTHER_TOKEN", "x")  # too short to be one
    assert printable(text) == shown and redacted({"a": [text, 1], "b": (text,)}) == {"a": [shown, 1], "b": (shown,)}
