# SPDX-License-Identifier: Apache-2.0
"""The limits of CONTRIBUTING.md: lines a file, lines a function, and exceptions from ruff's that are still needed."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINES_OF_A_FILE, LINES_OF_A_FUNCTION = 400, 60
OURS = ("rlhf_fast", "kernels", "csrc", "tests", "benchmarks", "examples", "release", "website", "setup.py")
SUFFIXES = {".py", ".cpp", ".h", ".cu", ".cuh"}

# Longer than that when the limit was set. Take lines out of this list, add none.
LONG_FUNCTIONS = {
    "kernels/gae.py gae_rows",
    "kernels/logprob_fold.py token_stats_fold",
    "kernels/ppo.py ppo_rows",
    "rlhf_fast/ops/linear/policy_loss.py linear_policy_loss",
}


def sources() -> list[Path]:
    """Of the checkout, without what was built or installed in it, and each file once (rlhf_fast/kernels is a link)."""
    found = [path for name in OURS for path in [ROOT / name, *(ROOT / name).glob("**/*")]]
    linked = ROOT / "rlhf_fast" / "kernels"
    return [path for path in found if path.suffix in SUFFIXES and path.is_file() and linked not in path.parents]


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """From `def` to the end, without the docstring: what is said about a function does not make it long."""
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    if ast.get_docstring(function) is not None:
        lines -= (function.body[0].end_lineno or 0) - function.body[0].lineno + 1
    return lines


def test_no_file_is_longer_than_400_lines() -> None:
    assert len(sources()) > 200
    lengths = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8").count("\n") for path in sources()}
    assert {name: length for name, length in lengths.items() if length > LINES_OF_A_FILE} == {}


def test_no_function_is_longer_than_60_lines() -> None:
    long = set()
    for path in sources():
        if path.suffix == ".py":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                if is_function and lines_of(node) > LINES_OF_A_FUNCTION:
                    long.add(f"{path.relative_to(ROOT)} {node.name}")
    assert long - LONG_FUNCTIONS == set(), "longer than 60 lines"
    assert LONG_FUNCTIONS - long == set(), "short enough by now: take it out of LONG_FUNCTIONS"


def test_every_exception_to_ruffs_limits_is_needed() -> None:
    """Ruff without the exceptions reports, for every file that is named for itself, just the rules that are named."""
    exceptions: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"][
        "per-file-ignores"
    ]
    named = {path: set(rules) for path, rules in exceptions.items() if "*" not in path}
    assert [path for path in named if not (ROOT / path).exists()] == []
    kept = ", ".join(f"{path!r} = {rules}" for path, rules in exceptions.items() if path not in named)
    config = f"lint.per-file-ignores={{{kept}}}"
    command = [sys.executable, "-m", "ruff", "check", "--output-format", "json", "--config", config]
    done = subprocess.run([*command, *named], capture_output=True, text=True, cwd=ROOT)
    reported: dict[str, set[str]] = {path: set() for path in named}
    for finding in json.loads(done.stdout):
        reported[str(Path(finding["filename"]).relative_to(ROOT))].add(finding["code"])
    assert reported == named
