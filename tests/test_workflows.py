# SPDX-License-Identifier: Apache-2.0
"""The workflows and papers of the repository say what the repository holds; actionlint checks their grammar in CI."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import rlhf_fast as rf

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
TARGETS = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def commands(workflow: Path) -> str:
    """Every `run:` of a workflow."""
    jobs = yaml.safe_load(workflow.read_text())["jobs"].values()
    return "\n".join(step["run"] for job in jobs for step in job.get("steps", []) if "run" in step)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_what_there_is(workflow: Path) -> None:
    text = commands(workflow)
    assert len(WORKFLOWS) >= 3
    assert set(re.findall(r"^make ([\w-]+)", text, re.MULTILINE)) <= TARGETS
    named = re.findall(r"\b(?:tests|release|rlhf_fast|\.ci)/[\w./-]+", text)
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_make_help_names_every_target_that_a_user_types() -> None:
    helped = set(re.findall(r"make ([a-z0-9-]+)", (ROOT / "Makefile").read_text().split("$(VENV)/installed:")[0]))
    kept_quiet = {"help", "setup", "build", "clean", "measure-integrations", "measure-trainer", "engine-venv"}
    assert TARGETS - kept_quiet <= helped


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_make_lets_python_keep_what_it_has_compiled(tmp_path: Path) -> None:
    makefile = tmp_path / "Makefile"
    makefile.write_text(f"include {ROOT}/Makefile\nshow:\n\t@echo [$$PYTHONDONTWRITEBYTECODE] [$$OMP_WAIT_POLICY]\n")
    outer = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")  # of the make that runs the tests
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = ["make", "--silent", "--no-print-directory", "-f", str(makefile), "show"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == "[] [PASSIVE]\n", done.stdout + done.stderr


def test_no_function_of_a_script_hides_a_program_that_it_looks_for() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    sought = set(re.findall(r"command -v (\w+)", script))
    assert "chromium" in sought
    assert not sought & set(re.findall(r"^(\w+)\(\)", script, re.MULTILINE))


def test_hooks_look_at_the_files_of_the_commit() -> None:
    hooks = {h["id"]: h for h in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]}
    assert set(hooks) == {"ruff", "ruff-format", "mypy", "clang-format"}
    assert {name for name, hook in hooks.items() if hook.get("pass_filenames") is False} == {"mypy"}


def test_citation_names_this_version_and_licence() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == rf.__version__
    assert citation["license"] == PROJECT["project"]["license"]


def test_issue_forms_ask_for_commands_that_exist() -> None:
    form = (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text()
    assert "rlhf-fast info" in form and "rf.backends()" in form
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        assert yaml.safe_load(path.read_text())
