# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gpu/timing.py on an imaginary GPU whose times are known: it must tell the kernel from the call."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from gpu import bench, timing  # noqa: E402


class ImaginaryGpu:
    """A host and a device, each with a clock in milliseconds; the device works off what the host enqueues."""

    cycles_per_ms = 1e6

    def __init__(self) -> None:
        self.host = self.device_free_at = 0.0
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                gpu.host += 0.001
                gpu.device_free_at = self.at = max(gpu.host, gpu.device_free_at)

            def query(self) -> bool:
                return gpu.host >= self.at

            def synchronize(self) -> None:
                gpu.host = max(gpu.host, self.at)

            def elapsed_time(self, end: Any) -> float:
                return float(end.at - self.at)

        class CUDAGraph:
            def __init__(self) -> None:
                self.kernels: list[float] = []

            def replay(self) -> None:
                gpu.run(0.01, sum(self.kernels))

        class Stream:
            def synchronize(self) -> None:
                gpu.synchronize()

        self.Event, self.CUDAGraph, self.Stream = Event, CUDAGraph, Stream
        self.captured: list[float] | None = None

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        yield

    @contextmanager
    def graph(self, graph: Any) -> Iterator[None]:
        self.captured = graph.kernels
        try:
            yield
        finally:
            self.captured = None

    def run(self, host: float, kernel: float) -> None:
        self.host += host
        if self.captured is not None:
            self.captured.append(kernel)
            return
        self.device_free_at = max(self.host, self.device_free_at) + kernel

    def _sleep(self, cycles: int) -> None:
        self.run(0.002, cycles / self.cycles_per_ms)

    def synchronize(self) -> None:
        self.host = max(self.host, self.device_free_at)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ImaginaryGpu:
    imaginary = ImaginaryGpu()
    monkeypatch.setattr(timing, "cuda", imaginary)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: imaginary.host / 1e3)
    return imaginary


@pytest.mark.parametrize("launches", [1, 20])
@pytest.mark.parametrize("kernel", [0.005, 0.025, 0.83])
def test_the_hosts_time_is_not_the_kernels(gpu: ImaginaryGpu, kernel: float, launches: int) -> None:
    found = timing.milliseconds({"op": lambda i: gpu.run(0.05, kernel)}, rounds=5, launches=launches)["op"]
    assert found.kernel == pytest.approx(kernel, rel=0.01, abs=1e-4)
    assert found.call == pytest.approx(max(0.05, kernel) if launches > 1 else 0.05 + kernel, rel=0.05, abs=2e-3)


def test_a_host_that_is_late_is_given_more_time(gpu: ImaginaryGpu) -> None:
    """The first calls are quick, later ones are not: the GPU must not be caught waiting."""
    count = 0

    def call(i: int) -> None:
        nonlocal count
        count += 1
        gpu.run(0.05 if count < 6 else 3.0, 0.02)

    assert timing.milliseconds({"op": call}, rounds=5)["op"].kernel == pytest.approx(0.02, rel=0.01, abs=1e-4)


def test_small_cases_are_measured_in_a_graph_too(gpu: ImaginaryGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each figure has a cell of its own; what cannot be captured says so and the rest goes on."""
    monkeypatch.setattr(bench.torch, "cuda", gpu)

    def refuses(i: int) -> None:
        if gpu.captured is not None:
            raise RuntimeError("synchronizes")
        gpu.run(0.04, 0.004)

    providers = {"native": lambda i: gpu.run(0.05, 0.006), "triton": refuses}
    limits = {"copy_bytes_per_s": 1e9, "bf16_flop_per_s": 1e12}
    row = bench.measure(bench.Case("small", 3000, providers, None, launches=50), limits)
    assert row["ms"]["native"] == pytest.approx(0.006, rel=0.02)
    assert row["call_ms"]["native"] == pytest.approx(0.05, rel=0.05)
    assert row["graph_ms"] == {"native": pytest.approx(0.006, rel=0.02)}
    assert row["errors"] == {"triton, in a graph": "RuntimeError: synchronizes"}
    large = bench.measure(bench.Case("large", 3000, {"native": providers["native"]}, flops=10**10), limits)
    assert large["graph_ms"] == {} and (row["limit_ms"], large["limit_ms"]) == (0.003, 10.0)
    report = {"machine": {"gpu": "", "torch": "", "triton": ""}, "date": "", "rows": [row, large],
              "limits": {"copy_bytes_per_s": 1.0, "bf16_flop_per_s": 1.0}}  # fmt: skip
    cells = [line.split("|") for line in bench.markdown(report).splitlines() if line.startswith("|")]
    assert len({len(line) for line in cells}) == 1
    assert [cell.strip() for cell in cells[2][4:10]] == ["0.006", "50%", "0.050", "0.006", "0.004", "-"]
