# SPDX-License-Identifier: Apache-2.0
"""Everything that needs a GPU, in under nine minutes: build, tests, sanitizers, benchmarks. `make gpu-check`

Needs no network: what is installed must be enough (PyTorch with CUDA, Triton, nvcc, cmake, ninja, pybind11, pytest).
No step stops the next; a tool that is missing is reported. Logs and tables go to the folder --results.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
BUDGET = 530.0  # seconds for everything
DRIVER = "benchmarks/gpu/driver.py"


class Step(NamedTuple):
    name: str
    command: list[str]
    limit: float  # seconds
    needs: str | None = None  # a program, without which the step is reported as missing


def steps(results: Path) -> list[Step]:
    python = sys.executable
    parallel = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    tests = [python, "-m", "pytest", "tests", "-m", "gpu", "-q", *parallel, "--ignore=tests/trainer"]
    sanitizer = ["compute-sanitizer", "--error-exitcode", "1", "--print-limit", "20", "--tool"]
    return [
        Step("facts", ["nvidia-smi"], 20, "nvidia-smi"),
        Step("build", ["env", "RLHF_FAST_CUDA=1", python, "setup.py", "build_ext", "--inplace"], 170, "nvcc"),
        Step("first-touch", [python, "benchmarks/gpu/first_touch.py"], 60),
        Step("tests", tests, 200),
        Step("memcheck", [*sanitizer, "memcheck", python, DRIVER], 80, "compute-sanitizer"),
        Step("racecheck", [*sanitizer, "racecheck", python, DRIVER], 80, "compute-sanitizer"),
        Step("synccheck", [*sanitizer, "synccheck", python, DRIVER], 60, "compute-sanitizer"),
        Step("benchmarks", [python, "benchmarks/gpu/bench.py", "--out", str(results), "--seconds", "150"], 220),
    ]


def environment() -> dict[str, str]:
    """Kernels for this card alone, and this checkout before any installed package."""
    import torch

    found = dict(os.environ, PYTHONPATH=str(ROOT))
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        found["CUDAARCHS"] = f"{major}{minor}-real"
    else:
        print("No GPU is visible to PyTorch: the steps that need one will fail.")
    return found


def run(step: Step, results: Path, env: dict[str, str], seconds: float) -> str:
    """One word of outcome, and a line of detail."""
    if step.needs is not None and shutil.which(step.needs) is None:
        return f"missing   {step.needs} is not installed"
    if seconds < 5:
        return "skipped   no time left"
    log = results / f"{step.name}.log"
    begin = time.monotonic()
    with log.open("w") as out:
        try:
            code = subprocess.run(
                step.command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT, timeout=min(step.limit, seconds)
            ).returncode
        except subprocess.TimeoutExpired:
            code = -1
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    word = {0: "ok", -1: "too long"}.get(code, f"failed {code}")
    last = lines[-1][:110] if lines and step.name != "facts" else ""
    return f"{word:9} {time.monotonic() - begin:5.0f} s   {last}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--only", nargs="*", help="names of steps")
    options = parser.parse_args()
    results = options.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    env, begin, outcomes = environment(), time.monotonic(), []
    for step in steps(results):
        if options.only and step.name not in options.only:
            continue
        print(f"{step.name} ...", flush=True)
        outcomes.append((step.name, run(step, results, env, BUDGET - (time.monotonic() - begin))))
    for table in (results / "first-touch.log", results / "gpu.md", results / "tests.log"):
        if table.exists():
            print("\n" + "\n".join(table.read_text(errors="replace").splitlines()[-30:]))
    print()
    for name, outcome in outcomes:
        print(f"{name:12}{outcome}")
    return int(any(not outcome.startswith(("ok", "missing")) for _, outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
