# SPDX-License-Identifier: Apache-2.0
"""As many threads as there are idle CPUs.

Two OpenMP threads wait for each other at every operator. If other processes run, one of them is often not scheduled,
and a step was seen to take ten times as long as with one thread. The number changes results only by rounding; for
bitwise equal results set OMP_NUM_THREADS or call torch.set_num_threads, and nothing here raises that number.
"""

from __future__ import annotations

import os
import time
from functools import lru_cache
from pathlib import Path

import torch

from .progress import notice

GLANCE = 0.2  # seconds of the first measurement
SPARE = 0.3  # share of a CPU that others may use before we use one thread less
WORKING = (0, 1, 2, 5, 6, 7)  # columns of /proc/stat: user, nice, system, irq, softirq, steal


class Threads:
    """Fits the number of threads of this process to the load of other processes."""

    def __init__(self) -> None:
        """At most the current number of threads and the cgroup's CPU quota are used."""
        self.most = min(torch.get_num_threads(), _quota())
        self.fixed = self.most == 1 or "OMP_NUM_THREADS" in os.environ or torch.cuda.is_available()
        self._notified = False
        self._last: tuple[float, float, float] | None = None

    def fit(self) -> None:
        """Set the number from the load of others since the last call; the first call measures for a moment."""
        if self.fixed:
            return
        if self._last is None:
            self._last = _sample()
            time.sleep(GLANCE)
        now = _sample()
        if now is None or self._last is None:
            self.fixed = True  # no /proc: leave the number unchanged
            return
        seconds = max(now[0] - self._last[0], 1e-3)
        others = max(0.0, (now[1] - self._last[1] - (now[2] - self._last[2])) / seconds)
        self._last = now
        wanted = max(1, min(self.most, int(len(os.sched_getaffinity(0)) - others + SPARE)))
        if wanted == torch.get_num_threads():
            return
        torch.set_num_threads(wanted)
        if not self._notified and wanted < self.most:
            self._notified = True
            notice(f"other processes use {others:.1f} of the CPUs: working with {wanted} of {self.most} threads")


@lru_cache(maxsize=1)
def threads() -> Threads:
    """The one `Threads` of this process."""
    return Threads()


def _sample() -> tuple[float, float, float] | None:
    """Wall-clock seconds, busy seconds of this process' CPUs, and CPU seconds of this process."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
        names = {f"cpu{i}" for i in os.sched_getaffinity(0)}
    except (OSError, AttributeError):
        return None
    worked = 0
    for line in lines:
        name, *columns = line.split()
        if name in names:
            worked += sum(int(columns[i]) for i in WORKING if i < len(columns))
    return time.monotonic(), worked / os.sysconf("SC_CLK_TCK"), time.process_time()


def _quota() -> int:
    """CPUs that the cgroup of this process may use at once."""
    try:
        allowed, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, round(int(allowed) / int(period)))
    except (OSError, ValueError):  # no such file, or "max"
        return 2**31
