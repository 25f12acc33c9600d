# SPDX-License-Identifier: Apache-2.0
"""gae, vtrace and ppo_advantages against the loops over tokens.

Bytes: rewards, values, mask in; advantages, returns out.

torch.compile unrolls the loop over tokens, minutes of compilation at 1024 of them: it is timed at 32 tokens alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import peers
import pytest
import torch
from common import Call, Case, eager_gae, eager_ppo_advantages, eager_vtrace, on, versus
from torch import Tensor

import rlhf_fast as rf


def inputs(rows: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(rows, length, generator=generator) for _ in range(2))
    return rewards, values, torch.rand(rows, length, generator=generator) < 0.9


def ours(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return rf.gae(rewards, values, mask=mask)


def gae(rows: int, length: int) -> Case:
    def build() -> dict[str, Call]:
        calls = versus(ours, eager_gae, *inputs(rows, length), peers=peers.gae())
        return {name: call for name, call in calls.items() if name in providers}  # eager is verl's loop

    slow = ("compile", "torch") if length <= 32 else ()  # the reference is a loop, too
    providers = ("native", "eager", *slow, "OpenRLHF's loop", "torchrl")
    elements = rows * length
    return Case(f"gae {rows} x {length} float32", providers, build, 17 * elements, elements)


def vtrace(rows: int, length: int) -> Case:
    """Reads the log-ratios besides."""

    def ours(rewards: Tensor, values: Tensor, log_ratios: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return rf.vtrace(rewards, values, log_ratios, mask=mask)

    def build() -> dict[str, Call]:
        rewards, values, mask = inputs(rows, length)
        calls = versus(ours, eager_vtrace, rewards, values, 0.1 * values, mask)
        del calls["compile"], calls["torch"]
        return calls

    elements = rows * length
    return Case(f"vtrace {rows} x {length} float32", ("native", "eager"), build, 21 * elements, elements)


def ppo_advantages(rows: int, length: int) -> Case:
    def build() -> dict[str, Call]:
        logprobs, values, mask = inputs(rows, length)
        scores, ref_logprobs = torch.randn(rows), logprobs + torch.randn(rows, length)
        calls = versus(
            partial(rf.ppo_advantages, kl_coef=0.1), eager_ppo_advantages, scores, logprobs, ref_logprobs, values, mask
        )
        del calls["compile"], calls["torch"]
        return calls

    elements = rows * length
    return Case(f"ppo_advantages {rows} x {length} float32", ("native", "eager"), build, 29 * elements, elements)


CASES = [gae(64, 1024), gae(256, 1024), gae(16, 8192), gae(8, 32), vtrace(64, 1024), ppo_advantages(64, 1024)]


def test_gae(compare: Callable[[Case, str], None], case: Case, provider: str) -> None:
    compare(case, provider)


@pytest.mark.parametrize("real", ["all real", "90% real", "no mask"])
@pytest.mark.parametrize(("rows", "length"), [(64, 1024), (16, 8192)])
def test_gae_in_cache(measure: Callable[..., None], rows: int, length: int, real: str) -> None:
    """What one thread does where nothing evicts its data: beside the other providers of a case something always does.

    The outputs are fresh in every call, but the allocator hands the same pages out again.
    """
    rewards, values, holes = inputs(rows, length)
    mask = {"all real": torch.ones_like(holes), "90% real": holes, "no mask": None}[real]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        call = on("native", partial(rf.gae, rewards, values, mask=mask))
        elements = rows * length
        group = f"gae in cache, one thread, {rows} x {length} float32, {real}"
        measure(call, group=group, moved=(17 if mask is not None else 16) * elements, elements=elements)
    finally:
        torch.set_num_threads(threads)
