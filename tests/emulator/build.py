# SPDX-License-Identifier: Apache-2.0
"""Builds the CUDA kernels for the CPU and makes them the backend "emulated".

The same `csrc/cuda/*.cu` and `*.cuh` that nvcc compiles go through the C++ compiler with `cuda_emulator.h` in the
place of the CUDA runtime, and register under the namespace `rlhf_fast_emulated` for CPU tensors.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import torch

from rlhf_fast.ops import _register

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / f"emulator-{sys.implementation.cache_tag}"


def build(folder: Path = BUILD, *flags: str) -> Path:
    """Compiles what changed; returns the shared object."""
    programs = Path(sys.executable).parent
    configure = [str(programs / "cmake"), "-G", "Ninja", "-S", str(ROOT), "-B", str(folder), "-DRLHF_FAST_CUDA=OFF"]
    make = [str(programs / "cmake"), "--build", str(folder), "--target", "_emulated"]
    options = ["-DRLHF_FAST_EMULATOR=ON", f"-DPython_EXECUTABLE={sys.executable}"]
    for command in ([*configure, *options, f"-DCMAKE_MAKE_PROGRAM={programs / 'ninja'}", *flags], make):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-6000:]}{done.stderr[-6000:]}")
    return folder / "_emulated.so"


@functools.cache
def load() -> None:
    """Once a process: builds, registers the namespace, loads the kernels into it."""
    _register.add_backend("emulated", "rlhf_fast_emulated")
    torch.ops.load_library(str(build()))
