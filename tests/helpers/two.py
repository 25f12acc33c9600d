# SPDX-License-Identifier: Apache-2.0
"""Starts a script as two processes that form a group: `python SCRIPT RANK STORE CASE ...`."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path


def two_ranks(script: Path, folder: Path, *cases: str) -> list[subprocess.CompletedProcess[str]]:
    """What both printed: to files, as a full pipe would stop a rank that the other waits for."""
    processes, said = [], []
    try:
        for rank in range(2):
            command = [sys.executable, str(script), str(rank), str(folder / "store"), *cases]
            out, errors = folder / f"out-{rank}", folder / f"errors-{rank}"
            with out.open("w") as out_file, errors.open("w") as error_file:
                processes.append(subprocess.Popen(command, stdout=out_file, stderr=error_file))
            said.append((out, errors))
        deadline = time.monotonic() + 120 * len(cases)
        for process in processes:
            with suppress(subprocess.TimeoutExpired):  # what they printed says more
                process.wait(max(1.0, deadline - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, out.read_text(), errors.read_text())
        for process, (out, errors) in zip(processes, said, strict=True)
    ]
