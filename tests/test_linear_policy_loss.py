# SPDX-License-Identifier: Apache-2.0
"""linear_policy_loss: loss and gradients against autograd through whole logits, the losses written as in the papers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers import truths
from helpers.tolerances import ATOL, assert_gradient, max_error
from helpers.tools import NAN, randint, randn, random_mask, scribble, upcast
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import rlhf_fast as rf
from rlhf_fast.ops.linear import tiles
from rlhf_fast.ops.token_losses import TOKEN_LOSSES

HIDDEN, VOCABULARY, ROWS = 16, 149, (4, 7)
CLIPS: dict[str, Any] = {"dual_clip": 0.3, "dapo": (0.1, 0.3), "cispo": (1.0, 0.3)}  # the others': 0.2

few_backends = pytest.mark.parametrize("backend", ["torch", "native"], indirect=True)


class Case:
    """Random inputs whose ratios lie on both sides of every clip."""

    def __init__(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> None:
        self.leaves = {
            "hidden": randn(*ROWS, HIDDEN, generator=generator, dtype=dtype),
            "weight": randn(VOCABULARY, HIDDEN, generator=generator, dtype=dtype, scale=0.4),
            "bias": randn(VOCABULARY, generator=generator, dtype=dtype),
        }
        self.targets = randint(VOCABULARY, *ROWS, generator=generator)
        self.mask = random_mask(*ROWS, generator=generator, share=0.7)
        logits = truths.linear_logits(*(upcast(x) for x in self.leaves.values()))
        logprobs = truths.token_stats(logits, self.targets)["logprobs"]
        self.old = (logprobs + randn(*ROWS, generator=generator, scale=0.6)).float()
        self.ref = (logprobs + randn(*ROWS, generator=generator, scale=0.6)).float()
        self.advantages = randn(*ROWS, generator=generator)
        self.ref_head = {
            "ref_hidden": randn(*ROWS, HIDDEN, generator=generator, dtype=dtype),
            "ref_weight": randn(VOCABULARY, HIDDEN, generator=generator, dtype=dtype, scale=0.4),
        }


def eager(
    case: Case,
    leaves: dict[str, Tensor],
    name: str = "ppo",
    clip: Any = 0.2,
    dual: float = 3.0,
    kl_coef: float = 0.0,
    estimator: str = "k2",
    kl_gradient: str = "value",
    kl_importance: bool = False,
    entropy_coef: float = 0.0,
    normalizer: Any = None,
    **shaping: Any,
) -> Tensor:
    dtype = leaves["hidden"].dtype
    wide = dtype if dtype == torch.float64 else torch.float32
    logits = truths.linear_logits(leaves["hidden"], leaves["weight"], leaves["bias"]).to(wide)
    stats = truths.token_stats(logits, case.targets, **shaping)
    logprobs, old, ref, gains = stats["logprobs"], *(x.to(wide) for x in (case.old, case.ref, case.advantages))
    loss = truths.token_loss(name, logprobs, logprobs - old, gains, clip, dual)
    if kl_coef and estimator == "exact":
        ref_logits = truths.linear_logits(*(x.to(dtype) for x in case.ref_head.values())).to(wide)
        loss = loss + kl_coef * truths.token_kl(logits, ref_logits, **shaping)
    elif kl_coef:
        kl = truths.approx_kl(logprobs, ref, estimator)
        if kl_gradient == "straight_through":
            k2 = truths.approx_kl(logprobs, ref, "k2")
            kl = kl.detach() + k2 - k2.detach()
        loss = loss + kl_coef * (kl * (logprobs - old).exp() if kl_importance else kl)
    loss = loss - entropy_coef * stats["entropy"]
    total = case.mask.sum() if normalizer is None else upcast(normalizer)
    return torch.where(case.mask, loss / total, 0.0).sum()


def ours(case: Case, leaves: dict[str, Tensor], name: str = "ppo", dual: float = 3.0, **options: Any) -> rf.PolicyLoss:
    if options.get("estimator") == "exact":
        options.update(case.ref_head)
    elif options.get("kl_coef"):
        options["ref_logprobs"] = case.ref
    return rf.linear_policy_loss(
        leaves["hidden"], leaves["weight"], case.targets, case.old, case.advantages,
        bias=leaves["bias"], mask=case.mask, objective=name, dual_clip=dual, **options,
    )  # fmt: skip


def with_gradients(call: Any, leaves: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = {k: v.detach().clone().requires_grad_() for k, v in leaves.items()}
    loss = call(leaves)
    return loss.detach(), dict(zip(leaves, torch.autograd.grad(3 * loss, list(leaves.values())), strict=True))


def check(case: Case, **options: Any) -> None:
    dtype = case.leaves["hidden"].dtype
    budget = {k: options.pop(k) for k in ("memory_budget",) if k in options}
    got, grads = with_gradients(lambda x: ours(case, x, **options, **budget).loss, case.leaves)
    high = {k: upcast(v) for k, v in options.items()}
    true, true_grads = with_gradients(lambda x: eager(case, x, **high), {k: upcast(v) for k, v in case.leaves.items()})
    low, low_grads = with_gradients(lambda x: eager(case, x, **options), case.leaves)
    scale = max(1.0, abs(true.item()))
    assert max_error(got, true) <= 2 * max_error(low, true) + ATOL[dtype] * scale
    for name in case.leaves:
        assert_gradient(grads[name], true_grads[name], low_grads[name], dtype=dtype, what=name)


@few_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_objectives(backend: str, name: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    check(Case(generator, dtype), name=name, clip=CLIPS.get(name, 0.2), dual=1.5)


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_every_option_in_float64(name: str, generator: torch.Generator) -> None:
    """Every objective with every KL, with and without an entropy bonus, to 1e-9."""
    case = Case(generator, torch.float64)
    approximate = itertools.product(("k1", "k2", "k3", "abs"), ("value", "straight_through"), (False, True))
    kinds = [{"estimator": e, "kl_gradient": g, "kl_importance": i} for e, g, i in approximate]
    for kind, entropy_coef in itertools.product([*kinds, {"estimator": "exact"}], (0.0, 0.02)):
        check(case, name=name, clip=CLIPS.get(name, 0.2), dual=1.5, kl_coef=0.1, entropy_coef=entropy_coef, **kind)


@few_backends
@pytest.mark.parametrize("options", [
    {"entropy_coef": 0.05}, {"kl_coef": 0.2, "estimator": "k3", "kl_importance": True},
    {"kl_coef": 0.2, "estimator": "k1", "kl_gradient": "straight_through"}, {"kl_coef": 0.2, "estimator": "exact"},
    {"kl_coef": 0.2, "estimator": "exact", "entropy_coef": 0.05, "temperature": 0.7, "softcap": 4.0},
    {"temperature": 0.6, "logit_scale": 0.5, "softcap": 6.0, "vocab_size": 149}, {"normalizer": 100.0},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_options(backend: str, options: dict[str, Any], dtype: torch.dtype, generator: torch.Generator) -> None:
    check(Case(generator, dtype), **options)


@few_backends
@pytest.mark.parametrize("block", [1, 3, 100])
@pytest.mark.parametrize("estimator", ["k2", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_row_blocks(
    backend: str, block: int, estimator: str, dtype: torch.dtype, generator: torch.Generator, monkeypatch: Any
) -> None:
    monkeypatch.setattr(tiles, "CPU_ROW_TILE", block * VOCABULARY * 4)
    monkeypatch.setattr(tiles, "CPU_MIN_ROWS", block)
    temperature = 0.5 + torch.rand(ROWS, generator=generator)
    check(Case(generator, dtype), memory_budget=0, kl_coef=0.1, estimator=estimator, temperature=temperature)


@few_backends
def test_normalizers(backend: str, generator: torch.Generator) -> None:
    """GRPO's mean over each sequence first, Dr. GRPO's constant, and the default."""
    case = Case(generator)
    for normalizer in (ROWS[0] * case.mask.sum(-1, keepdim=True).clamp(min=1), torch.tensor(28.0), None):
        check(case, normalizer=normalizer, kl_coef=0.1, estimator="k3")


@few_backends
def test_what_comes_back(backend: str, generator: torch.Generator) -> None:
    """Per-token outputs are those of the ops, detached; garbage in masked slots reaches nothing."""
    case = Case(generator)
    leaves = {k: v.clone().requires_grad_() for k, v in case.leaves.items()}
    clean = ours(case, leaves, kl_coef=0.1, estimator="k3")
    clean_grads = torch.autograd.grad(clean.loss, list(leaves.values()))
    stats = rf.linear_token_stats(**case.leaves, targets=case.targets, mask=case.mask)
    torch.testing.assert_close(clean.logprobs, stats.logprobs)
    torch.testing.assert_close(clean.entropy, stats.entropy)
    torch.testing.assert_close(clean.kl, rf.approx_kl(stats.logprobs, case.ref, estimator="k3", mask=case.mask))
    ratio = (stats.logprobs - case.old).exp()
    outside = torch.where(case.advantages > 0, ratio > 1.2, ratio < 0.8) & case.mask
    torch.testing.assert_close(clean.clip_fraction, outside.sum() / case.mask.sum())
    assert [x.requires_grad for x in clean if x is not None] == [True, False, False, False, False]
    for x in (case.old, case.ref, case.advantages):
        x[~case.mask] = NAN
    case.targets = scribble(case.targets, case.mask)
    with torch.no_grad():
        leaves["hidden"][~case.mask] = NAN
    dirty = ours(case, leaves, kl_coef=0.1, estimator="k3")
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    dirty_grads = torch.autograd.grad(dirty.loss, list(leaves.values()))
    assert all(torch.equal(a, b) for a, b in zip(clean_grads, dirty_grads, strict=True))


@few_backends
def test_three_matmuls_and_two_with_a_frozen_head(backend: str, generator: torch.Generator) -> None:
    case = Case(generator)
    case.mask = torch.ones(ROWS, dtype=torch.bool)

    def matmuls(*frozen: str) -> int:
        leaves = {k: v.clone().requires_grad_(k not in frozen) for k, v in case.leaves.items()}
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            ours(case, leaves).loss.backward()
        return sum(event.name in ("aten::mm", "aten::addmm", "aten::addmm_") for event in seen.events())

    assert (matmuls(), matmuls("weight")) == (3, 2)


@few_backends
def test_nothing_real_and_no_rows(backend: str, generator: torch.Generator) -> None:
    case = Case(generator)
    case.mask = torch.zeros(ROWS, dtype=torch.bool)
    loss, grads = with_gradients(lambda x: ours(case, x).loss, case.leaves)
    assert loss == 0 and all(bool((g == 0).all()) for g in grads.values())
    empty = torch.empty(0)
    out = rf.linear_policy_loss(
        torch.empty(0, HIDDEN), case.leaves["weight"], empty.long(), empty, empty, mask=empty.bool()
    )
    assert out.loss == 0 and out.clip_fraction == 0


@few_backends
def test_lora(backend: str, generator: torch.Generator) -> None:
    """The same as with the formed head, and the base gets no gradient unless it asks."""
    case = Case(generator)
    a, b = randn(3, HIDDEN, generator=generator), randn(VOCABULARY, 3, generator=generator)
    factors = {"a": a.requires_grad_(), "b": b.requires_grad_()}
    hidden = case.leaves["hidden"].clone().requires_grad_()
    out = ours(case, {**case.leaves, "hidden": hidden}, lora=(a, b, 0.5))
    formed = {**case.leaves, "hidden": hidden, "weight": case.leaves["weight"] + 0.5 * b @ a}
    true = eager(case, formed)
    torch.testing.assert_close(out.loss, true)
    inputs = [hidden, *factors.values()]
    for got, wanted in zip(torch.autograd.grad(out.loss, inputs), torch.autograd.grad(true, inputs), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["ppo", "dual_clip", "cispo"])
def test_clip_fraction(name: str, generator: torch.Generator) -> None:
    """Of the real tokens whose loss is no longer the ratio's."""
    case = Case(generator)
    logprobs = rf.linear_token_logprobs(**case.leaves, targets=case.targets)
    ratio, gains = (logprobs - case.old).exp(), case.advantages
    clipped = torch.where(gains > 0, ratio > 1.2, ratio < 0.8)
    if name == "dual_clip":
        assert bool(((gains < 0) & (ratio > 1.1) & case.mask).any())
        clipped |= (gains < 0) & (ratio > 1.1)
    elif name == "cispo":
        clipped = (ratio > 1.2) | (ratio < 0.8)
    got = ours(case, case.leaves, name, dual=1.1).clip_fraction
    torch.testing.assert_close(got, (clipped & case.mask).sum() / case.mask.sum())


@few_backends
def test_the_gradient_of_the_loss_itself(backend: str, generator: torch.Generator) -> None:
    """backward() brings a 1, by which nothing is multiplied; a third of it is a third."""
    case = Case(generator)
    grads = []
    for factor in (1.0, 1 / 3):
        leaves = {k: v.detach().clone().requires_grad_() for k, v in case.leaves.items()}
        (factor * ours(case, leaves).loss).backward()
        grads.append({k: v.grad for k, v in leaves.items()})
    for name, whole in grads[0].items():
        assert whole is not None and whole.abs().max() > 0
        torch.testing.assert_close(3 * grads[1][name], whole)


@few_backends
def test_a_second_backward_raises(backend: str, generator: torch.Generator) -> None:
    case = Case(generator)
    leaves = {k: v.clone().requires_grad_() for k, v in case.leaves.items()}
    loss = ours(case, leaves).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="linear_policy_loss: a second backward"):
        loss.backward()
