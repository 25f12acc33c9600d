# SPDX-License-Identifier: Apache-2.0
"""The pages of the documentation, the blocks of code in them, and the commands in those."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("examples/*/README.md"),
        ROOT / "csrc" / "README.md",
    ]
)
TARGETS = set(re.findall(r"^([a-z][a-z0-9-]*)[ a-z-]*:", (ROOT / "Makefile").read_text(), re.MULTILINE))


class Block(NamedTuple):
    """A fenced block: its page, the line that it begins in, its language, its text."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^( *)```(\w*)\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
    return [Block(page, text[: block.start()].count("\n") + 1, block[2], block[3]) for block in found]


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each command of a shell block, without comments and what is set in its environment."""
    text = block.text.replace("\\\n", " ")
    for line in text.splitlines():
        for part in re.split(r"&&|(?<!\|)\|(?!\|)", line):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            if words:
                yield words


class _Parsed(BaseException):
    """The arguments were understood."""


def understand(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails unless the command is one that a reader can type: its program, targets, files, extras and options exist."""
    program, arguments = words[0].removeprefix(".venv/bin/"), words[1:]
    if program == "make":
        named = [word for word in arguments if "=" not in word]
        assert named and set(named) <= TARGETS, f"no such target: {named}"
    elif program in ("torchrun", "accelerate"):
        _rlhf_fast(arguments[arguments.index("rlhf_fast") + 1 :], monkeypatch)
    elif program == "rlhf-fast":
        _rlhf_fast(arguments, monkeypatch)
    elif program == "pip":
        _pip(arguments)
    elif program in ("python", "pytest"):
        files = [word for word in arguments if re.fullmatch(r"(?:[\w.-]+/)+[\w.-]*|benchmarks", word)]
        assert all((ROOT / name).exists() for name in files), f"no such file: {files}"
    else:
        assert program in ("export", "echo", "source", "pre-commit", "git"), f"{program} is not known"


def _pip(arguments: list[str]) -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in arguments:
        for group in re.findall(r"(?:rlhf-fast|^\.)\[(.*)\]", word):
            assert set(group.split(",")) <= extras.keys(), f"no such extra: {group}"


def _only(parse: Any) -> Any:
    """`parse`, after which nothing else is done."""

    def only_parse(*given: Any, **named: Any) -> None:
        parse(*given, **named)
        raise _Parsed

    return only_parse


def _rlhf_fast(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse the arguments as the command does, without starting it."""
    import tyro

    from rlhf_fast import cli, trainer

    command, rest = arguments[0], [word for word in arguments[1:] if word != "..."]
    if command in ("info", "--help"):
        return
    if command in cli.TOOLS:
        with monkeypatch.context() as patched, pytest.raises(_Parsed):
            for home, name in ((argparse.ArgumentParser, "parse_args"), (tyro, "cli")):
                patched.setattr(home, name, _only(getattr(home, name)))
            cli.main([command, *rest])
        return
    classes = {
        "sft": trainer.SFTConfig,
        "collect": trainer.CollectConfig,
        "reward": trainer.RewardConfig,
        "ppo": trainer.PPOConfig,
        "run": trainer.PipelineConfig,
    }
    if "--config" in rest:  # a file of the reader's own, or one of the repository
        at = rest.index("--config") + 1
        if rest[at].startswith("examples/"):
            rest[at] = str(ROOT / rest[at])
        else:
            del rest[at - 1 : at + 1]
    cli.parse(classes[command], rest, f"rlhf-fast {command}")
