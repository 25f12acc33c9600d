# SPDX-License-Identifier: Apache-2.0
"""The linear family against the whole logits at once, the peers, and the bare matmul that nobody can do without.

Bytes: the weight once and the hidden states once, forward. These ops are bound by the matmul, so read the ratio to
`bare matmul`, not the share of the bandwidth.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from linear_providers import Problem, Shape, logprob_providers, policy_providers, sampled_providers

SHAPE = Shape(rows=256)
PROVIDERS = ("bare matmul", "eager", "torch", "native", "F.linear_cross_entropy", "TRL", "CCE")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

masks = pytest.mark.parametrize("share", [1.0, 0.5], ids=["all_rows", "half_masked"])
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def name(op: str, dtype: str, share: float) -> str:
    return f"{op} {SHAPE.rows} x {SHAPE.hidden} x {SHAPE.vocabulary} {dtype} {share:.0%} real"


@masks
@dtypes
@pytest.mark.parametrize("direction", ["forward", "forward + backward"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_linear_token_logprobs(
    measure: Callable[..., None], provider: str, direction: str, dtype: str, share: float
) -> None:
    problem = Problem(SHAPE, DTYPES[dtype], share)
    calls = logprob_providers(problem, direction)
    if provider not in calls:
        pytest.skip(f"{provider} is not installed")
    group = name(f"linear_token_logprobs {direction}", dtype, share)
    measure(calls[provider], group=group, moved=problem.bytes)


@dtypes
@pytest.mark.parametrize("provider", ["native", "eager"])
def test_frozen_head(measure: Callable[..., None], provider: str, dtype: str) -> None:
    problem = Problem(SHAPE, DTYPES[dtype], 1.0, frozen_head=True)
    calls = logprob_providers(problem, "forward + backward")
    measure(calls[provider], group=name("frozen head", dtype, 1.0), moved=problem.bytes)


@masks
@dtypes
@pytest.mark.parametrize("provider", ["native", "loss on linear_token_logprobs", "eager"])
def test_linear_policy_loss(measure: Callable[..., None], provider: str, dtype: str, share: float) -> None:
    problem = Problem(SHAPE, DTYPES[dtype], share)
    measure(policy_providers(problem)[provider], group=name("linear_policy_loss", dtype, share), moved=problem.bytes)


@pytest.mark.parametrize("kept", [8, 32, 128, 512])
@pytest.mark.parametrize("provider", ["native", "eager"])
def test_linear_sampled_logprobs(measure: Callable[..., None], provider: str, kept: int) -> None:
    """The break-even that `DENSE_FROM` in sampled.py states."""
    problem = Problem(SHAPE, torch.float32, 1.0)
    group = name(f"linear_sampled_logprobs {kept} kept", "float32", 1.0)
    measure(sampled_providers(problem, kept)[provider], group=group, moved=problem.bytes)
