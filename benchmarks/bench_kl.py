# SPDX-License-Identifier: Apache-2.0
"""token_kl (bytes: both logits once) and approx_kl (bytes: two in, one out)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from common import PROVIDERS, backward, compiled, eager_kl, on
from torch import Tensor

import rlhf_fast as rf

SHAPES = [(256, 49152), (64, 151936), (256, 1000)]

providers = pytest.mark.parametrize("provider", PROVIDERS)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")


def eager_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    d = ref_logprobs - logprobs
    return d.exp() - 1 - d


@shapes
@providers
@pytest.mark.parametrize("direction", ["forward", "forward + backward"])
def test_token_kl(
    measure: Callable[..., None],
    generator: torch.Generator,
    direction: str,
    provider: str,
    shape: tuple[int, int],
) -> None:
    logits, ref_logits = (torch.randn(shape, generator=generator) for _ in range(2))
    function = {"eager": eager_kl, "compile": eager_kl}.get(provider, rf.token_kl)
    if provider == "compile":
        function = compiled(function)
    with_backward = direction != "forward"
    logits.requires_grad_(with_backward)
    call = lambda: function(logits, ref_logits)  # noqa: E731
    if with_backward:
        call = backward(call, [logits])
    if provider not in ("eager", "compile"):
        call = on(provider, call)
    moved = (5 if with_backward else 2) * logits.numel() * 4
    measure(call, group=f"token_kl reverse {direction} {shape[0]} x {shape[1]} fp32", moved=moved)


@providers
@pytest.mark.parametrize("shape", [(64, 1024), (512, 8192)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_approx_kl(
    measure: Callable[..., None], generator: torch.Generator, provider: str, shape: tuple[int, int]
) -> None:
    logprobs, ref_logprobs = (-torch.rand(shape, generator=generator) for _ in range(2))
    if provider in ("eager", "compile"):
        function = eager_k3 if provider == "eager" else compiled(eager_k3)
        call = lambda: function(logprobs, ref_logprobs)  # noqa: E731
    else:
        call = on(provider, lambda: rf.approx_kl(logprobs, ref_logprobs, estimator="k3"))
    measure(call, group=f"approx_kl k3 forward {shape[0]} x {shape[1]} fp32", moved=3 * logprobs.numel() * 4)
