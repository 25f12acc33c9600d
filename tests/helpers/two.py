# SPDX-License-Identifier: Apache-2.0
"""Starts a script as two processes that form a group: `python SCRIPT RANK STORE CASE ...`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def two_ranks(script: Path, folder: Path, *cases: str) -> list[subprocess.CompletedProcess[str]]:
    commands = [[sys.executable, str(script), str(rank), str(folder / "store"), *cases] for rank in range(2)]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for command in commands
    ]
    said = [process.communicate(timeout=300) for process in processes]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(processes, said, strict=True)
    ]
