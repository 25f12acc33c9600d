# SPDX-License-Identifier: Apache-2.0
"""Losses stay finite and right however far the log-ratio is, alone and in linear_policy_loss."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from helpers import truths
from helpers.tools import INF
from torch import Tensor

import rlhf_fast as rf
from rlhf_fast.ops import codes
from rlhf_fast.ops.token_losses import TOKEN_LOSSES, Clip, importance_ratio, kl_estimate, sequence_log_ratio

LOG_RATIOS = (0.0, 1.0, -1.0, 20.0, -20.0, 100.0, -100.0, 1e4, -1e4)
ADVANTAGES = (-1.0, -0.0, 0.0, 1e-30, 1e4)
MASKED = tuple(itertools.product((INF, -INF), ADVANTAGES))  # log-ratios that only masked slots hold
PAIRS = (*itertools.product(LOG_RATIOS, ADVANTAGES), *MASKED)
CLIP, DUAL, HIDDEN, VOCABULARY = (0.2, 0.3), 3.0, 8, 37


def truth(name: str, logprobs: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    """Each token's loss for autograd, in the papers' form with the log-ratio clamped."""
    log_ratio = (logprobs - old).clamp(-rf.LOG_RATIO_LIMIT, rf.LOG_RATIO_LIMIT)
    return truths.token_loss(name, logprobs, log_ratio, advantages, CLIP, DUAL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_finite_and_equal_to_autograd(name: str, dtype: torch.dtype) -> None:
    ratios, advantages = (torch.tensor(x, dtype=dtype) for x in zip(*PAIRS[: -len(MASKED)], strict=True))
    old = torch.full_like(ratios, -2.0)
    got = TOKEN_LOSSES[name](old + ratios, ratios, advantages, Clip(*CLIP, DUAL))
    leaf = (old + ratios).double().requires_grad_()
    true = truth(name, leaf, old.double(), advantages.double())
    (slope,) = torch.autograd.grad(true.sum(), leaf)
    torch.testing.assert_close(got.loss.double(), true.detach(), rtol=1e-4, atol=0)
    torch.testing.assert_close(got.slope.double(), slope, rtol=1e-4, atol=0)
    nothing = advantages == 0
    assert bool((got.loss[nothing] == 0).all()) and bool((got.slope[nothing] == 0).all())


def test_a_forbidden_token_without_advantage_gives_nothing() -> None:
    """A log-probability of -inf times an advantage of 0 is 0 in every loss."""
    for name, loss in TOKEN_LOSSES.items():
        got = loss(torch.tensor([-INF]), torch.tensor([-INF]), torch.tensor([0.0]), Clip(*CLIP, DUAL))
        assert got.loss.item() == 0 and got.slope.item() == 0, name


@pytest.mark.parametrize("gradient", codes.GRADIENTS)
@pytest.mark.parametrize("estimator", codes.ESTIMATORS)
def test_the_kl_in_the_loss(estimator: str, gradient: str) -> None:
    """approx_kl's value and gradient as far as they go; beyond the limit finite, and still pulling back."""
    d = torch.tensor(LOG_RATIOS, requires_grad=True)
    value, slope = kl_estimate(d.detach(), torch.zeros_like(d), codes.ESTIMATORS[estimator], codes.GRADIENTS[gradient])
    assert bool(value.isfinite().all()) and bool(slope.isfinite().all())
    near = d.detach().abs() <= rf.LOG_RATIO_LIMIT
    exact = rf.approx_kl(d, torch.zeros_like(d), estimator=estimator, gradient=gradient)
    (exact_slope,) = torch.autograd.grad(exact[near].sum(), d)
    torch.testing.assert_close(value[near], exact[near].detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(slope[near], exact_slope[near], rtol=1e-5, atol=0)
    if estimator == "k3" and gradient == "value":
        assert slope[LOG_RATIOS.index(-1e4)].item() == pytest.approx(-math.expm1(20), rel=1e-5)
    if estimator != "k1" or gradient == "straight_through":  # the gradient of k1 is 1 everywhere
        assert bool((slope[~near] * d[~near] > 0).all())


def test_importance_ratio_differentiates_as_a_clamp() -> None:
    leaf = torch.tensor(LOG_RATIOS, requires_grad=True)
    ratio = importance_ratio(leaf)
    assert ratio.max().item() == pytest.approx(math.exp(20), rel=1e-5) and ratio.min().item() > 0
    (slope,) = torch.autograd.grad(ratio.sum(), leaf)
    torch.testing.assert_close(slope, torch.where(leaf.detach().abs() > 20, 0.0, ratio.detach()))


@pytest.mark.parametrize("mean", [True, False])
def test_sequence_log_ratio(mean: bool, generator: torch.Generator) -> None:
    """One ratio a sequence, by a loop over sequences; what masked slots hold reaches nothing."""
    logprobs, old = (torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    logprobs[~mask], old[~mask] = INF, -INF
    leaf = logprobs.clone().requires_grad_()
    got = sequence_log_ratio(leaf, old, mask, mean=mean)
    for b in range(3):
        real = (logprobs[b] - old[b])[mask[b]]
        wanted = (real.mean() if mean else real.sum()) if len(real) else torch.tensor(0.0).double()
        torch.testing.assert_close(got[b].detach(), torch.where(mask[b], wanted, 0.0))
    (grad,) = torch.autograd.grad(got[2, 0], leaf)
    torch.testing.assert_close(grad[2], torch.full((5,), 0.2 if mean else 1.0, dtype=torch.float64))
    assert not grad[:2].any()


KLS: tuple[dict[str, Any], ...] = (
    {},
    {"estimator": "k3", "kl_coef": 0.5},
    {"estimator": "k3", "kl_coef": 0.5, "kl_importance": True},
    {"estimator": "k2", "kl_coef": 0.5, "kl_importance": True},
)


@pytest.mark.parametrize("backend", ["torch", "native", "native:default", "triton", "emulated"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["ppo", "dual_clip", "cispo"])
def test_the_fused_loss(backend: str, dtype: torch.dtype, name: str, generator: torch.Generator) -> None:
    """A token's gradient in hidden is its own row: each one is finite and equal to autograd's in float64."""
    n = len(PAIRS)
    ratios, advantages = (torch.tensor(x) for x in zip(*PAIRS, strict=True))
    mask = ratios.isfinite()
    hidden = torch.randn(n, HIDDEN, generator=generator).to(dtype)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator).to(dtype)
    targets = torch.randint(VOCABULARY, (n,), generator=generator)
    logits = rf.linear_token_logprobs(hidden, weight, targets)  # in this backend's own rounding
    old = logits - ratios
    for kl in KLS:
        leaf = hidden.clone().requires_grad_()
        got = rf.linear_policy_loss(
            leaf, weight, targets, old, advantages, mask=mask, objective=name, clip=CLIP, dual_clip=DUAL,
            ref_logprobs=old - 0.5 if kl else None, normalizer=1.0, **kl,
        )  # fmt: skip
        (grad,) = torch.autograd.grad(got.loss, leaf)
        true = _true_gradient(name, kl, hidden, weight, targets, old, advantages, mask)
        at_the_limit = (ratios.abs() - rf.LOG_RATIO_LIMIT).abs() < 1e-3  # rounding decides on which side they are
        # a float16 gradient beyond its largest number is inf, as GradScaler expects
        representable = (true.abs() < torch.finfo(dtype).max / 2) & ~at_the_limit[:, None]
        assert got.loss.isfinite() and bool(grad.isfinite()[representable].all()) and not grad.isnan().any()
        scale = true.abs().amax(-1, keepdim=True)
        if dtype == torch.float16:  # one power of two scales all rows: beside 1e12 times larger ones a row vanishes
            scale = scale.amax()
        grad, true = (torch.where(representable, x, 0.0) for x in (grad, true))
        error = (grad.double() - true).abs() - (1e-3 if dtype == torch.float32 else 2e-2) * scale
        assert bool((error <= 0)[~at_the_limit].all()), (kl, error.argmax() // HIDDEN)


def _true_gradient(
    name: str, kl: dict[str, Any], hidden: Tensor, weight: Tensor, targets: Tensor, old: Tensor, advantages: Tensor,
    mask: Tensor,
) -> Tensor:  # fmt: skip
    leaf = hidden.double().requires_grad_()
    logits = leaf @ weight.double().t()
    logits = logits + (logits.to(hidden.dtype) - logits).detach()  # rounded as a model's head rounds them
    logprobs = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    old = torch.where(mask, old, 0.0).double()
    loss = truth(name, logprobs, old, advantages.double())
    if kl:
        d = logprobs - old + 0.5
        if kl["estimator"] == "k3":
            near = d.clamp(-rf.LOG_RATIO_LIMIT)
            value = (-near).expm1() + d
            value = value + (near.detach() - d.detach()).sign() * (d - d.detach()) * -(-near.detach()).exp()
        else:
            value = 0.5 * d * d
        if kl.get("kl_importance"):
            value = value * (logprobs - old).clamp(-rf.LOG_RATIO_LIMIT, rf.LOG_RATIO_LIMIT).exp()
        loss = loss + kl["kl_coef"] * value
    (grad,) = torch.autograd.grad(torch.where(mask, loss, 0.0).sum(), leaf)
    return grad
