# SPDX-License-Identifier: Apache-2.0
"""Two processes (torchrun, gloo) against one with twice the accumulation: every phase gives the same to rounding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import phases
import pytest
from safetensors.torch import load_file

JOBS = ("sft", "lora", "sft-packed", "collect", "reward", "ppo", "grpo", "dynamic", "dpo", "ranked", "scarce")
JOBS += ("sft-4bit", "grpo-4bit") if find_spec("bitsandbytes") else ()
LEARN = tuple(name for name in JOBS if name != "collect")


class Folders(NamedTuple):
    data: Path
    one: Path
    two: Path
    result: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def done(job_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """All jobs, once by one process and once by two, which then try a reward function that fails on one of them."""
    folder = tmp_path_factory.mktemp("ranks")
    rules = folder / "rules.py"
    rules.write_text(
        "import os\n\ndef rate(prompt, completions):\n"
        "    if os.environ['RANK'] == '1':\n        raise ValueError('no idea')\n    return [0.0] * len(completions)\n"
    )
    failing = [
        "ppo", "--model", str(job_data / "model"), "--objective", "rloo", "--max-length", "32", "--max-new-tokens", "4",
        "--prompts-file", str(job_data / "few.jsonl"), "--reward-functions", f"{rules}:rate",
        "--output-dir", str(folder / "failed"),
    ]  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", phases.__file__]
    settings = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, str(job_data), str(folder / "two"), "--", *failing],
        capture_output=True, text=True, timeout=300, env=settings,
    )  # fmt: skip
    for name, config in phases.jobs(job_data).items():
        assert (folder / "two" / name / "summary.json").exists(), f"{name}\n{result.stderr}"
        phases.run(config, folder / "one" / name)
    return Folders(job_data, folder / "one", folder / "two", result)


@pytest.mark.parametrize("name", LEARN)
def test_weights_are_those_of_one_process(done: Folders, name: str) -> None:
    one, two = (load_file(folder / name / "model" / "model.safetensors") for folder in (done.one, done.two))
    start = load_file(done.data / ("reward" if name == "reward" else "model") / "model.safetensors")
    assert one.keys() == two.keys()
    largest = 0.0
    for key in one:
        moved = float((one[key] - start[key]).abs().max())
        assert float((one[key] - two[key]).abs().max()) <= 3e-3 * moved, key
        largest = max(largest, moved)
    assert largest > 1e-3


@pytest.mark.parametrize("name", LEARN)
def test_metrics_are_over_all_ranks(done: Folders, name: str) -> None:
    one, two = (phases.metrics(folder / name) for folder in (done.one, done.two))
    assert len(one) == len(two) >= 3
    for row, other in zip(one, two, strict=True):
        assert other == pytest.approx(row, rel=2e-4, abs=2e-5)


@pytest.mark.parametrize("name", ["ppo", "grpo", "dpo", "scarce"])
def test_the_same_samples_are_drawn(done: Folders, name: str) -> None:
    """A sample's luck is that of its number among all, whichever rank draws it."""
    files = [done.one / name / "rollouts-0.jsonl", *(done.two / name / f"rollouts-{rank}.jsonl" for rank in (0, 1))]
    one, *two = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    assert len(one) == 3
    for whole, first, second in zip(one, *two, strict=True):
        assert whole["ids"] == first["ids"] + second["ids"] and whole["ended"] == first["ended"] + second["ended"]
        assert whole["tokens"] == first["tokens"] + second["tokens"]


def test_dynamic_sampling_takes_the_rounds_of_one_process(done: Folders) -> None:
    """Each draws until all together have enough: nobody waits for a peer, and the batch is the same."""
    rows = phases.metrics(done.two / "dynamic")
    rounds = sum(1 + row["sample/extra_rounds"] for row in rows)
    assert rounds > 3 and sum(row["sample/dropped"] for row in rows) > 0
    for rank in (0, 1):
        assert (done.two / "dynamic" / f"rollouts-{rank}.jsonl").read_text().count("\n") == rounds


@pytest.mark.parametrize("name", ["ppo", "dpo"])
def test_evaluations_are_the_same(done: Folders, name: str) -> None:
    one, two = (
        [json.loads(line) for line in (folder / name / "samples.jsonl").read_text().splitlines()]
        for folder in (done.one, done.two)
    )
    assert [row["completion"] for row in one] == [row["completion"] for row in two]
    for when in ("before", "after"):
        figures = [json.loads((f / name / f"eval_{when}.json").read_text()) for f in (done.one, done.two)]
        assert figures[1] == pytest.approx(figures[0], rel=1e-3, abs=1e-4)


def test_feedback_is_the_same_byte_for_byte(done: Folders) -> None:
    one, two = ((folder / "collect" / "feedback.jsonl").read_bytes() for folder in (done.one, done.two))
    assert one == two and one.count(b"\n") == 24


def test_an_error_on_one_rank_ends_the_run_with_one_message(done: Folders) -> None:
    assert done.result.returncode != 0
    assert done.result.stderr.count("raised ValueError: no idea; saved after 0 steps, --resume goes on") == 1
    assert (done.two.parent / "failed" / "checkpoints" / "step-0").is_dir()
