# SPDX-License-Identifier: Apache-2.0
"""How long threads of OpenMP spin before they sleep. GNU's OpenMP reads that when PyTorch loads it, and never again.

A training step enters tens of thousands of short parallel loops, and waking a thread for each takes up to 100 us. A
thread that spins too long takes the CPU from the one that it waits for. Settings of the user are left alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

SPINS = "20000"  # as `make demo` sets it; GNU's default is 300000
POLICIES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@contextmanager
def bounded_spinning() -> Iterator[None]:
    """Within it PyTorch, if that is not loaded yet, is loaded with this policy; the environment is the same after."""
    if "torch" in sys.modules or any(name in os.environ for name in POLICIES):
        yield
        return
    os.environ["GOMP_SPINCOUNT"] = SPINS
    try:
        yield
    finally:
        del os.environ["GOMP_SPINCOUNT"]
