# SPDX-License-Identifier: Apache-2.0
"""Installing never fails where it could install less: each way ends in one line that `rf.backends()` repeats."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
import setuptools

from rlhf_fast import _triton

ROOT = Path(__file__).resolve().parents[1]
NVCC = shutil.which("nvcc")


def load_setup(monkeypatch: pytest.MonkeyPatch, **env: str) -> ModuleType:
    """setup.py as a module, with these environment variables; nothing is installed."""
    for name in ("RLHF_FAST_EXT", "RLHF_FAST_CUDA", "RLHF_FAST_ABI3"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(setuptools, "setup", lambda **kwargs: None)
    spec = importlib.util.spec_from_file_location("setup_of_rlhf_fast", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(setup: ModuleType, folder: Path, fails: tuple[str, ...]) -> list[str]:
    """Run build_ext with a CMake that fails with CUDA "ON" or "OFF" as told; what it was run with."""
    tried = []

    def run_cmake(build: Path, target: Path, cuda: str) -> None:
        tried.append(cuda)
        if cuda in fails:
            raise subprocess.CalledProcessError(1, ["cmake", "--build"])

    setup.run_cmake = run_cmake  # type: ignore[attr-defined]
    setup.notes_of_cmake = lambda build: {}  # type: ignore[attr-defined]
    command = setup.CMakeBuild(setuptools.Distribution({"ext_modules": []}))
    command.inplace, command.build_lib = False, str(folder)
    command.run()
    return tried


def note(folder: Path) -> str:
    path = folder / "rlhf_fast" / "_left_out.txt"
    return path.read_text() if path.exists() else ""


def test_cuda_kernels_that_do_not_compile_are_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    setup = load_setup(monkeypatch)
    assert build(setup, tmp_path, fails=("ON",)) == ["ON", "OFF"]
    assert note(tmp_path).startswith("cuda: The CUDA kernels do not compile: ")
    assert len(note(tmp_path).splitlines()) == 1


def test_kernels_that_do_not_compile_are_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup = load_setup(monkeypatch)
    assert build(setup, tmp_path, fails=("ON", "OFF")) == ["ON", "OFF"]
    assert note(tmp_path).startswith("extension: The kernels do not compile: ")
    assert "correct but slower" in capsys.readouterr().out


def test_a_build_that_succeeds_removes_an_old_note(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    setup = load_setup(monkeypatch)
    build(setup, tmp_path, fails=("ON",))
    setup = load_setup(monkeypatch)
    build(setup, tmp_path, fails=())
    assert note(tmp_path) == ""


@pytest.mark.parametrize(
    ("env", "fails"),
    [({"RLHF_FAST_EXT": "1"}, ("ON",)), ({"RLHF_FAST_CUDA": "1"}, ("ON",)), ({"RLHF_FAST_EXT": "1"}, ("ON", "OFF"))],
)
def test_what_was_demanded_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, env: dict[str, str], fails: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit, match="rlhf_fast: "):
        build(load_setup(monkeypatch, **env), tmp_path, fails)


def test_windows_installs_without_kernels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Even where a g++ or clang++ is on the PATH, as here."""
    setup = load_setup(monkeypatch)
    monkeypatch.setattr(setup.sys, "platform", "win32")
    assert setup.extensions() == []
    printed = capsys.readouterr().out
    assert "not built on Windows" in printed and len(printed.splitlines()) == 1
    setup.write_note(tmp_path / "rlhf_fast")
    assert "Windows" in note(tmp_path)


def test_a_checkout_without_symlinks_installs_without_triton_kernels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    setup = load_setup(monkeypatch)
    setup.check_link(ROOT)
    assert setup.left_out == {} or "triton" not in setup.left_out
    (tmp_path / "rlhf_fast").mkdir()
    (tmp_path / "rlhf_fast" / "kernels").write_text("../kernels")  # what git writes there
    setup.check_link(tmp_path)
    setup.write_note(tmp_path / "rlhf_fast")
    assert "triton: rlhf_fast/kernels is no folder" in note(tmp_path)
    monkeypatch.setattr(_triton, "left_out", "rlhf_fast/kernels is no folder")
    assert "holds no Triton kernels (rlhf_fast/kernels is no folder)" in _triton.why_not("gae", "cuda")


def configure(folder: Path, *options: str, **env: str) -> tuple[str, dict[str, str]]:
    """CMake's configuration alone: its log, and what it says it left out."""
    command = [
        *(sys.executable, "-c", "import cmake; cmake.cmake()"),
        *("-G", "Ninja", "-S", str(ROOT), "-B", str(folder), f"-DPython_EXECUTABLE={sys.executable}", *options),
    ]
    environment = {**os.environ, **env}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (folder / "left_out.txt").read_text().splitlines()
    return done.stdout, dict(line.split(": ", 1) for line in lines)


def test_a_free_threaded_python_gets_a_binary_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its Python.h refuses Py_LIMITED_API. The Python of this test has a GIL, so CMake is asked by hand."""
    monkeypatch.setitem(sysconfig.get_config_vars(), "Py_GIL_DISABLED", 1)
    setup = load_setup(monkeypatch)
    commands: list[list[str]] = []
    monkeypatch.setattr(setup.subprocess, "run", lambda command, **kwargs: commands.append(command))
    setup.run_cmake(tmp_path, tmp_path, "OFF")
    monkeypatch.undo()
    assert "-DRLHF_FAST_LIMITED_API=OFF" in commands[0]
    assert [extension.py_limited_api for extension in setup.extensions()] == [False, False]

    configure(tmp_path, "-DRLHF_FAST_LIMITED_API=OFF", "-DRLHF_FAST_CUDA=OFF")
    compiled = {
        Path(entry["file"]).name: entry for entry in json.loads((tmp_path / "compile_commands.json").read_text())
    }
    assert "Py_LIMITED_API" not in json.dumps(compiled["module.cpp"])
    assert f"_C{sysconfig.get_config_var('EXT_SUFFIX')}" in (tmp_path / "build.ninja").read_text()


def old_nvcc(folder: Path, *archs: str) -> str:
    """This machine's nvcc, that says it knows these architectures alone."""
    script = folder / "nvcc"
    listed = "\\n".join(f"compute_{arch}" for arch in archs)
    script.write_text(f'#!/bin/sh\n[ "$1" = --list-gpu-arch ] && printf "{listed}\\n" && exit\nexec {NVCC} "$@"\n')
    script.chmod(0o755)
    return str(script)


@pytest.mark.skipif(NVCC is None, reason="no nvcc here")
def test_an_older_nvcc_builds_for_the_architectures_that_it_knows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CUDAARCHS", raising=False)
    log, left_out = configure(tmp_path / "build", CUDACXX=old_nvcc(tmp_path, "75", "80", "86"))
    assert left_out == {}
    assert "nvcc is too old for 90-real, 100-real, 90-virtual" in log
    assert "CUDA architectures: 80-real 80-virtual" in log


@pytest.mark.skipif(NVCC is None, reason="no nvcc here")
def test_an_nvcc_that_is_too_old_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CUDAARCHS", raising=False)
    log, left_out = configure(tmp_path / "build", CUDACXX=old_nvcc(tmp_path, "60", "75"))
    assert "too old for compute capability 8.0" in left_out["cuda"]
    assert "CUDA architectures" not in log
