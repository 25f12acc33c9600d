# SPDX-License-Identifier: Apache-2.0
"""The linear family against the whole logits at once, the peers, and the bare matmul that nobody can do without.

Bytes: the weight once and the hidden states once, forward. These ops are bound by the matmul, so read the ratio to
`bare matmul`, not the share of the bandwidth. The reference in PyTorch is not timed: it is slow, and nobody's rival.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import Call, Case
from linear_providers import Problem, Shape, logprob_providers, policy_providers, sampled_providers

SHAPE = Shape(rows=1024)
SAMPLED = Shape(rows=256)  # a gather costs the same for every row: fewer rows tell as much
PROVIDERS = ("native", "eager", "bare matmul", "F.linear_cross_entropy", "TRL", "CCE")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HALVES = (1.0, 0.5)


def case(
    op: str,
    dtype: str,
    share: float,
    providers: tuple[str, ...],
    make: Callable[[Problem], dict[str, Call]],
    shape: Shape = SHAPE,
    frozen_head: bool = False,
) -> Case:
    def build() -> dict[str, Call]:
        calls = make(Problem(shape, DTYPES[dtype], share, frozen_head))
        return {name: calls[name] for name in providers if name in calls}

    size = DTYPES[dtype].itemsize
    moved = int(shape.vocabulary + share * shape.rows) * shape.hidden * size
    name = f"{op} {shape.rows} x {shape.hidden} x {shape.vocabulary} {dtype} {share:.0%} real"
    return Case(name, providers, build, moved)


def logprobs(direction: str, dtype: str, share: float) -> Case:
    op = f"linear_token_logprobs {direction}"
    return case(op, dtype, share, PROVIDERS, lambda p: logprob_providers(p, direction))


def frozen_head(dtype: str) -> Case:
    make = lambda p: logprob_providers(p, "forward + backward")  # noqa: E731
    return case("frozen head", dtype, 1.0, ("native", "eager"), make, frozen_head=True)


def policy_loss(dtype: str, share: float) -> Case:
    providers = ("native", "loss on linear_token_logprobs", "eager")
    return case("linear_policy_loss", dtype, share, providers, policy_providers)


def sampled(kept: int) -> Case:
    """The break-even that `DENSE_FROM` in sampled.py states."""
    op = f"linear_sampled_logprobs {kept} kept"
    return case(op, "float32", 1.0, ("native", "eager"), lambda p: sampled_providers(p, kept), SAMPLED)


CASES = [
    *(logprobs(d, dtype, share) for d in ("forward", "forward + backward") for dtype in DTYPES for share in HALVES),
    *(frozen_head(dtype) for dtype in DTYPES),
    *(policy_loss(dtype, share) for dtype in DTYPES for share in HALVES),
    *(sampled(kept) for kept in (8, 32, 128, 256, 512)),
]


def test_linear(compare: Callable[[Case, str], None], case: Case, provider: str) -> None:
    compare(case, provider)
