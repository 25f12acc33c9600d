# SPDX-License-Identifier: Apache-2.0
"""`rf.hf` on models that DDP or FSDP2 wraps, over two processes (gloo), gives what one process gives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

WORKER = Path(__file__).parent / "helpers" / "ranks_hf.py"


@pytest.mark.parametrize("case", ["ddp", "fsdp", "fsdp_root"])
def test_two_ranks(case: str, tmp_path: Path) -> None:
    script = [sys.executable, str(WORKER)]
    args = [str(tmp_path / "store"), case]
    ranks = [
        subprocess.Popen([*script, str(r), *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for r in range(2)
    ]
    results = [rank.communicate(timeout=300) for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(errors for _, errors in results)
    assert [out.strip() for out, _ in results] == ["done", "done"]
