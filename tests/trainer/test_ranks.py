# SPDX-License-Identifier: Apache-2.0
"""Two processes (torchrun, gloo) against one with twice the accumulation: every phase gives the same to rounding."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import phases
from safetensors.torch import load_file

JOBS = (
    "sft",
    "lora",
    "sft-packed",
    "collect",
    "reward",
    "reward-lora",
    "ppo",
    "grpo",
    "ppo-lora",
    "dynamic",
    "dpo",
    "ranked",
    "scarce",
)
JOBS += ("sft-4bit", "reinforce-4bit") if find_spec("bitsandbytes") else ()
LEARN = (*(name for name in JOBS if name != "collect"), *(f"{name}-fsdp" for name in phases.CUT))
RESUMED = ("sft-fsdp", "lora-fsdp", "reward-fsdp", "ppo-fsdp", "ppo-lora-fsdp")


class Folders(NamedTuple):
    data: Path
    one: Path
    two: Path
    result: subprocess.CompletedProcess[str]

    def of(self, name: str) -> tuple[Path, Path]:
        """A job's folders; one process has copies of models where two have cut them."""
        return self.one / name.removesuffix("-fsdp"), self.two / name


def run_two(data: Path, folder: Path, *rest: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", phases.__file__]
    return subprocess.run(
        [*command, str(data), str(folder), *rest],
        capture_output=True, text=True, timeout=400, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


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
    result = run_two(job_data, folder / "two", "--", *failing)
    for name in (*JOBS, *phases.cut_jobs(job_data)):
        assert (folder / "two" / name / "summary.json").exists(), f"{name}\n{result.stderr}"
    for name, config in phases.jobs(job_data).items():
        phases.run(config, folder / "one" / name)
    return Folders(job_data, folder / "one", folder / "two", result)


@pytest.mark.parametrize("name", LEARN)
def test_weights_are_those_of_one_process(done: Folders, name: str) -> None:
    assert_same_weights(done.data, name, *done.of(name))


def assert_same_weights(data: Path, name: str, first: Path, second: Path) -> None:
    """To rounding, and that learning moved them much more."""
    one, two = (load_file(folder / "model" / "model.safetensors") for folder in (first, second))
    start = load_file(data / ("reward" if name.startswith("reward") else "model") / "model.safetensors")
    assert one.keys() == two.keys()
    largest = 0.0
    for key in one:
        moved = float((one[key] - start[key]).abs().max())
        assert float((one[key] - two[key]).abs().max()) <= 3e-3 * moved, key
        largest = max(largest, moved)
    assert largest > 1e-3


@pytest.mark.parametrize("name", LEARN)
def test_metrics_are_over_all_ranks(done: Folders, name: str) -> None:
    one, two = (phases.metrics(folder) for folder in done.of(name))
    assert len(one) == len(two) >= 3
    for row, other in zip(one, two, strict=True):
        assert other == pytest.approx(row, rel=2e-4, abs=2e-5)


@pytest.mark.parametrize("name", ["ppo", "grpo", "dpo", "scarce", "ppo-fsdp", "grpo-fsdp", "scarce-fsdp"])
def test_the_same_samples_are_drawn(done: Folders, name: str) -> None:
    """A sample's luck is that of its number among all, whichever rank draws it."""
    first, other = done.of(name)
    files = [first / "rollouts-0.jsonl", *(other / f"rollouts-{rank}.jsonl" for rank in (0, 1))]
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


@pytest.mark.parametrize("name", ["ppo", "dpo", "ppo-fsdp", "ranked-fsdp"])
def test_evaluations_are_the_same(done: Folders, name: str) -> None:
    one, two = (
        [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()] for folder in done.of(name)
    )
    assert [row["completion"] for row in one] == [row["completion"] for row in two]
    for when in ("before", "after"):
        figures = [json.loads((folder / f"eval_{when}.json").read_text()) for folder in done.of(name)]
        assert figures[1] == pytest.approx(figures[0], rel=1e-3, abs=1e-4)


def test_feedback_is_the_same_byte_for_byte(done: Folders) -> None:
    one, two = ((folder / "collect" / "feedback.jsonl").read_bytes() for folder in (done.one, done.two))
    assert one == two and one.count(b"\n") == 24


def test_an_error_on_one_rank_ends_the_run_with_one_message(done: Folders) -> None:
    assert done.result.returncode != 0
    assert done.result.stderr.count("raised ValueError: no idea; saved after 0 steps, --resume goes on") == 1
    assert (done.two.parent / "failed" / "checkpoints" / "step-0").is_dir()


def without_its_end(run: Path, copy: Path) -> Path:
    """A copy of a run as it was before its last step."""
    shutil.copytree(run, copy)
    for path in (*copy.glob("model"), *copy.glob("eval_after.json"), copy / "summary.json", _newest(copy)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return copy


def _newest(folder: Path) -> Path:
    return max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name.removeprefix("step-")))


def test_cut_models_resume_bit_for_bit(done: Folders, tmp_path: Path) -> None:
    for name in RESUMED:
        without_its_end(done.two / name, tmp_path / name)
    without_its_end(done.one / "grpo", tmp_path / "grpo-fsdp")  # which had nothing cut
    result = run_two(done.data, tmp_path, *RESUMED, "grpo-fsdp")
    for name in RESUMED:
        files = [folder / name / "model" / "model.safetensors" for folder in (done.two, tmp_path)]
        assert files[1].exists(), f"{name}\n{result.stderr}"
        assert files[0].read_bytes() == files[1].read_bytes(), name
        assert phases.metrics(done.two / name) == phases.metrics(tmp_path / name)
    assert_same_weights(done.data, "grpo", done.one / "grpo", tmp_path / "grpo-fsdp")


@pytest.mark.parametrize("name", ["sft", "reward", "ppo"])
def test_one_process_goes_on_with_what_two_had_cut(done: Folders, name: str, tmp_path: Path) -> None:
    copy = without_its_end(done.two / f"{name}-fsdp", tmp_path / name)
    phases.run(phases.jobs(done.data)[name], copy, resume=True)
    assert_same_weights(done.data, name, done.one / name, copy)
