# SPDX-License-Identifier: Apache-2.0
"""A long run says where it is and names what it skipped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest

@pytest.mark.parametrize("i", range(200))
def test_many(i):
    if i == 7:
        pytest.skip("no browser here")
"""


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_long_run_says_where_it_is_and_what_it_skipped(tmp_path: Path, workers: str) -> None:
    (tmp_path / "conftest.py").write_text(
        "from helpers import progress\nprogress.EVERY = 0.0\nfrom helpers.progress import pytest_configure\n"
    )
    (tmp_path / "test_many.py").write_text(TESTS)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-m", "pytest", "-q", "-n", workers, "--rootdir", str(tmp_path), "-p", "no:randomly"]

    def run() -> str:
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    first = run()
    assert "200 tests; the first such run" in first
    assert ": 100 of 200 tests, now test_many.py" in first
    assert "skipped: no browser here (1)" in first.splitlines()[-2]
    assert "200 tests; the last such run took 0:" in run()
