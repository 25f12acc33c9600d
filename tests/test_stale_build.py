# SPDX-License-Identifier: Apache-2.0
"""In a checkout, an extension built from other sources is not loaded: its operators may take other arguments."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_fast import _built_from, _ext

ROOT = Path(__file__).parents[1]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the package and of the sources, with this tree's build."""
    if _ext._C is None or not (ROOT / "csrc").exists():
        pytest.skip("no extension, or no checkout")
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copy(ROOT / "setup.py", tmp_path)
    ignore = shutil.ignore_patterns("__pycache__", "kernels")
    shutil.copytree(ROOT / "rlhf_fast", tmp_path / "rlhf_fast", ignore=ignore)
    shutil.copytree(ROOT / "kernels", tmp_path / "rlhf_fast" / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def started(checkout: Path) -> str:
    """What serves token_logprobs in a new process, and its warnings."""
    code = "import rlhf_fast; print(rlhf_fast.backends())"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=checkout, timeout=100
    ).stderr


def test_a_build_of_these_sources_is_loaded(checkout: Path) -> None:
    assert _built_from.stale(checkout / "rlhf_fast") == ""
    assert "other sources" not in started(checkout)


def test_a_build_of_other_sources_is_not(checkout: Path) -> None:
    with (checkout / "csrc" / "args.h").open("a") as file:
        file.write("// one more argument\n")
    assert "works without its compiled kernels" in started(checkout)
    assert "built from other sources" in _built_from.stale(checkout / "rlhf_fast")


def test_a_build_from_before_there_was_a_note_is_not(checkout: Path) -> None:
    (checkout / "rlhf_fast" / _built_from.NOTE).unlink()
    assert _built_from.stale(checkout / "rlhf_fast")


def test_an_installed_package_has_no_sources_to_compare(checkout: Path) -> None:
    shutil.rmtree(checkout / "csrc")
    assert _built_from.stale(checkout / "rlhf_fast") == ""


def test_nor_does_another_package_that_brings_sources(checkout: Path) -> None:
    """One that puts a csrc/ of its own into site-packages."""
    (checkout / "setup.py").unlink()
    (checkout / "csrc" / "args.h").write_text("// theirs\n")
    assert _built_from.stale(checkout / "rlhf_fast") == ""
