# SPDX-License-Identifier: Apache-2.0
"""As many threads as the CPUs have time for.

Two OpenMP threads wait for each other at every operator. Beside other work one of them is often not scheduled, and a
step was seen to take ten times as long as with one thread. How many there are changes results by rounding only; who
wants them bit for bit sets OMP_NUM_THREADS, or calls torch.set_num_threads, and nothing here raises that.
"""

from __future__ import annotations

import os
import time
from functools import lru_cache
from pathlib import Path

import torch

from .progress import notice

GLANCE = 0.2  # seconds of looking around before the first step
SPARE = 0.3  # of a CPU that others may use before a thread is given up for them
WORKING = (0, 1, 2, 5, 6, 7)  # columns of /proc/stat: user, nice, system, irq, softirq, steal


class Threads:
    """The number of threads of this process, fitted to what other processes leave."""

    def __init__(self) -> None:
        """The most is what the process has now, and what its CPUs and their quota allow."""
        self.most = min(torch.get_num_threads(), _quota())
        self.fixed = self.most == 1 or "OMP_NUM_THREADS" in os.environ or torch.cuda.is_available()
        self._said = False
        self._last: tuple[float, float, float] | None = None

    def fit(self) -> None:
        """Set the number from what others did since the last call; the first one looks for a moment."""
        if self.fixed:
            return
        if self._last is None:
            self._last = _sample()
            time.sleep(GLANCE)
        now = _sample()
        if now is None or self._last is None:
            self.fixed = True  # no /proc: leave it as it is
            return
        seconds = max(now[0] - self._last[0], 1e-3)
        others = max(0.0, (now[1] - self._last[1] - (now[2] - self._last[2])) / seconds)
        self._last = now
        wanted = max(1, min(self.most, int(len(os.sched_getaffinity(0)) - others + SPARE)))
        if wanted == torch.get_num_threads():
            return
        torch.set_num_threads(wanted)
        if not self._said and wanted < self.most:
            self._said = True
            notice(f"other processes use {others:.1f} of the CPUs: working with {wanted} of {self.most} threads")


@lru_cache(maxsize=1)
def threads() -> Threads:
    """The one `Threads` of this process."""
    return Threads()


def _sample() -> tuple[float, float, float] | None:
    """Seconds on the clock, seconds that this process' CPUs worked for anybody, and for this process."""
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
