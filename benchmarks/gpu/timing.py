# SPDX-License-Identifier: Apache-2.0
"""Time on a GPU: CUDA events, inputs that are not in L2, medians of interleaved rounds, and the limits of the card."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

Call = Callable[[int], object]  # takes the number of the round, to take turns among inputs


def milliseconds(providers: dict[str, Call], rounds: int = 25, launches: int = 1) -> dict[str, float]:
    """Median time of a call of each provider, one measurement of each per round.

    launches > 1 times that many calls in a row and divides: for kernels that are shorter than their launch.
    """
    for call in providers.values():
        for i in range(3):
            call(i)
    torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in providers}
    for i in range(rounds):
        for name, call in providers.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for j in range(launches):
                call(i + j)
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / launches)
    return {name: statistics.median(values) for name, values in times.items()}


def as_graph(call: Call, launches: int) -> Call:
    """`launches` calls as one CUDA graph: what the kernels take without the time to launch them."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(0)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            call(i)
    return lambda i: graph.replay()


def limits() -> dict[str, float]:
    """Bytes per second of a large copy (read + written), and bf16 operations per second of a large matrix product."""
    size = 2**31
    source, target = (torch.empty(size, dtype=torch.uint8, device="cuda").random_() for _ in range(2))
    copy = milliseconds({"copy": lambda i: target.copy_(source)})["copy"]
    source = target = torch.empty(0)  # four gigabytes for the next to use
    n = 8192
    a, b = (torch.randn(n, n, device="cuda").bfloat16() for _ in range(2))
    product = milliseconds({"matmul": lambda i: a @ b})["matmul"]
    return {"copy_bytes_per_s": 2 * size / copy * 1e3, "bf16_flop_per_s": 2 * n**3 / product * 1e3}


def rotating(make: Callable[[], tuple[torch.Tensor, ...]], copies: int) -> Callable[[int], tuple[torch.Tensor, ...]]:
    """Several sets of inputs, of which round i takes the next: none is in L2 when its turn comes again."""
    sets = [make() for _ in range(copies)]
    return lambda i: sets[i % copies]
