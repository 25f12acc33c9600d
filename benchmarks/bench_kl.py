# SPDX-License-Identifier: Apache-2.0
"""token_kl (bytes: both logits once; backward reads both again and writes one) and approx_kl (two in, one out)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from common import PROVIDERS, Call, Case, backward, compiled, eager_kl, on, versus
from torch import Tensor

import rlhf_fast as rf


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def forward(rows: int, width: int) -> Case:
    name = f"token_kl reverse forward {rows} x {width} float32"
    return Case(name, PROVIDERS, lambda: versus(rf.token_kl, eager_kl, *pair(rows, width)), 2 * rows * width * 4)


def forward_backward(rows: int, width: int) -> Case:
    def build() -> dict[str, Call]:
        logits, ref_logits = pair(rows, width)
        logits.requires_grad_()
        weights = torch.full((rows,), 1 / rows)
        compile_ = compiled(eager_kl)
        return {
            "native": on("native", backward(lambda: rf.token_kl(logits, ref_logits), [logits])),
            "native, token_kl_and_grad": on("native", partial(rf.token_kl_and_grad, logits, ref_logits, weights)),
            "eager": backward(lambda: eager_kl(logits, ref_logits), [logits]),
            "compile": backward(lambda: compile_(logits, ref_logits), [logits]),
        }

    name = f"token_kl reverse forward + backward {rows} x {width} float32"
    return Case(name, ("native", "eager", "compile", "native, token_kl_and_grad"), build, 5 * rows * width * 4)


def eager_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    return logprobs - ref_logprobs


def eager_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    d = ref_logprobs - logprobs
    return d.exp() - 1 - d


def estimated(estimator: str, eager: Callable[..., Tensor], rows: int, length: int) -> Case:
    ours = partial(rf.approx_kl, estimator=estimator)
    name = f"approx_kl {estimator} {rows} x {length} float32"
    return Case(name, PROVIDERS, lambda: versus(ours, eager, *pair(rows, length)), 3 * rows * length * 4)


CASES = [
    forward(512, 49152),
    forward(64, 1000),
    forward_backward(256, 49152),
    estimated("k1", eager_k1, 64, 1024),
    estimated("k3", eager_k3, 64, 1024),
]


def test_kl(compare: Callable[[Case, str], None], case: Case, provider: str) -> None:
    compare(case, provider)
