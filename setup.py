# SPDX-License-Identifier: Apache-2.0
"""Drives CMake; sources and flags are in CMakeLists.txt, metadata in pyproject.toml.

RLHF_FAST_EXT=0 builds a pure-Python wheel. Without a compiler the install succeeds without the extension and says
so; with one, a failing build is an error. RLHF_FAST_CUDA=0 leaves nvcc alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
WITHOUT = "rlhf_fast is installed without its compiled kernels: the ops run on PyTorch, correct but slower."


class CMakeBuild(build_ext):
    """One CMake build makes every extension module."""

    def run(self) -> None:
        target = ROOT if self.inplace else Path(self.build_lib).resolve()
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        configure = [
            cmake_program(), "-G", "Ninja", "-S", str(ROOT), "-B", str(build), f"-DPython_EXECUTABLE={sys.executable}",
            f"-DRLHF_FAST_CUDA={'OFF' if os.environ.get('RLHF_FAST_CUDA') == '0' else 'ON'}",
        ]  # fmt: skip
        if (ninja := shutil.which("ninja", path=search_path())) is not None:
            configure.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
        subprocess.run(configure, check=True)
        subprocess.run([cmake_program(), "--build", str(build)], check=True)
        subprocess.run([cmake_program(), "--install", str(build), "--prefix", str(target)], check=True)


def search_path() -> str:
    """The interpreter's own scripts first: cmake and ninja are Python packages, and its environment may be inactive."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def cmake_program() -> str:
    return shutil.which("cmake", path=search_path()) or "cmake"


def extensions() -> list[Extension]:
    """What is to be built, or nothing, with the reason printed."""
    if os.environ.get("RLHF_FAST_EXT") == "0":
        print(f"RLHF_FAST_EXT=0. {WITHOUT}")
        return []
    if not any(shutil.which(name) for name in (os.environ.get("CXX") or "c++", "g++", "clang++")):
        print(f"No C++ compiler found. {WITHOUT}")
        return []
    try:
        import torch  # noqa: F401
    except ImportError:
        raise SystemExit(
            "rlhf_fast compiles against the PyTorch that is installed, and finds none. Type:\n"
            "    pip install torch cmake ninja pybind11 setuptools wheel\n"
            "    pip install --no-build-isolation .          (or, without compiling: RLHF_FAST_EXT=0 pip install .)"
        ) from None
    return [Extension("rlhf_fast._C", sources=[], py_limited_api=True), Extension("rlhf_fast._host", sources=[])]


setup(ext_modules=extensions(), cmdclass={"build_ext": CMakeBuild})
