# SPDX-License-Identifier: Apache-2.0
"""Time on a GPU: CUDA events, inputs that are not in L2, medians of interleaved rounds, and the limits of the card.

Two figures a call. `call`: from an idle GPU, so that Python, PyTorch and the launch count, as for one call by itself.
`kernel`: the GPU is first kept busy while the host gets ahead, so that only its own work counts, as within a training
step. For a kernel of 25 us the first is mostly the host.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import cuda

Call = Callable[[int], object]  # takes the number of the round, to take turns among inputs


class Time(NamedTuple):
    """Milliseconds a call."""

    call: float
    kernel: float


class Clock:
    """Keeps the GPU busy for a time, by a kernel that counts cycles."""

    def __init__(self) -> None:
        cycles = 10_000_000
        cuda._sleep(cycles)
        start, end = (cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        cuda._sleep(cycles)
        end.record()
        end.synchronize()
        self.cycles_per_ms = cycles / start.elapsed_time(end)

    def keep_busy(self, ms: float) -> None:
        cuda._sleep(int(self.cycles_per_ms * ms))


def _between_events(calls: Callable[[], object]) -> tuple[float, bool]:
    """Milliseconds between an event before and one after, and whether the GPU was behind the host all along."""
    start, end = (cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    calls()
    end.record()
    was_behind = not start.query()
    end.synchronize()
    return start.elapsed_time(end), was_behind


def milliseconds(providers: dict[str, Call], rounds: int = 25, launches: int = 1) -> dict[str, Time]:
    """Median time of a call of each provider, one measurement of each per round.

    launches > 1 times that many calls in a row and divides: for kernels that are shorter than their launch.
    """
    clock = Clock()
    head_start = dict.fromkeys(providers, 1.0)  # milliseconds that the host needs to enqueue the calls
    for name, call in providers.items():
        for i in range(3):
            begin = time.perf_counter()
            for j in range(launches):
                call(i + j)
            head_start[name] = 2e3 * (time.perf_counter() - begin) + 0.2
        cuda.synchronize()
    times: dict[str, list[Time]] = {name: [] for name in providers}
    for i in range(rounds):
        for name, call in providers.items():
            calls = lambda i=i, call=call: [call(i + j) for j in range(launches)]  # noqa: E731
            alone, _ = _between_events(calls)
            for _ in range(6):
                clock.keep_busy(head_start[name])
                kernel, was_behind = _between_events(calls)
                if was_behind:
                    break
                head_start[name] *= 2  # the host was late: the GPU waited for it
            times[name].append(Time(alone / launches, kernel / launches))
    return {name: Time(*map(statistics.median, zip(*values, strict=True))) for name, values in times.items()}


def as_graph(call: Call, launches: int) -> Call:
    """`launches` calls as one CUDA graph: what the kernels take without the time to launch them."""
    stream = cuda.Stream()
    with cuda.stream(stream):
        call(0)
    stream.synchronize()
    graph = cuda.CUDAGraph()
    with cuda.graph(graph):
        for i in range(launches):
            call(i)
    return lambda i: graph.replay()


def limits() -> dict[str, float]:
    """Bytes per second of a large copy (read + written), and bf16 operations per second of a large matrix product."""
    size = 2**31
    source, target = (torch.empty(size, dtype=torch.uint8, device="cuda").random_() for _ in range(2))
    copy = milliseconds({"copy": lambda i: target.copy_(source)})["copy"].kernel
    source = target = torch.empty(0)  # four gigabytes for the next to use
    n = 8192
    a, b = (torch.randn(n, n, device="cuda").bfloat16() for _ in range(2))
    product = milliseconds({"matmul": lambda i: a @ b})["matmul"].kernel
    return {"copy_bytes_per_s": 2 * size / copy * 1e3, "bf16_flop_per_s": 2 * n**3 / product * 1e3}


def rotating(make: Callable[[], tuple[torch.Tensor, ...]], copies: int) -> Callable[[int], tuple[torch.Tensor, ...]]:
    """Several sets of inputs, of which round i takes the next: none is in L2 when its turn comes again."""
    sets = [make() for _ in range(copies)]
    return lambda i: sets[i % copies]
