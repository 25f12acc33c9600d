# SPDX-License-Identifier: Apache-2.0
"""The machine: what it is, what it is busy with, and the limits that it reaches right now."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import rlhf_fast as rf


def machine() -> dict[str, str | int]:
    """Processor, threads and versions: what a figure means nothing without."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"model name\s*:\s*(.+)", info.read_text())
        cpu = found.group(1).strip() if found else cpu
    return {
        "cpu": cpu,
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rlhf_fast": rf.__version__,
        "served_by": rf.backends()[0].backend,
        "python": platform.python_version(),
    }


def machine_slug() -> str:
    """The machine as a file name, such as amd-epyc-2-threads."""
    facts = machine()
    return re.sub(r"[^a-z0-9]+", "-", f"{facts['cpu']} {facts['threads']} threads".lower()).strip("-")


PEERS = ("trl", "torchrl", "cut-cross-entropy")


def peers() -> dict[str, str | None]:
    """The version of each peer that the tables compare with, None where it is not installed."""
    found: dict[str, str | None] = {}
    for name in PEERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def state() -> dict[str, Any]:
    """How quiet the machine is: load, time stolen by the hypervisor, frequency policy, what the environment sets."""
    facts: dict[str, Any] = {"cores": os.cpu_count(), "load_average": list(os.getloadavg())}
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    facts["governor"] = governor.read_text().strip() if governor.exists() else "not visible"
    stat = Path("/proc/stat")
    if stat.exists():
        ticks = [int(x) for x in stat.read_text().splitlines()[0].split()[1:]]
        facts["stolen_seconds"] = ticks[7] / os.sysconf("SC_CLK_TCK")
    facts["environment"] = {k: v for k, v in os.environ.items() if k.startswith(("OMP_", "MKL_", "RLHF_FAST_"))}
    return facts


def seconds(call: Callable[[], Any], rounds: int = 7) -> float:
    """Median wall time of one call, after a warm-up."""
    call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def bandwidth(mebibytes: int = 256) -> dict[str, float]:
    """Bytes per second that this machine reads (best of three reductions) and copies (reads + writes), right now."""
    x = torch.ones(mebibytes * 2**18)
    y = torch.empty_like(x)
    size = x.numel() * 4
    reads = (lambda: x.sum(), lambda: x.amax(), lambda: torch.dot(x, x))
    return {
        "read": size / min(seconds(read) for read in reads),
        "copy": 2 * size / seconds(lambda: y.copy_(x)),
    }


def limits() -> dict[str, float]:
    """Bytes per second read and copied, and float32 operations per second of a large matrix product."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    return {**bandwidth(), "matmul": 2 * 1024**3 / seconds(lambda: a @ b)}
