# SPDX-License-Identifier: Apache-2.0
"""Compiles driver.cpp, a program that checks every CUDA kernel on the emulator, in the ways that Python does not stand.

`races`: ThreadSanitizer. `memory`: AddressSanitizer and UBSan. `real`: the block and cluster sizes of a GPU, where
reductions go over 16 and 32 warps. `plain`: quick; mutants.py runs it on broken kernels.
"""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

from helpers import mutation

FOLDER = Path(__file__).resolve().parent
KERNELS = FOLDER.parents[1] / "csrc" / "cuda"
FLAGS = {
    "plain": [],
    "real": ["-DRF_REAL_BLOCKS"],
    "races": ["-fsanitize=thread"],
    "memory": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"],
}
# ThreadSanitizer of g++ 12 does not know the addresses of newer kernels' randomised layouts.
FIXED_ADDRESSES = ["setarch", platform.machine(), "-R"]


ALL_PARTS = 31


def _compile(kernels: Path, parts: int, *flags: str) -> str:
    command = ["g++", "-std=c++17", "-O1", "-g1", "-ffp-contract=off", "-Wno-unknown-pragmas", "-DRF_EMULATE"]
    command += [f"-DRF_PARTS={parts}", f"-I{FOLDER}", f"-I{kernels}", str(FOLDER / "driver.cpp"), *flags]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def build(way: str, folder: Path, kernels: Path = KERNELS, parts: int = ALL_PARTS) -> Path:
    """The program, from the kernels in `kernels` (a copy of csrc/cuda beside copies of csrc/*.h); parts: driver.cpp."""
    program = folder / way
    _compile(kernels, parts, *FLAGS[way], "-o", str(program))
    return program


def source(parts: int) -> bytes:
    """All that the compiler reads of the program, comments left out."""
    return _compile(KERNELS, parts, "-E", "-P").encode()


def run(way: str, program: Path, schedule: str = "") -> subprocess.CompletedProcess[str]:
    """schedule: see schedule.h. Killed after mutation.CPU_SECONDS of work."""
    prefix = FIXED_ADDRESSES if way == "races" else []
    environment = {**os.environ, "RLHF_FAST_SCHEDULE": schedule, "ASAN_OPTIONS": "detect_leaks=0"}
    command = [*prefix, str(program)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, preexec_fn=mutation.limit_work)
