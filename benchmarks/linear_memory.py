# SPDX-License-Identifier: Apache-2.0
"""Extra memory of heads, forward and backward, each in a process of its own: `python benchmarks/linear_memory.py`.

Extra is the rise of the peak resident memory over inputs, less the gradients that come back. Linux only (it resets the
peak through /proc/self/clear_refs).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import torch
from linear_providers import Problem, Shape, logprob_providers, policy_providers

SMALL = Shape()
GEMMA = Shape(rows=2048, hidden=640, vocabulary=262144)

# name: shape, dtype, what is computed, who computes it
CASES: dict[str, tuple[Shape, str, str, str]] = {
    f"{what} {who} {shape.rows} x {shape.hidden} x {shape.vocabulary} {dtype}": (shape, dtype, what, who)
    for shape, dtype, what, who in [
        (SMALL, "float32", "logprobs", "native"),
        (SMALL, "float32", "logprobs, budget 0,", "native"),
        (SMALL, "float32", "logprobs", "eager"),
        (SMALL, "float32", "policy loss", "native"),
        (SMALL, "float32", "policy loss", "eager"),
        (SMALL, "bfloat16", "logprobs, budget 0,", "native"),
        (SMALL, "bfloat16", "logprobs", "eager"),
        (SMALL, "bfloat16", "policy loss", "native"),
        (SMALL, "bfloat16", "policy loss", "eager"),
        (GEMMA, "float32", "logprobs", "native"),
        (GEMMA, "float32", "policy loss", "native"),
        (GEMMA, "float32", "logprobs", "eager"),
    ]
}


def resident(field: str) -> int:
    """Bytes of /proc/self/status: VmRSS now, VmHWM at most."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024


def extra_bytes(shape: Shape, dtype: str, what: str, who: str) -> int:
    def call_for(size: Shape) -> tuple[Problem, object]:
        problem = Problem(size, getattr(torch, dtype), 1.0)
        if what == "policy loss":
            return problem, policy_providers(problem)[who]
        budget = 0 if "budget 0" in what else None
        return problem, logprob_providers(problem, "forward + backward", budget)[who]

    _, warm_up = call_for(Shape(rows=64, hidden=shape.hidden, vocabulary=512))
    warm_up()  # type: ignore[operator]
    problem, call = call_for(shape)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    call()  # type: ignore[operator]
    return resident("VmHWM") - before - problem.hidden.nbytes - problem.weight.nbytes


def measured(case: str) -> int | None:
    """Bytes, or None where the process did not survive."""
    done = subprocess.run([sys.executable, __file__, case], capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def main() -> None:
    if len(sys.argv) > 1:
        print(extra_bytes(*CASES[sys.argv[1]]))
        return
    print("| forward and backward | extra memory, MB |\n| --- | ---: |")
    for case in CASES:
        found = measured(case)
        print(f"| {case} | {'does not fit' if found is None else f'{found / 1e6:.0f}'} |", flush=True)


if __name__ == "__main__":
    main()
