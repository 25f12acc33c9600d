# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the benchmarks: the bandwidth, measured in the same session, and a timer that reports against it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from common import Call, bandwidth, machine, seconds


@pytest.fixture(scope="session")
def limits() -> dict[str, float]:
    """Bytes per second, read and copied."""
    return bandwidth()


@pytest.fixture
def measure(benchmark: Any, limits: dict[str, float]) -> Callable[..., None]:
    """`measure(call, group=..., moved=bytes)`: extra_info gets GB/s and the share of the read bandwidth."""

    def run(call: Call, *, group: str, moved: int, elements: int | None = None) -> None:
        benchmark.group = group
        call()
        benchmark.pedantic(call, rounds=9, warmup_rounds=1, iterations=_iterations(call))
        rate = moved / benchmark.stats.stats.median
        benchmark.extra_info.update(
            bytes_moved=moved,
            gigabytes_per_second=round(rate / 1e9, 2),
            share_of_read_bandwidth=round(rate / limits["read"], 3),
            read_gigabytes_per_second=round(limits["read"] / 1e9, 2),
            copy_gigabytes_per_second=round(limits["copy"] / 1e9, 2),
        )
        if elements is not None:
            benchmark.extra_info["million_elements_per_second"] = round(elements / benchmark.stats.stats.median / 1e6)

    return run


def _iterations(call: Call) -> int:
    """Short calls are timed several at a time."""
    return max(1, min(500, int(1e-3 / max(seconds(call, rounds=3), 1e-7))))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.update(machine())
