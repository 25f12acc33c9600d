# SPDX-License-Identifier: Apache-2.0
"""The linear family against the whole logits at once, the peers, and the bare matmul that nobody can do without.

Bytes: the weight once and the hidden states once, forward. These ops are bound by the matmul, so read the ratio to
`bare matmul`, not the share of the bandwidth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from common import Call, Case
from linear_providers import Problem, Shape, logprob_providers, policy_providers, sampled_providers

SHAPE = Shape(rows=256)
PEERS = ("F.linear_cross_entropy", "TRL", "CCE")
LOGPROBS = ("native", "eager", "bare matmul", "torch", *PEERS)
POLICY = ("native", "loss on linear_token_logprobs", "eager")


def case(
    what: str, dtype: str, share: float, providers: tuple[str, ...], calls: Callable[[Problem], dict[str, Call]],
    frozen_head: bool = False,
) -> Case:  # fmt: skip
    def build() -> dict[str, Call]:
        found = calls(Problem(SHAPE, getattr(torch, dtype), share, frozen_head))
        return {name: found[name] for name in providers if name in found}

    size = getattr(torch, dtype).itemsize
    moved = size * SHAPE.hidden * (SHAPE.vocabulary + int(share * SHAPE.rows))
    name = f"{what} {SHAPE.rows} x {SHAPE.hidden} x {SHAPE.vocabulary} {dtype} {share:.0%} real"
    return Case(name, providers, build, moved)


def cases() -> Iterator[Case]:
    both = ("float32", "bfloat16")
    for direction in ("forward", "forward + backward"):
        for dtype in both:
            for share in (1.0, 0.5):
                yield case(f"linear_token_logprobs {direction}", dtype, share, LOGPROBS,
                           lambda p, d=direction: logprob_providers(p, d))  # fmt: skip
    for dtype in both:
        yield case("frozen head", dtype, 1.0, ("native", "eager"),
                   lambda p: logprob_providers(p, "forward + backward"), frozen_head=True)  # fmt: skip
    for dtype in both:
        for share in (1.0, 0.5):
            yield case("linear_policy_loss", dtype, share, POLICY, policy_providers)
    for kept in (8, 32, 128, 256, 512):  # the break-even that DENSE_FROM in sampled.py states
        yield case(f"linear_sampled_logprobs {kept} kept", "float32", 1.0, ("native", "eager"),
                   lambda p, k=kept: sampled_providers(p, k))  # fmt: skip


CASES = list(cases())


def test_linear(compare: Callable[[Case, str], None], case: Case, provider: str) -> None:
    compare(case, provider)
