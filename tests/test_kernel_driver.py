# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels without PyTorch: tests/kernels/driver.cpp, here with the baseline's instructions, and watched by
AddressSanitizer where the compiler has it.

`make check-aarch64` runs the same program with Arm's, under qemu.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMPILER = next((name for name in (os.environ.get("CXX") or "c++", "g++", "clang++") if shutil.which(name)), None)


def has_sanitizer(folder: Path) -> bool:
    """Whether a program that it watches can be linked and run."""
    source, program = folder / "empty.cpp", folder / "empty"
    source.write_text("int main() {}")
    built = subprocess.run([str(COMPILER), "-fsanitize=address", str(source), "-o", str(program)], capture_output=True)
    return built.returncode == 0 and subprocess.run([str(program)], capture_output=True).returncode == 0


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here")
def test_kernels_hold_without_pytorch(tmp_path: Path) -> None:
    assert COMPILER is not None
    program = str(tmp_path / "driver")
    flags = ["-std=c++17", "@csrc/cpu/flags.txt", "-O0", "-DRF_ISA=isa_default", "-Wno-psabi"]
    flags += ["-fsanitize=address"] if has_sanitizer(tmp_path) else []
    subprocess.run([COMPILER, *flags, "tests/kernels/driver.cpp", "-o", program], cwd=ROOT, check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 failed" in done.stdout
