# SPDX-License-Identifier: Apache-2.0
"""Builds the CUDA kernels for the CPU and makes them the backend "emulated".

The same `csrc/cuda/*.cu` and `*.cuh` that nvcc compiles go through the C++ compiler with `cuda_emulator.h` in the
place of the CUDA runtime, and register under the namespace `rlhf_fast_emulated` for CPU tensors.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import torch
from filelock import FileLock

from rlhf_fast.ops import _register

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
BUILD = ROOT / "build" / f"emulator-{sys.implementation.cache_tag}"


def is_up_to_date(library: Path, flags: str) -> bool:
    """Whether no source is newer. CMake takes many seconds to find that out, in every process that runs tests."""
    stamp = library.with_name("flags")
    if not library.exists() or not stamp.exists() or stamp.read_text() != f"{flags} {torch.__version__}":
        return False
    sources = [ROOT / "CMakeLists.txt", *(ROOT / "csrc").rglob("*.*"), *FOLDER.glob("*.h")]
    return max(path.stat().st_mtime for path in sources) < library.stat().st_mtime


def build() -> Path:
    """Compiles what changed; returns the shared object. sanitized.py sets the two variables."""
    folder = Path(os.environ.get("RLHF_FAST_EMULATED_BUILD") or BUILD)
    flags = os.environ.get("RLHF_FAST_EMULATED_FLAGS", "")
    library = folder / "_emulated.so"
    programs = Path(sys.executable).parent
    configure = [str(programs / "cmake"), "-G", "Ninja", "-S", str(ROOT), "-B", str(folder), "-DRLHF_FAST_CUDA=OFF"]
    make = [str(programs / "cmake"), "--build", str(folder), "--target", "_emulated"]
    options = ["-DRLHF_FAST_EMULATOR=ON", f"-DPython_EXECUTABLE={sys.executable}"]
    options += [f"-DCMAKE_MAKE_PROGRAM={programs / 'ninja'}", f"-DCMAKE_CXX_FLAGS={flags}"]
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):  # several workers run the tests
        if is_up_to_date(library, flags):
            return library
        for command in ([*configure, *options], make):
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-6000:]}{done.stderr[-6000:]}")
        library.touch()  # ninja leaves it alone where nothing changed that it is made of
        library.with_name("flags").write_text(f"{flags} {torch.__version__}")
    return library


@functools.cache
def load() -> None:
    """Once a process: builds, registers the namespace, loads the kernels into it."""
    _register.add_backend("emulated", "rlhf_fast_emulated")
    torch.ops.load_library(str(build()))
