# SPDX-License-Identifier: Apache-2.0
"""Models cut over two processes (torchrun, gloo): what they compute is what whole ones do. Phases: test_ranks.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_fast.errors import UserError
from rlhf_fast.trainer import PPOConfig, RewardConfig

CASES = ("tied", "untied", "biased", "experts", "gpt2", "critic", "reads", "refused", "engine")
SCRIPT = Path(__file__).parents[1] / "helpers" / "ranks_fsdp.py"


@pytest.fixture(scope="module")
def result() -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    return subprocess.run(
        [*command, *CASES],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_two_processes(result: subprocess.CompletedProcess[str], case: str) -> None:
    assert result.stdout.count(f" {case} done ") == 2, result.stderr


def test_one_process_is_refused() -> None:
    with pytest.raises(UserError, match="fsdp shards models over several processes and this is one"):
        RewardConfig(feedback_file="x", fsdp=True).validate()


def test_weights_of_4_bits_are_refused() -> None:
    with pytest.raises(UserError, match="fsdp and dtype nf4 exclude each other"):
        PPOConfig(prompts_file="x", reward_model="x", fsdp=True, lora_rank=4, dtype="nf4").validate()
