# SPDX-License-Identifier: Apache-2.0
"""token_logprobs and token_stats. Bytes: the logits once forward; once more read and once written backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from common import PROVIDERS, backward, compiled, eager_logprobs, eager_logprobs_entropy, on
from torch import Tensor

import rlhf_fast as rf

SHAPES = [(256, 49152), (64, 151936), (256, 1000)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

providers = pytest.mark.parametrize("provider", PROVIDERS)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def inputs(shape: tuple[int, int], dtype: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    logits = torch.randn(shape, generator=generator).mul_(3).to(DTYPES[dtype])
    return logits, torch.randint(shape[1], shape[:1], generator=generator)


@dtypes
@shapes
@providers
def test_token_logprobs(
    measure: Callable[..., None], generator: torch.Generator, provider: str, shape: tuple[int, int], dtype: str
) -> None:
    logits, targets = inputs(shape, dtype, generator)
    if provider in ("eager", "compile"):
        function = eager_logprobs if provider == "eager" else compiled(eager_logprobs)
        call = lambda: function(logits, targets)  # noqa: E731
    else:
        call = on(provider, lambda: rf.token_logprobs(logits, targets))
    moved = logits.numel() * logits.element_size()
    measure(call, group=f"token_logprobs forward {shape[0]} x {shape[1]} {dtype}", moved=moved)


@shapes
@providers
def test_token_logprobs_backward(
    measure: Callable[..., None], generator: torch.Generator, provider: str, shape: tuple[int, int]
) -> None:
    logits, targets = inputs(shape, "fp32", generator)
    logits.requires_grad_()
    if provider in ("eager", "compile"):
        function = eager_logprobs if provider == "eager" else compiled(eager_logprobs)
        call = backward(lambda: function(logits, targets), [logits])
    else:
        call = on(provider, backward(lambda: rf.token_logprobs(logits, targets), [logits]))
    moved = 3 * logits.numel() * logits.element_size()
    measure(call, group=f"token_logprobs forward + backward {shape[0]} x {shape[1]} fp32", moved=moved)


@shapes
@providers
def test_token_stats(
    measure: Callable[..., None], generator: torch.Generator, provider: str, shape: tuple[int, int]
) -> None:
    logits, targets = inputs(shape, "fp32", generator)
    if provider in ("eager", "compile"):
        function = eager_logprobs_entropy if provider == "eager" else compiled(eager_logprobs_entropy)
        call = lambda: function(logits, targets)  # noqa: E731
    else:
        call = on(provider, lambda: rf.token_stats(logits, targets))
    moved = logits.numel() * logits.element_size()
    measure(call, group=f"logprobs + entropy forward {shape[0]} x {shape[1]} fp32", moved=moved)
