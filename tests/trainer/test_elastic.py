# SPDX-License-Identifier: Apache-2.0
"""`torchrun --max-restarts`: the launcher starts killed processes again, and the run goes on by itself."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import phases

from rlhf_fast.errors import UserError
from rlhf_fast.run.folder import RunFolder, is_restart

KILLER = """
import os, signal, sys
import rlhf_fast.run.folder as folder
from rlhf_fast import cli

save, restarts = folder.RunFolder.save_checkpoint, int(os.environ["TORCHELASTIC_RESTART_COUNT"])

def save_and_die(run, step, *rest, **more):
    save(run, step, *rest, **more)
    if restarts < 3 and step > restarts and os.environ["RANK"] == str(restarts % 2):
        os.kill(os.getpid(), signal.SIGKILL)

if sys.argv.pop(1) == "killed":
    folder.RunFolder.save_checkpoint = save_and_die
sys.exit(cli.main(sys.argv[1:]))
"""


def run(data: Path, output: Path, kind: str) -> subprocess.CompletedProcess[str]:
    script = output.with_suffix(".py")
    script.write_text(KILLER)
    options = [
        "ppo", "--model", str(data / "model"), "--objective", "grpo", "--dtype", "float32", "--max-length", "32",
        "--max-new-tokens", "4", "--prompts-file", str(data / "few.jsonl"), "--lr", "1e-3", "--save-steps", "1",
        "--reward-functions", f"{phases.__file__}:often_short", "--max-steps", "4", "--prompts-per-step", "4",
        "--samples-per-prompt", "4", "--output-dir", str(output),
    ]  # fmt: skip
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3"]
    return subprocess.run(
        [sys.executable, *launch, str(script), kind, *options],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_three_killed_processes_change_nothing(job_data: Path, tmp_path: Path) -> None:
    whole, killed = (run(job_data, tmp_path / kind, kind) for kind in ("whole", "killed"))
    assert whole.returncode == killed.returncode == 0, killed.stderr
    assert len(re.findall("going on from", killed.stderr)) == 3, killed.stderr
    one, other = (tmp_path / kind for kind in ("whole", "killed"))
    assert (one / "model" / "model.safetensors").read_bytes() == (other / "model" / "model.safetensors").read_bytes()
    assert phases.metrics(one) == phases.metrics(other)
    assert json.loads((other / "summary.json").read_text())["steps"] == 4


def test_only_a_folder_of_this_launch_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun restarts after any error, so one that refused a folder must refuse it again."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    RunFolder.create(tmp_path / "own").close()
    assert is_restart(tmp_path / "own")
    assert not is_restart(tmp_path) and not is_restart(tmp_path / "none")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "two")
    assert not is_restart(tmp_path / "own")
    (tmp_path / "own" / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="exists and is not empty"):
        RunFolder.create(tmp_path / "own")
    assert not is_restart(tmp_path / "own")  # it was refused
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert not is_restart(tmp_path / "own")
