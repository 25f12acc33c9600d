# SPDX-License-Identifier: Apache-2.0
"""gae and ppo_advantages against the Python loop. Bytes: rewards, values, mask in; advantages, returns out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from common import compiled, eager_gae, eager_ppo_advantages, on
from torch import Tensor

import rlhf_fast as rf

SHAPES = [(64, 1024), (256, 1024), (16, 8192), (8, 128)]

shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
# torch.compile unrolls the loop over T: minutes of compilation at T = 1024, so it is timed at the smallest shape alone.
providers = pytest.mark.parametrize("provider", ("eager", "compile", "torch", "native"))


def inputs(shape: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    rewards, values = (torch.randn(shape, generator=generator) for _ in range(2))
    return rewards, values, torch.rand(shape, generator=generator) < 0.9


@shapes
@providers
def test_gae(measure: Callable[..., None], generator: torch.Generator, provider: str, shape: tuple[int, int]) -> None:
    if provider == "compile" and shape[1] > 128:
        pytest.skip("torch.compile unrolls the loop: minutes of compilation")
    rewards, values, mask = inputs(shape, generator)
    if provider in ("eager", "compile"):
        function = eager_gae if provider == "eager" else compiled(eager_gae)
        call = lambda: function(rewards, values, mask)  # noqa: E731
    else:
        call = on(provider, lambda: rf.gae(rewards, values, mask=mask))
    elements = rewards.numel()
    measure(call, group=f"gae {shape[0]} x {shape[1]} fp32", moved=17 * elements, elements=elements)


@shapes
@pytest.mark.parametrize("provider", ("eager", "torch", "native"))
def test_ppo_advantages(
    measure: Callable[..., None], generator: torch.Generator, provider: str, shape: tuple[int, int]
) -> None:
    logprobs, values, mask = inputs(shape, generator)
    ref_logprobs = logprobs + torch.randn(shape, generator=generator)
    scores = torch.randn(shape[:1], generator=generator)
    if provider == "eager":
        call = lambda: eager_ppo_advantages(scores, logprobs, ref_logprobs, values, mask)  # noqa: E731
    else:
        call = on(provider, lambda: rf.ppo_advantages(scores, logprobs, ref_logprobs, values, mask, kl_coef=0.1))
    elements = logprobs.numel()
    measure(call, group=f"ppo_advantages {shape[0]} x {shape[1]} fp32", moved=29 * elements, elements=elements)
