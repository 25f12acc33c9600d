# SPDX-License-Identifier: Apache-2.0
"""Rows cut over two and over four processes (gloo) by their tokens: each gets its part of what whole rows give."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

WORKER = Path(__file__).parent / "helpers" / "ranks_gae.py"


def test_parts_of_rows_are_those_of_whole_rows(tmp_path: Path) -> None:
    script = [sys.executable, str(WORKER), str(tmp_path / "store")]
    result = subprocess.run(script, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    for case in ("rows_of", "infinite", "per_token", "refused"):
        assert result.stdout.count(f"{case} done") == 4, result.stderr
