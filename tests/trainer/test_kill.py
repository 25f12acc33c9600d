# SPDX-License-Identifier: Apache-2.0
"""Runs ended by SIGKILL at a random moment, within a checkpoint and within a line, end as if nothing had happened."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import phases

LEARN = ("sft", "lora", "reward", "ppo", "dpo")
SEED = 7
TESTS = Path(__file__).parents[1]


class Folders(NamedTuple):
    whole: Path
    cut: Path
    ends: dict[str, list[str]]


@pytest.fixture(scope="module")
def done(job_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Each job in one go, and in five or six, in one process that forks."""
    folder = tmp_path_factory.mktemp("kill")
    command = [sys.executable, "-m", "helpers.killer", str(job_data), str(folder), str(SEED), *LEARN, "collect"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=TESTS)
    assert result.returncode == 0, result.stderr
    return Folders(folder / "whole", folder / "cut", json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.parametrize("name", [*LEARN, "collect"])
def test_every_run_was_killed(done: Folders, name: str) -> None:
    whole, *cuts, last = done.ends[name]
    assert whole == last == "finished" and set(cuts) == {"killed"}


@pytest.mark.parametrize("name", LEARN)
def test_the_model_is_the_same_bit_for_bit(done: Folders, name: str) -> None:
    whole, cut = (folder / name / "model" / "model.safetensors" for folder in (done.whole, done.cut))
    assert whole.read_bytes() == cut.read_bytes()


@pytest.mark.parametrize("name", LEARN)
def test_what_is_written_on_the_way_is_the_same(done: Folders, name: str) -> None:
    whole, cut = (folder / name for folder in (done.whole, done.cut))
    assert phases.metrics(whole) == phases.metrics(cut)
    for file in ("samples.jsonl", "eval_before.json", "eval_after.json"):
        assert (whole / file).exists() == (cut / file).exists()
        assert not (whole / file).exists() or (whole / file).read_bytes() == (cut / file).read_bytes()


def test_feedback_is_the_same_byte_for_byte(done: Folders) -> None:
    whole, cut = (folder / "collect" / "feedback.jsonl" for folder in (done.whole, done.cut))
    assert whole.read_bytes() == cut.read_bytes()


@pytest.mark.parametrize("name", LEARN)
def test_checkpoints_hold_no_pickle(done: Folders, name: str) -> None:
    for folder in (done.whole, done.cut):
        files = [path for path in (folder / name / "checkpoints").rglob("*") if path.is_file()]
        assert {path.suffix for path in files} == {".json", ".safetensors"}
        assert {path.name for path in (folder / name / "checkpoints").iterdir() if path.name.startswith("step-")}
