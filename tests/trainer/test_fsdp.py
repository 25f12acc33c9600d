# SPDX-License-Identifier: Apache-2.0
"""Models cut over two processes (torchrun, gloo): what they compute is what whole ones do. Phases: test_ranks.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import phases
from helpers.four import METRICS, WEIGHTS, difference
from safetensors.torch import load_file

from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.errors import UserError
from rlhf_fast.run.checkpoint import load_state, newest_intact_checkpoint
from rlhf_fast.trainer import PPOConfig, RewardConfig

CASES = ("tied", "untied", "biased", "experts", "gpt2", "critic", "reads", "refused", "engine", "checkpoints")
CASES += ("failed_write", "killed_write")
FOUR = ("mesh", "offloaded", "resumes", "buckets", "sft_groups")  # by four processes
SCRIPT = Path(__file__).parents[1] / "helpers" / "ranks_fsdp.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fsdp")


def launch(folder: Path, processes: int, *cases: str, data: Path | str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [*command, str(SCRIPT), *cases],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "RANKS_FOLDER": str(folder), "RANKS_DATA": str(data)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def result(folder: Path) -> subprocess.CompletedProcess[str]:
    return launch(folder, 2, *CASES)


@pytest.fixture(scope="module")
def of_four(folder: Path, job_data: Path) -> subprocess.CompletedProcess[str]:
    return launch(folder, 4, *FOUR, data=job_data)


@pytest.mark.parametrize("case", CASES)
def test_two_processes(result: subprocess.CompletedProcess[str], case: str) -> None:
    survivors = 1 if case == "killed_write" else 2
    assert result.stdout.count(f" {case} done ") == survivors, result.stderr


@pytest.mark.parametrize("case", FOUR)
def test_four_processes(of_four: subprocess.CompletedProcess[str], case: str) -> None:
    assert of_four.stdout.count(f" {case} done ") == 4, of_four.stderr


@pytest.mark.parametrize("kind", ["adamw", "adamw-offload", "adamw-8bit"])
def test_one_process_reads_what_two_groups_have_written(
    of_four: subprocess.CompletedProcess[str], folder: Path, kind: str
) -> None:
    if kind == "adamw-8bit":
        pytest.importorskip("bitsandbytes")
    wanted = load_file(folder / f"{kind}.safetensors")
    found = load_state(folder / kind / "checkpoints" / "step-2")["optimizer"]["weights"]
    assert wanted.keys() == found.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_sft_in_two_groups_is_that_of_one_process(
    of_four: subprocess.CompletedProcess[str], folder: Path, job_data: Path
) -> None:
    phases.run(phases.jobs(job_data)["sft"], folder / "sft")
    weights, metrics = difference(job_data, folder / "sft", folder / "sft_groups")
    assert weights <= WEIGHTS and metrics <= METRICS


def test_one_process_reads_what_two_have_written(result: subprocess.CompletedProcess[str], folder: Path) -> None:
    wanted = load_file(folder / "expected.safetensors")
    found = load_state(folder / "written" / "checkpoints" / "step-2")["optimizer"]["weights"]
    assert wanted.keys() == found.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_damaged_shard_is_named_and_the_checkpoint_before_is_taken(
    result: subprocess.CompletedProcess[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "written", tmp_path / "run")
    shard = sorted((tmp_path / "run" / "checkpoints" / "step-2" / "shards").iterdir())[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    found = newest_intact_checkpoint(tmp_path / "run")
    assert found is not None and found.name == "step-1"
    assert f"its file shards/{shard.name} is missing or not as it was written" in capsys.readouterr().err


def test_a_shard_that_cannot_be_read_is_refused(
    result: subprocess.CompletedProcess[str], folder: Path, tmp_path: Path
) -> None:
    """Also by who does not look at checksums."""
    for name, content in (("cut", b"xx"), ("gone", None)):
        shutil.copytree(folder / "written" / "checkpoints" / "step-2", tmp_path / name)
        shard = sorted((tmp_path / name / "shards").iterdir())[1]
        shard.unlink() if content is None else shard.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read .*remove it to resume from an older one"):
            load_state(tmp_path / name)


def test_one_process_is_refused() -> None:
    with pytest.raises(UserError, match="fsdp shards models over several processes and this is one"):
        RewardConfig(feedback_file="x", fsdp=True).validate()


@pytest.mark.parametrize(("fsdp", "size"), [(False, 2), (True, 1), (True, 3)])
def test_groups_that_do_not_divide_the_processes_are_refused(
    monkeypatch: pytest.MonkeyPatch, fsdp: bool, size: int
) -> None:
    monkeypatch.setattr(ranks(), "count", 4)
    with pytest.raises(UserError, match=f"fsdp_size needs fsdp and is 2 or more of the 4 processes, .* got {size}"):
        RewardConfig(feedback_file="x", fsdp=fsdp, fsdp_size=size).validate()
    RewardConfig(feedback_file="x", fsdp=True, fsdp_size=2).validate()


def test_weights_of_4_bits_are_refused() -> None:
    """FSDP2 gathers them without their scales: https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1945."""
    with pytest.raises(UserError, match="nf4 exclude each other: FSDP2 loses the scales .* has a copy .* bfloat16"):
        PPOConfig(prompts_file="x", reward_model="x", fsdp=True, lora_rank=4, dtype="nf4").validate()
