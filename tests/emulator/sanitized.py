# SPDX-License-Identifier: Apache-2.0
"""Runs op tests on the emulated GPU with AddressSanitizer and UBSan watching the kernels.

The emulated library is built once more with both; the sanitizer's runtime must be loaded before Python, hence a
process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys

from emulator import build

FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"


def environment() -> dict[str, str]:
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "RLHF_FAST_EMULATED_BUILD": str(build.BUILD.with_name(build.BUILD.name + "-sanitized")),
        "RLHF_FAST_EMULATED_FLAGS": FLAGS,
    }


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", *arguments]
    return subprocess.run(command, cwd=build.ROOT, env=environment(), capture_output=True, text=True)
