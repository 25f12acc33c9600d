# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the benchmarks: the machine's limits, measured in the same session, and timers that report against them.

A file with CASES times the providers of a case side by side, round by round (`common.interleaved`), and then hands the
recorded rounds to pytest-benchmark one provider at a time, by its own option `timer`. So its statistics, its JSON and
`--benchmark-compare` are the usual ones, and a busy minute slows all providers of a case alike.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import machine as machine_
import pytest
import torch
from common import Call, Case, interleaved
from peers import WHY_NOT


class Replay:
    """A clock that tells recorded durations again: it is read at the start and at the end of every round."""

    def __init__(self) -> None:
        self.now = 0.0
        self.durations: list[float] = []
        self.running = False

    def __call__(self) -> float:
        if self.running:
            self.now += self.durations.pop(0)
        self.running = not self.running
        return self.now


REPLAY = Replay()
measured: dict[str, dict[str, list[float]]] = {}  # case -> provider -> seconds by round; of the last case alone


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    replayed = pytest.mark.benchmark(timer=REPLAY)
    if "variant" in metafunc.fixturenames:
        metafunc.parametrize("variant", [pytest.param(v, marks=replayed) for v in metafunc.module.VARIANTS])
    if "case" in metafunc.fixturenames:
        pairs = [(case, provider) for case in metafunc.module.CASES for provider in case.providers]
        metafunc.parametrize(
            ("case", "provider"), [pytest.param(c, p, id=f"{c.name}: {p}", marks=replayed) for c, p in pairs]
        )


@pytest.fixture(scope="session")
def limits() -> dict[str, float]:
    """Bytes per second read and copied, floating-point operations per second of a matmul."""
    return machine_.limits()


@pytest.fixture
def replay(benchmark: Any) -> Callable[[list[float]], None]:
    """Hands durations of rounds that were measured elsewhere to pytest-benchmark."""

    def run(durations: list[float]) -> None:
        REPLAY.durations = list(durations)
        benchmark.pedantic(lambda: None, rounds=len(durations))

    return run


@pytest.fixture
def compare(
    benchmark: Any, replay: Callable[[list[float]], None], limits: dict[str, float]
) -> Callable[[Case, str], None]:
    """`compare(case, provider)`: the case is measured when its first provider is asked for."""

    def run(case: Case, provider: str) -> None:
        if not benchmark.enabled:
            calls = case.build()
            if provider not in calls:
                pytest.skip(_why_not(provider))
            return benchmark.pedantic(calls[provider])
        if case.name not in measured:
            measured.clear()
            measured[case.name] = interleaved(_that_run(case.build()))
            gc.collect()
        if provider not in measured[case.name]:
            pytest.skip(_why_not(provider))
        benchmark.group = case.name
        replay(measured[case.name][provider])
        _report(benchmark, limits, provider, case.moved, case.elements, case.flops)

    return run


def _that_run(calls: dict[str, Call]) -> dict[str, Call]:
    """Without the peers that fail on this machine: they are skipped with their reason, and the case goes on."""
    runnable = {}
    for name, call in calls.items():
        try:
            call()
        except Exception as error:
            if name.split(",")[0] in ("native", "torch", "triton", "eager"):
                raise
            WHY_NOT[name] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        else:
            runnable[name] = call
    return runnable


def _why_not(provider: str) -> str:
    return WHY_NOT.get(provider, f"{provider} does not run here")


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark: Any, limits: dict[str, float]) -> Callable[..., None]:
    """`measure(call, group=..., moved=bytes)`: one provider by itself, for files without CASES."""

    def run(call: Call, *, group: str, moved: int, elements: int | None = None, flops: int | None = None) -> None:
        benchmark.group = group
        once = machine_.seconds(call, rounds=2)
        rounds = int(max(3, min(9, 3 / once)))
        benchmark.pedantic(call, rounds=rounds, iterations=max(1, min(500, int(1e-3 / max(once, 1e-7)))))
        params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
        _report(benchmark, limits, params.get("provider", "native"), moved, elements, flops)

    return run


def _report(
    benchmark: Any, limits: dict[str, float], provider: str, moved: int, elements: int | None, flops: int | None
) -> None:
    """What the case moves and computes, against the limits of this run."""
    if not benchmark.enabled:
        return
    median = benchmark.stats.stats.median
    benchmark.extra_info.update(
        provider=provider,
        bytes_moved=moved,
        gigabytes_per_second=moved / median / 1e9,
        share_of_read_bandwidth=moved / median / limits["read"],
        share_of_copy_bandwidth=moved / median / limits["copy"],
        limits=limits,
    )
    if elements is not None:
        benchmark.extra_info["million_elements_per_second"] = elements / median / 1e6
    if flops is not None:
        benchmark.extra_info["gigaflops"] = flops / median / 1e9
        benchmark.extra_info["share_of_matmul_rate"] = flops / median / limits["matmul"]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.update(machine_.machine(), state=machine_.state())
