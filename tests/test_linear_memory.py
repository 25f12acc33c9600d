# SPDX-License-Identifier: Apache-2.0
"""What linear_token_logprobs does not multiply, does not keep, and gives back."""

from __future__ import annotations

import contextlib
import mmap
from typing import Any

import pytest
import torch
from helpers.linear_heads import HIDDEN, VOCABULARY, both, head
from helpers.tools import Recorder, randint, randn, with_gradients
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import rlhf_fast as rf
from rlhf_fast import _pages as pages
from rlhf_fast.ops.linear import stats, tiles
from rlhf_fast.ops.linear.bundles import unflatten


def matmul_flops(event: Any) -> int:
    """Of one profiled event: 2 n k m where it multiplies (n, k) by (k, m)."""
    first = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1}.get(event.name)
    if first is None:
        return 0
    (n, k), (_, m) = event.input_shapes[first : first + 2]
    return 2 * n * k * m


@both
def test_masked_rows_are_not_multiplied(backend: str, generator: torch.Generator) -> None:
    """A quarter of the rows costs a quarter of the matmuls, forward and backward: three, as tiles are kept."""
    inputs = head(generator, torch.float32, (8, 16), bias=False)
    targets = randint(VOCABULARY, 8, 16, generator=generator)

    def flops(mask: Tensor | None) -> int:
        leaves = {k: v.clone().requires_grad_() for k, v in inputs.items()}
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
            rf.linear_token_logprobs(**leaves, targets=targets, mask=mask).sum().backward()
        return sum(matmul_flops(event) for event in seen.events())

    few = torch.zeros(8, 16, dtype=torch.bool)
    few[:2] = True
    everything = flops(None)
    assert everything == 3 * 2 * 128 * HIDDEN * VOCABULARY
    assert flops(few) == everything // 4


@both
@pytest.mark.parametrize("budget", [0, 2**20])
def test_memory_stays_in_the_budget(
    backend: str, budget: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No allocation near the size of [N, V]: what is kept, and one tile."""
    monkeypatch.setattr(tiles, "CPU_TILE", 2**19)
    rows, width = 512, 4096
    inputs = {
        "hidden": randn(rows, HIDDEN, generator=generator).requires_grad_(),
        "weight": randn(width, HIDDEN, generator=generator).requires_grad_(),
    }
    targets = randint(width, rows, generator=generator)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        rf.linear_token_logprobs(**inputs, targets=targets, memory_budget=budget).sum().backward()
    operators = [event for event in seen.events() if event.name.startswith("rlhf_fast")]
    largest = max(event.cpu_memory_usage for event in seen.events())
    assert operators and 0 < largest <= budget + 2**19 + 2**19, "kept, a tile (2 MiB in the reference), small things"


@both
def test_forward_alone_keeps_nothing(backend: str, generator: torch.Generator) -> None:
    """Without a gradient to come, nothing is kept: under no_grad and where nothing requires grad."""
    inputs = head(generator, torch.float32, (64,), width=4096)
    targets = randint(4096, 64, generator=generator)
    kept = []
    for mode, grad in ((torch.no_grad(), True), (contextlib.nullcontext(), False), (contextlib.nullcontext(), True)):
        leaves = {k: v.clone().requires_grad_(grad) for k, v in inputs.items()}
        with mode, Recorder() as recorder:
            rf.linear_token_logprobs(**leaves, targets=targets)
        _, options = unflatten(recorder.calls[0][1], stats.Inputs, stats.Options)
        kept.append(options.loop.budget)
    assert kept == [0, 0, tiles.DEFAULT_BUDGET["cpu"]]


def test_giving_memory_back_changes_nothing(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of any size, and on a system that takes none."""
    inputs = head(generator, torch.float32, (40,), width=4099)
    targets = randint(4099, 40, generator=generator)
    call = lambda **x: {"logprobs": rf.linear_token_logprobs(**x, targets=targets)}  # noqa: E731
    usual = with_gradients(call, inputs)
    monkeypatch.setattr(pages, "_kept", False)  # a trainer may have run in this process
    for least, madvise in ((0, lambda: None), (0, pages._madvise)):
        monkeypatch.setattr(pages, "LEAST", least)
        monkeypatch.setattr(pages, "_madvise", madvise)
        torch.testing.assert_close(with_gradients(call, inputs), usual, rtol=0, atol=0)
    leaves = {k: v.clone().requires_grad_() for k, v in inputs.items()}
    out = call(**leaves)["logprobs"].sum()
    first, second = (torch.autograd.grad(out, list(leaves.values()), retain_graph=True) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="Linux's")
def test_what_is_given_back_is_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_kept", False)
    x = torch.ones(pages.LEAST // 4 + 4096)
    pages.give_back(x[3000:9000])
    assert x[:3000].min() == 1 == x[9000:].min()
    assert x[3000:9000].min() == 0
    x.fill_(2)
    pages.keep_freed_memory()
    pages.give_back(x)
    assert x.min() == 2
