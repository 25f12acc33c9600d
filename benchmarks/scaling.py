# SPDX-License-Identifier: Apache-2.0
"""Cost against rows N, vocabulary V, length T and threads: eager, ours, and what the bandwidth would allow."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from common import Call, eager_gae, eager_logprobs, interleaved, on
from machine import bandwidth

import rlhf_fast as rf


def logprobs(rows: int, width: int) -> tuple[dict[str, Call], int]:
    logits, targets = torch.randn(rows, width), torch.randint(width, (rows,))
    ours = on("native", partial(rf.token_logprobs, logits, targets))
    return {"eager": partial(eager_logprobs, logits, targets), "native": ours}, logits.nbytes


def gae(rows: int, length: int) -> tuple[dict[str, Call], int]:
    rewards, values = torch.randn(rows, length), torch.randn(rows, length)
    mask = torch.rand(rows, length) < 0.9
    calls = {"native": on("native", partial(rf.gae, rewards, values, mask=mask))}
    if length <= 4096:  # the loop takes seconds beyond
        calls["eager"] = partial(eager_gae, rewards, values, mask)
    return calls, 17 * rewards.numel()


# title, what the axis is, its points, how to make the case at a point
SWEEPS: list[tuple[str, str, tuple[int, ...], Callable[[int], tuple[dict[str, Call], int]]]] = [
    ("token_logprobs, V = 49152", "N", (1, 4, 16, 64, 256, 1024), lambda n: logprobs(n, 49152)),
    ("token_logprobs, N = 64", "V", (256, 1024, 4096, 16384, 65536, 262144), lambda v: logprobs(64, v)),
    ("gae, B = 16", "T", (64, 256, 1024, 4096, 16384, 65536), lambda t: gae(16, t)),
]


def measure() -> Iterator[dict[str, Any]]:
    """One row per sweep and point: seconds by provider, and the bytes over the read bandwidth of that many threads."""
    torch.manual_seed(0)
    read = bandwidth()["read"]
    for title, axis, points, make in SWEEPS:
        for point in points:
            yield _row(title, axis, point, make(point), read)
    before = torch.get_num_threads()
    try:
        for threads in range(1, (os.cpu_count() or 1) + 1):
            torch.set_num_threads(threads)
            read = bandwidth()["read"]
            yield _row("token_logprobs, 256 x 49152", "threads", threads, logprobs(256, 49152), read)
            yield _row("gae, 256 x 1024", "threads", threads, gae(256, 1024), read)
    finally:
        torch.set_num_threads(before)


def _row(title: str, axis: str, point: int, case: tuple[dict[str, Call], int], read: float) -> dict[str, Any]:
    calls, moved = case
    times = {name: sorted(t)[len(t) // 2] for name, t in interleaved(calls, rounds=9, budget=2.0).items()}
    return {"sweep": title, "axis": axis, "at": point, "seconds": times, "limit": moved / read}
