# SPDX-License-Identifier: Apache-2.0
"""linear_token_logprobs against the whole logits at once, and against the bare matmul that neither can do without.

Bytes: the weight once and the hidden states once, forward. These ops are bound by the matmul, so read the ratio to
`matmul`, not the share of the bandwidth.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from common import backward, compiled, eager_linear_logprobs, on
from torch import Tensor

import rlhf_fast as rf

ROWS, HIDDEN, VOCABULARY = 256, 576, 49152
PROVIDERS = ("matmul", "eager", "compile", "torch", "native")

masks = pytest.mark.parametrize("share", [1.0, 0.5], ids=["all_rows", "half_masked"])


def inputs(share: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden = torch.randn(ROWS, HIDDEN, generator=generator)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator).mul_(0.05)
    return hidden, weight, torch.randint(VOCABULARY, (ROWS,), generator=generator), torch.arange(ROWS) < share * ROWS


@masks
@pytest.mark.parametrize("direction", ["forward", "forward + backward"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_linear_token_logprobs(
    measure: Callable[..., None], generator: torch.Generator, provider: str, direction: str, share: float
) -> None:
    """Baselines get the real rows alone."""
    hidden, weight, targets, mask = inputs(share, generator)
    real_hidden, real_targets = hidden[mask].contiguous(), targets[mask]
    calls: dict[str, Callable[[], Tensor]] = {
        "matmul": lambda: torch.nn.functional.linear(real_hidden, weight),
        "eager": lambda: eager_linear_logprobs(real_hidden, weight, real_targets),
        "torch": lambda: rf.linear_token_logprobs(hidden, weight, targets, mask=mask),
        "native": lambda: rf.linear_token_logprobs(hidden, weight, targets, mask=mask),
    }
    if provider == "compile":
        function = compiled(eager_linear_logprobs)
        call = lambda: function(real_hidden, weight, real_targets)  # noqa: E731
    else:
        call = calls[provider]
    if direction != "forward":
        leaves = [real_hidden if provider in ("matmul", "eager", "compile") else hidden, weight]
        for leaf in leaves:
            leaf.requires_grad_()
        call = backward(call, leaves)
    if provider in ("torch", "native"):
        call = on(provider, call)
    moved = (weight.numel() + hidden.numel()) * 4
    measure(
        call, group=f"linear_token_logprobs {direction} {ROWS} x {HIDDEN} x {VOCABULARY} {share:.0%} real", moved=moved
    )
