# SPDX-License-Identifier: Apache-2.0
"""linear_policy_loss in half precision: its gradients are as exact as those of the loss on linear_token_logprobs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.tools import randint, randn, upcast
from torch import Tensor

import rlhf_fast as rf
from rlhf_fast.ops.linear import tiles
from rlhf_fast.ops.token_losses import Clip, ppo

ROWS, HIDDEN, VOCABULARY = 512, 32, 1031
LOSS_SCALE = 65536.0  # GradScaler's first


class Case:
    def __init__(self, dtype: torch.dtype, generator: torch.Generator) -> None:
        self.leaves = {
            "hidden": randn(ROWS, HIDDEN, generator=generator, dtype=dtype),
            "weight": randn(VOCABULARY, HIDDEN, generator=generator, dtype=dtype, scale=0.3),
            "bias": randn(VOCABULARY, generator=generator, dtype=dtype),
        }
        self.targets = randint(VOCABULARY, ROWS, generator=generator)
        logprobs = rf.linear_token_logprobs(**self.leaves, targets=self.targets)
        self.old = logprobs + randn(ROWS, generator=generator, scale=0.3)
        self.advantages = randn(ROWS, generator=generator)
        self.mask = torch.ones(ROWS, dtype=torch.bool)

    def fused(self, leaves: dict[str, Tensor], normalizer: float, **options: Any) -> Tensor:
        return rf.linear_policy_loss(
            **leaves, targets=self.targets, old_logprobs=self.old, advantages=self.advantages, mask=self.mask,
            normalizer=normalizer, **options,
        ).loss  # fmt: skip

    def composed(self, leaves: dict[str, Tensor], normalizer: float) -> Tensor:
        logprobs = rf.linear_token_logprobs(**leaves, targets=self.targets)
        old, advantages = self.old.to(logprobs.dtype), self.advantages.to(logprobs.dtype)
        loss = ppo(logprobs.detach(), logprobs.detach() - old, advantages, Clip(0.2, 0.2, 3.0))
        return loss.differentiable(logprobs).sum() / normalizer


def gradients(call: Any, leaves: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    leaves = {k: v.detach().clone().requires_grad_() for k, v in leaves.items()}
    (call(leaves) * scale).backward()
    return {k: v.grad for k, v in leaves.items()}


def error(got: Tensor, true: Tensor) -> float:
    return float((got.double() - true).norm() / true.norm())


@pytest.mark.parametrize("backend", ["torch", "native"], indirect=True)
@pytest.mark.parametrize("block", [100, ROWS], ids=["blocks", "one_block"])
@pytest.mark.parametrize("normalizer", [1.0, float(ROWS), 5e5, 1e8])
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_as_exact_as_the_loss_on_logprobs(
    backend: str, half: torch.dtype, normalizer: float, block: int, generator: torch.Generator, monkeypatch: Any
) -> None:
    """At every normalizer, under the loss scale that GradScaler would have found for it, in the same blocks of rows."""
    monkeypatch.setattr(tiles, "CPU_ROWS", block)
    monkeypatch.setattr(tiles, "CPU_ROW_TILE", block * VOCABULARY * 2)
    monkeypatch.setattr(tiles, "CPU_MIN_ROWS", block)
    case = Case(half, generator)
    scale = LOSS_SCALE * max(1.0, 2.0 ** round(torch.log2(torch.tensor(normalizer / ROWS)).item())) / 64
    got = gradients(lambda x: case.fused(x, normalizer), case.leaves, scale)
    composed = gradients(lambda x: case.composed(x, normalizer), case.leaves, scale)
    # The truth has the half's logits, whose rounding is not the gradients'.
    true = _truth(case, normalizer, scale)
    for name, x in got.items():
        assert x.dtype == half
        assert error(x, true[name]) <= 1.1 * error(composed[name], true[name]) + 1e-5, name


def _truth(case: Case, normalizer: float, scale: float) -> dict[str, Tensor]:
    half = case.leaves["hidden"].dtype

    def call(leaves: dict[str, Tensor]) -> Tensor:
        logits = leaves["hidden"] @ leaves["weight"].t() + leaves["bias"]
        rounded = torch.addmm(case.leaves["bias"], case.leaves["hidden"], case.leaves["weight"].t())
        assert rounded.dtype == half
        logits = logits + (rounded.double() - logits).detach()
        logprobs = logits.log_softmax(-1).gather(-1, case.targets.unsqueeze(-1)).squeeze(-1)
        loss = ppo(logprobs.detach(), logprobs.detach() - case.old.double(), case.advantages.double(),
                   Clip(0.2, 0.2, 3.0))  # fmt: skip
        return loss.differentiable(logprobs).sum() / normalizer

    return gradients(call, {k: upcast(v) for k, v in case.leaves.items()}, scale)


@pytest.mark.parametrize("block", [64, ROWS], ids=["blocks", "one_block"])
def test_gradients_of_any_size_in_float16(block: int, generator: torch.Generator, monkeypatch: Any) -> None:
    """From blocks whose gradients are 1e12 times those of others, under every option; each row against float64."""
    monkeypatch.setattr(tiles, "CPU_ROW_TILE", block * VOCABULARY * 2)
    monkeypatch.setattr(tiles, "CPU_MIN_ROWS", block)
    case = Case(torch.float16, generator)
    case.advantages *= torch.logspace(-9, 3, ROWS)
    got = gradients(lambda x: case.fused(x, 1e6), case.leaves, 1.0)
    true = _truth(case, 1e6, 1.0)
    for name, x in got.items():
        assert error(x, true[name]) < 2e-3, name
    case.advantages = case.advantages.flip(0)
    got, true = gradients(lambda x: case.fused(x, 1e6), case.leaves, 1.0), _truth(case, 1e6, 1.0)
    for name, x in got.items():
        assert error(x, true[name]) < 2e-3, name


def test_an_exact_kl_and_an_entropy_bonus_in_float16(generator: torch.Generator) -> None:
    """They enter the tile beside the loss: the same gradients as in float32, at a large normalizer."""
    case = Case(torch.float16, generator)
    options = {
        "estimator": "exact", "kl_coef": 0.3, "entropy_coef": 0.1, "temperature": 0.5,
        "ref_hidden": randn(ROWS, HIDDEN, generator=generator, dtype=torch.float16),
        "ref_weight": randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float16, scale=0.3),
    }  # fmt: skip
    got = gradients(lambda x: case.fused(x, 1e6, **options), case.leaves, LOSS_SCALE)
    wide = {k: v.float() if isinstance(v, Tensor) else v for k, v in options.items()}
    true = gradients(lambda x: case.fused(x, 1e6, **wide), {k: v.float() for k, v in case.leaves.items()}, LOSS_SCALE)
    for name, x in got.items():
        assert error(x, true[name].double()) < 5e-3, name


@pytest.mark.parametrize("block", [64, ROWS], ids=["blocks", "one_block"])
def test_sums_beyond_float16(block: int, generator: torch.Generator, monkeypatch: Any) -> None:
    """All rows push the same column the same way: the scaled sum of a block exceeds 65504, the gradient does not."""
    monkeypatch.setattr(tiles, "CPU_ROW_TILE", block * VOCABULARY * 2)
    monkeypatch.setattr(tiles, "CPU_MIN_ROWS", block)
    case = Case(torch.float16, generator)
    case.targets.zero_()
    case.leaves["hidden"] += 8
    case.old = rf.linear_token_logprobs(**case.leaves, targets=case.targets)
    case.advantages = torch.ones(ROWS)
    got, true = gradients(lambda x: case.fused(x, 1e4), case.leaves, 1.0), _truth(case, 1e4, 1.0)
    for name, x in got.items():
        assert error(x, true[name]) < 2e-3, name
