# SPDX-License-Identifier: Apache-2.0
"""The CUDA bindings without a GPU: the objects that nvcc built, on a CUDA runtime that only writes down its calls.

The cases are in fake_cuda/cases.py, and what makes them possible in fake_cuda/machine.py.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_cuda import machine
from helpers.tools import native_is_built

from rlhf_fast import _ext

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch has CUDA: nothing needs to be faked")
def test_bindings_on_a_fake_cuda_runtime() -> None:
    if not native_is_built() or not _ext.build_info().get("cuda") or shutil.which("g++") is None:
        pytest.skip("no CUDA kernels in this build, or no g++")
    if not machine.cuda_objects() or machine.cuda_headers() is None:
        pytest.skip("no CUDA objects in build/ (a wheel's build removes them), or no nvcc")
    command = [sys.executable, "-m", "pytest", "-q", "tests/fake_cuda/cases.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    found = re.search(r"(\d+) passed", done.stdout)
    assert found and int(found[1]) >= 30, done.stdout[-2000:]
