# SPDX-License-Identifier: Apache-2.0
"""Installing: the wheel, the pure-Python wheel, no compiler, no nvcc, no PyTorch, and the symlink to kernels/.

Wheels are built from a copy of the tree, with the environment's own tools, and used from a folder of their own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
USE = """
import torch, rlhf_fast as rf
logits, targets = torch.randn(4, 9), torch.randint(0, 9, (4,))
expected = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
assert torch.allclose(rf.token_logprobs(logits, targets), expected, atol=1e-5)
print(rf.__file__)
rows = [row for row in rf.backends() if "the op has no kernels" not in row.why_not_faster]
print(sorted({row.backend.split()[0] for row in rows}), {row.why_not_faster for row in rows})
"""


# An editable install of the checkout finds what the wheel lacks: it has to go.
WITHOUT_CHECKOUT = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a checkout holds, without what was built in it."""
    copy = tmp_path_factory.mktemp("source") / "tree"
    ignore = shutil.ignore_patterns(".git", ".venv", "build", "*.so", "*.egg-info", "runs", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignore)
    return copy


def build_wheel(source: Path, to: Path, **env: str) -> tuple[Path, str]:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-v",
        "-w",
        str(to),
        str(source),
    ]
    ours = {name: value for name, value in os.environ.items() if not name.startswith("RLHF_FAST_")}
    done = subprocess.run(command, capture_output=True, text=True, env={**ours, **env}, cwd=to)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log
    return next(to.glob("rlhf_fast-*.whl")), log


def use_wheel(wheel: Path, folder: Path) -> str:
    """What USE prints with the wheel unpacked, away from the checkout."""
    site = folder / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    script = WITHOUT_CHECKOUT + f"sys.path.insert(0, {str(site)!r})\n{USE}"
    ours = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, cwd=folder, env=ours)
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(site) in done.stdout
    return done.stdout


def unoptimized_compiler(folder: Path) -> str:
    """The C++ compiler with -O0 in the last word: what is in the wheel is tested, and loads, in a third of the time."""
    script = folder / "c++"
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    compiler = next(name for name in names if name and shutil.which(name))
    script.write_text(f'#!/bin/sh\nexec {compiler} "$@" -O0\n')
    script.chmod(0o755)
    return str(script)


def test_wheel_without_nvcc(source: Path, tmp_path: Path) -> None:
    compiler = unoptimized_compiler(tmp_path)
    wheel, log = build_wheel(source, tmp_path, CUDACXX="/nonexistent/nvcc", CXX=compiler)
    assert "without CUDA kernels" in log
    names = zipfile.ZipFile(wheel).namelist()
    assert {"rlhf_fast/_C.abi3.so", "rlhf_fast/kernels/logprob.py", "rlhf_fast/kernels/gae.py"} <= set(names)
    assert any(name.startswith("rlhf_fast/_host.") for name in names)
    assert not any(name.startswith(("kernels/", "tests/", "benchmarks/")) for name in names)
    assert "['native']" in use_wheel(wheel, tmp_path)


def test_pure_python_wheel(source: Path, tmp_path: Path) -> None:
    wheel, log = build_wheel(source, tmp_path, RLHF_FAST_EXT="0")
    assert wheel.name.endswith("py3-none-any.whl")
    assert "rlhf_fast/py.typed" in zipfile.ZipFile(wheel).namelist()
    assert "without its compiled kernels" in log
    printed = use_wheel(wheel, tmp_path)
    assert "['torch']" in printed
    assert "not built" in printed


def test_wheel_without_a_compiler(source: Path, tmp_path: Path) -> None:
    tools = tmp_path / "bin"  # a PATH that holds no compiler
    tools.mkdir()
    wheel, log = build_wheel(source, tmp_path, PATH=str(tools), CXX="")
    assert "No C++ compiler found" in log
    assert wheel.name.endswith("py3-none-any.whl")
    assert "No C++ compiler found" in use_wheel(wheel, tmp_path)  # rf.backends() says so too


def test_wheel_with_a_compiler_that_fails(source: Path, tmp_path: Path) -> None:
    """The install succeeds with less and says so; RLHF_FAST_EXT=1 refuses."""
    shutil.rmtree(source / "build", ignore_errors=True)  # CMake remembers the compiler that it found
    wheel, log = build_wheel(source, tmp_path, CXX="/bin/false", RLHF_FAST_CUDA="0")
    assert "The kernels do not compile" in log
    printed = use_wheel(wheel, tmp_path)
    assert "['torch']" in printed and "The kernels do not compile" in printed


WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; "


def test_import_without_torch_says_what_to_type() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH + "import rlhf_fast"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode != 0
    message = done.stderr[done.stderr.rindex("ModuleNotFoundError") :].strip().splitlines()
    assert len(message) == 3
    assert "pip install torch" in message[2]


def test_build_without_torch_says_what_to_type(source: Path) -> None:
    script = WITHOUT_TORCH + "import runpy; sys.argv = ['setup.py', '--version']; runpy.run_path('setup.py')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=source)
    assert done.returncode != 0
    assert "--no-build-isolation" in done.stderr.strip().splitlines()[-1]


def test_kernels_are_reached_through_the_symlink() -> None:
    assert (ROOT / "rlhf_fast" / "kernels").resolve() == ROOT / "kernels", (
        "rlhf_fast/kernels must be a symlink to kernels/; on Windows, check out with git config core.symlinks true"
    )
    assert not (ROOT / "kernels" / "__init__.py").exists(), "kernels/ must not become an importable package"


def test_the_lines_that_users_type_ask_for_a_setuptools_that_reads_our_metadata() -> None:
    """A new environment of Python 3.11 has one that does not, and `pip install setuptools` leaves it there."""
    (wanted,) = [
        line
        for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
        if line.startswith("setuptools")
    ]
    for file in ("README.md", "docs/install.md", "setup.py", "pyproject.toml"):
        lines = [
            line for line in (ROOT / file).read_text().splitlines() if re.search(r"pip install .*setuptools", line)
        ]
        assert lines and all(f"'{wanted}'" in line for line in lines), file
