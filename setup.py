# SPDX-License-Identifier: Apache-2.0
"""Drives CMake; sources and flags are in CMakeLists.txt, metadata in pyproject.toml.

What cannot be built here is left out, and one line says what and why: it is printed, and `rf.backends()` shows it.
Environment variables:

RLHF_FAST_EXT   0: a pure-Python wheel. 1: what cannot be built is an error, as in the Makefile.
RLHF_FAST_CUDA  0: leave nvcc alone. 1: CUDA kernels or an error.
RLHF_FAST_ABI3  1: a wheel for every Python from 3.11 and glibc 2.28; no `_host`, since pybind11 has no limited API.
"""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
EXT, CUDA, ABI3 = (os.environ.get(f"RLHF_FAST_{name}", "") for name in ("EXT", "CUDA", "ABI3"))
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))  # has no limited API: its Python.h refuses it
NOTE = "_left_out.txt"  # in the package, read by rlhf_fast/_ext.py: lines "part: reason"
CONSEQUENCES = {
    "extension": "rlhf_fast is installed without its compiled kernels: the ops run on PyTorch, correct but slower.",
    "triton": "rlhf_fast is installed without its Triton kernels: on a GPU the ops run on CUDA's or on PyTorch.",
    "cuda": "rlhf_fast is installed without its CUDA kernels: on a GPU the ops run on Triton or PyTorch.",
}

left_out: dict[str, str] = {}


def leave_out(part: str, reason: str) -> None:
    """Say that a part is not installed, and keep the line for the note."""
    left_out[part] = reason
    print(f"{reason}. {CONSEQUENCES[part]}")


def write_note(package: Path) -> None:
    """Write what was left out into the package, or remove what an earlier build wrote."""
    package.mkdir(parents=True, exist_ok=True)
    (package / NOTE).unlink(missing_ok=True)
    if left_out:
        (package / NOTE).write_text("".join(f"{part}: {reason}\n" for part, reason in left_out.items()))


class BuildPython(build_py):
    """The Python files, and the note of what was left out."""

    def run(self) -> None:
        """Copy the files, then write the note beside them."""
        super().run()
        write_note((ROOT if self.editable_mode else Path(self.build_lib)) / "rlhf_fast")


class CMakeBuild(build_ext):
    """One CMake build makes every extension module: with CUDA kernels, or without them, or none at all."""

    def run(self) -> None:
        """Build into the tree (editable) or the wheel; what fails is left out, or an error where it was demanded."""
        target = ROOT if self.inplace else Path(self.build_lib).resolve()
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}{'t' * FREE_THREADED}{'-abi3' * (ABI3 == '1')}"
        reason = ""
        for cuda in ("OFF",) if CUDA == "0" else ("ON", "OFF"):
            try:
                run_cmake(build, target, cuda)
            except (OSError, subprocess.CalledProcessError) as error:
                reason = notes_of_cmake(build).get("extension") or f"{error}; pip install -v shows its output"
                if EXT == "1" or (CUDA == "1" and cuda == "ON"):
                    raise SystemExit(f"rlhf_fast: {reason}") from None
                continue
            for part, missing in notes_of_cmake(build).items():
                leave_out(part, missing)
            if reason:
                leave_out("cuda", f"The CUDA kernels do not compile: {reason}")
            break
        else:
            leave_out("extension", f"The kernels do not compile: {reason}")
        write_note(target / "rlhf_fast")
        if self.inplace:
            built_from = runpy.run_path(str(ROOT / "rlhf_fast" / "_built_from.py"))
            (ROOT / "rlhf_fast" / built_from["NOTE"]).write_text(built_from["checksum"](ROOT))


def run_cmake(build: Path, target: Path, cuda: str) -> None:
    """Configure, build and install into `target`, with CUDA "ON" (where nvcc is) or "OFF"."""
    configure = [
        cmake_program(), "-G", "Ninja", "-S", str(ROOT), "-B", str(build), f"-DPython_EXECUTABLE={sys.executable}",
        f"-DRLHF_FAST_CUDA={cuda}", f"-DRLHF_FAST_CUDA_REQUIRED={'ON' if CUDA == '1' else 'OFF'}",
        f"-DRLHF_FAST_LIMITED_API={'OFF' if FREE_THREADED else 'ON'}",
        f"-DRLHF_FAST_ABI3={'ON' if ABI3 == '1' else 'OFF'}",
    ]  # fmt: skip
    if (ninja := shutil.which("ninja", path=search_path())) is not None:
        configure.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
    subprocess.run(configure, check=True)
    subprocess.run([cmake_program(), "--build", str(build)], check=True)
    subprocess.run([cmake_program(), "--install", str(build), "--prefix", str(target)], check=True)


def notes_of_cmake(build: Path) -> dict[str, str]:
    """What CMakeLists.txt left out or missed, by part."""
    notes = build / "left_out.txt"
    lines = notes.read_text().splitlines() if notes.exists() else []
    return dict(line.split(": ", 1) for line in lines)


def search_path() -> str:
    """The interpreter's own scripts first: cmake and ninja are Python packages, and its environment may be inactive."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def cmake_program() -> str:
    """The environment's cmake, else the one on the PATH."""
    return shutil.which("cmake", path=search_path()) or "cmake"


def why_not_built() -> str:
    """Why nothing is to be compiled here; empty where CMake should try."""
    if EXT == "0":
        return "A pure-Python install, RLHF_FAST_EXT=0"
    if sys.platform == "win32":
        return "The kernels are not built on Windows (they are on Linux, WSL among it, and on macOS)"
    if not any(shutil.which(name) for name in (os.environ.get("CXX") or "c++", "g++", "clang++")):
        return "No C++ compiler found"
    return ""


def check_link(root: Path) -> None:
    """A checkout on Windows may hold a text file where rlhf_fast/kernels is a symlink."""
    if not (root / "rlhf_fast" / "kernels").is_dir():
        leave_out("triton", "rlhf_fast/kernels is no folder: check out again with git config core.symlinks true")


def extensions() -> list[Extension]:
    """What is to be built, or nothing, with the reason printed."""
    if reason := why_not_built():
        if EXT == "1":
            raise SystemExit(f"rlhf_fast: RLHF_FAST_EXT=1, but: {reason}")
        leave_out("extension", reason)
        return []
    try:
        import torch  # noqa: F401
    except ImportError:
        raise SystemExit(
            "rlhf_fast compiles against the PyTorch that is installed, and finds none. Type:\n"
            "    pip install torch cmake ninja pybind11 'setuptools>=77' wheel\n"
            "    pip install --no-build-isolation .          (or, without compiling: RLHF_FAST_EXT=0 pip install .)"
        ) from None
    modules = [Extension("rlhf_fast._C", sources=[], py_limited_api=not FREE_THREADED)]
    return modules if ABI3 == "1" else [*modules, Extension("rlhf_fast._host", sources=[])]


check_link(ROOT)
setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildPython},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if ABI3 == "1" else {},
)
