# SPDX-License-Identifier: Apache-2.0
"""approx_kl (sampled estimators): values, gradient modes, clamp, importance ratio, and what they estimate."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import truths
from helpers.tolerances import ATOL, assert_gradient, assert_values
from helpers.tools import INF, NAN, incoming, randn, random_mask, upcast, with_gradients
from torch import Tensor

import rlhf_fast as rf

ESTIMATORS = ("k1", "k2", "k3", "abs")
GRADIENTS = ("value", "straight_through")


def truth(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    estimator: str,
    gradient: str = "value",
    clamp: float | None = None,
    importance_ratio: Tensor | None = None,
) -> Tensor:
    """Value of the (clamped) estimator; gradient of the unclamped estimator, or of k2 when straight-through."""
    value = truths.approx_kl(logprobs, ref_logprobs, estimator)
    carrier = truths.approx_kl(logprobs, ref_logprobs, "k2") if gradient == "straight_through" else value
    clamped = value if clamp is None else value.clamp(-clamp, clamp)
    out = clamped.detach() + (carrier - carrier.detach())
    return out if importance_ratio is None else out * importance_ratio


def check(inputs: dict[str, Tensor], **options: Any) -> None:
    dtype = inputs["logprobs"].dtype
    got, grads = with_gradients(lambda **x: rf.approx_kl(**x, **options), inputs)
    true, true_grads = with_gradients(lambda **x: truth(**x, **options), {k: upcast(v) for k, v in inputs.items()})
    eager, eager_grads = with_gradients(lambda **x: truth(**x, **options), inputs)
    assert got["out"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_values(got["out"], true["out"], eager["out"], dtype=dtype)
    for name in inputs:
        assert_gradient(grads[name], true_grads[name], eager_grads[name], dtype=dtype, what=f"gradient to {name}")


def pair(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> dict[str, Tensor]:
    logprobs = -randn(*shape, generator=generator).abs() * 2
    ref_logprobs = logprobs + randn(*shape, generator=generator)
    return {"logprobs": logprobs.to(dtype), "ref_logprobs": ref_logprobs.to(dtype)}


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 1037)], ids=str)
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_values_and_gradients(
    backend: str,
    dtype: torch.dtype,
    estimator: str,
    gradient: str,
    shape: tuple[int, int],
    generator: torch.Generator,
) -> None:
    check(pair(generator, dtype, *shape), estimator=estimator, gradient=gradient)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_importance_ratio_is_differentiated(
    backend: str, dtype: torch.dtype, estimator: str, gradient: str, generator: torch.Generator
) -> None:
    inputs = pair(generator, dtype, 3, 37)
    inputs["importance_ratio"] = (0.5 + torch.rand(3, 37, generator=generator)).to(dtype)
    check(inputs, estimator=estimator, gradient=gradient)
    check(inputs, estimator=estimator, gradient=gradient, clamp=0.3)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_clamp_limits_the_value_and_lets_the_gradient_pass(
    backend: str, dtype: torch.dtype, estimator: str, gradient: str, generator: torch.Generator
) -> None:
    """Precisely where the policy drifted most the gradient must not vanish."""
    inputs = pair(generator, dtype, 3, 37)
    check(inputs, estimator=estimator, gradient=gradient, clamp=0.25)
    got, grads = with_gradients(
        lambda **x: rf.approx_kl(**x, estimator=estimator, gradient=gradient, clamp=0.25), inputs
    )
    outside = got["out"].abs() >= 0.25
    assert bool(outside.any()) and got["out"].abs().max().item() <= 0.25 + ATOL[torch.float32]
    assert bool((grads["logprobs"][outside] != 0).all())


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_mask(backend: str, dtype: torch.dtype, estimator: str, gradient: str, generator: torch.Generator) -> None:
    """NaN in every masked slot of all three inputs and of the incoming gradient."""
    mask = random_mask(5, 37, generator=generator)
    mask[0], mask[1] = True, False
    inputs = pair(generator, dtype, 5, 37)
    inputs["importance_ratio"] = (0.5 + torch.rand(5, 37, generator=generator)).to(dtype)
    options: dict[str, Any] = {"estimator": estimator, "gradient": gradient, "clamp": 0.5}
    true, true_grads = with_gradients(
        lambda **x: torch.where(mask, truth(**x, **options), 0.0), {k: upcast(v) for k, v in inputs.items()}
    )
    leaves = {k: v.masked_fill(~mask, NAN).requires_grad_() for k, v in inputs.items()}
    out = rf.approx_kl(**leaves, **options, mask=mask)
    assert bool((out[~mask] == 0).all())
    assert_values(out, true["out"], dtype=dtype)
    weight = incoming("out", out).masked_fill(~mask, NAN)
    for name, grad in zip(leaves, torch.autograd.grad(out, list(leaves.values()), weight), strict=True):
        assert bool((grad[~mask] == 0).all()), f"{name}: the gradient of masked tokens must be exactly 0"
        assert_gradient(grad, true_grads[name], dtype=dtype, what=name)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradient_reaches_only_the_inputs_that_ask(backend: str, estimator: str, generator: torch.Generator) -> None:
    inputs = pair(generator, torch.float32, 2, 9)
    _, both = with_gradients(lambda **x: rf.approx_kl(**x, estimator=estimator), inputs)
    for name in inputs:
        rest = {k: v for k, v in inputs.items() if k != name}
        _, one = with_gradients(lambda **x: rf.approx_kl(**x, **rest, estimator=estimator), {name: inputs[name]})  # noqa: B023
        assert torch.equal(one[name], both[name])
    assert not rf.approx_kl(**inputs, estimator=estimator).requires_grad


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_layouts(backend: str, dtype: torch.dtype, estimator: str, generator: torch.Generator) -> None:
    inputs = pair(generator, dtype, 37, 5)
    check({k: v.t() for k, v in inputs.items()}, estimator=estimator)
    check({k: v[:, 1:-1] for k, v in inputs.items()}, estimator=estimator)
    mixed = {"logprobs": inputs["logprobs"].t().contiguous(), "ref_logprobs": inputs["ref_logprobs"].t()}
    check(mixed, estimator=estimator)
    row = {"logprobs": inputs["logprobs"], "ref_logprobs": inputs["ref_logprobs"][:1].expand(37, 5)}
    check(row, estimator=estimator)


def test_far_apart(backend: str) -> None:
    """k3 keeps its digits near 0 (expm1), is finite up to where exp overflows, and there +inf, not NaN."""
    tiny = torch.tensor([[1e-4, -1e-4, 1e-3]])
    got = rf.approx_kl(tiny, torch.zeros(1, 3), estimator="k3")
    true = truths.approx_kl(tiny.double(), torch.zeros(1, 3).double(), "k3")
    assert bool((got >= 0).all())
    torch.testing.assert_close(got.double(), true, rtol=2e-2, atol=1e-10)
    assert rf.approx_kl(torch.tensor([[-200.0]]), torch.zeros(1, 1), estimator="k3").item() == INF
    far = torch.tensor([[-88.5]], requires_grad=True)  # exp(88.5) is below the largest number, 2^128 above
    got = rf.approx_kl(far, torch.zeros(1, 1), estimator="k3")
    got.sum().backward()
    assert far.grad is not None
    assert got.item() == pytest.approx(math.expm1(88.5) - 88.5, rel=1e-5)
    assert far.grad.item() == pytest.approx(-math.expm1(88.5), rel=1e-5)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_empty_and_all_masked(backend: str, dtype: torch.dtype, estimator: str) -> None:
    for shape in [(0, 4), (3, 0)]:
        leaf = torch.empty(shape, dtype=dtype, requires_grad=True)
        out = rf.approx_kl(leaf, torch.empty(shape, dtype=dtype), estimator=estimator)
        assert out.shape == shape
        out.sum().backward()
    leaf = torch.full((2, 3), NAN, dtype=dtype, requires_grad=True)
    out = rf.approx_kl(leaf, leaf.detach(), estimator=estimator, mask=torch.zeros(2, 3, dtype=torch.bool))
    out.sum().backward()
    assert bool((out == 0).all()) and leaf.grad is not None and bool((leaf.grad == 0).all())


# ------------------------------------------------------------------------------- what the estimators estimate

VOCABULARY = 7


def expected(estimator: str, gradient: str, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """E_p[estimator] and E_p[its gradient to the policy's logits], exactly, beside the KL and its gradient.

    One "token" per vocabulary entry, weighed by its probability held constant: that is the mean over on-policy samples.
    """
    ref_logp = torch.log_softmax(randn(VOCABULARY, generator=generator, dtype=torch.float64), -1)
    logits = randn(VOCABULARY, generator=generator, dtype=torch.float64).requires_grad_()
    logp = torch.log_softmax(logits, -1)
    kl = (logp.exp() * (logp - ref_logp)).sum()
    (kl_gradient,) = torch.autograd.grad(kl, logits, retain_graph=True)
    with rf.use_backend("auto"):
        samples = rf.approx_kl(logp.unsqueeze(0), ref_logp.unsqueeze(0), estimator=estimator, gradient=gradient)
    estimate = (samples * logp.detach().exp()).sum()
    (estimate_gradient,) = torch.autograd.grad(estimate, logits)
    return estimate.detach(), estimate_gradient, kl.detach(), kl_gradient


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_straight_through_gradient_is_the_exact_kl_gradient(estimator: str, generator: torch.Generator) -> None:
    _, gradient, _, kl_gradient = expected(estimator, "straight_through", generator)
    torch.testing.assert_close(gradient, kl_gradient, rtol=0, atol=1e-12)


def test_values_that_are_unbiased(generator: torch.Generator) -> None:
    for estimator in ("k1", "k3"):
        estimate, _, kl, _ = expected(estimator, "value", generator)
        torch.testing.assert_close(estimate, kl, rtol=0, atol=1e-12)
    estimate, _, kl, _ = expected("k2", "value", generator)
    assert abs(estimate.item() - kl.item()) > 1e-3, "k2's value is biased; if this holds, the test lost its teeth"


def test_gradients_of_estimators_used_as_losses(generator: torch.Generator) -> None:
    """k1 as a loss teaches nothing, k2's gradient is exact, k3's is biased."""
    _, k1_gradient, _, _ = expected("k1", "value", generator)
    torch.testing.assert_close(k1_gradient, torch.zeros_like(k1_gradient), rtol=0, atol=1e-12)
    _, k2_gradient, _, kl_gradient = expected("k2", "value", generator)
    torch.testing.assert_close(k2_gradient, kl_gradient, rtol=0, atol=1e-12)
    _, k3_gradient, _, kl_gradient = expected("k3", "value", generator)
    assert (k3_gradient - kl_gradient).abs().max().item() > 1e-3


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
@pytest.mark.parametrize("gradient", ["value", "straight_through"])
def test_the_limit_of_the_log_ratio(backend: str, estimator: str, gradient: str, generator: torch.Generator) -> None:
    """Within it nothing changes; beyond it value and gradient are those of a constant, where exp would overflow."""
    d = torch.tensor([0.0, 3.0, -3.0, 20.0, -20.0, 30.0, -30.0, 200.0, -200.0, 1e4, -1e4])
    ref = randn(d.numel(), generator=generator).abs().neg().requires_grad_()
    logprobs = (ref.detach() + d).requires_grad_()
    limited = d.clamp(-20, 20)
    options = {"estimator": estimator, "gradient": gradient}
    got = rf.approx_kl(logprobs, ref, log_ratio_limit=rf.LOG_RATIO_LIMIT, **options)
    torch.testing.assert_close(got, rf.approx_kl(limited, torch.zeros_like(d), **options), rtol=1e-4, atol=1e-5)
    got.sum().backward()
    assert logprobs.grad is not None and ref.grad is not None
    assert bool(logprobs.grad.isfinite().all()) and bool((logprobs.grad[5:] == 0).all())
    torch.testing.assert_close(ref.grad, -logprobs.grad)
    inner = d[:3].clone().requires_grad_()
    rf.approx_kl(inner, torch.zeros(3), **options).sum().backward()
    torch.testing.assert_close(logprobs.grad[:3], inner.grad, rtol=1e-4, atol=1e-5)


def test_the_slope_of_abs_is_a_sign(backend: str, dtype: torch.dtype) -> None:
    """However small the difference is."""
    tiny = torch.finfo(dtype).tiny
    logprobs = torch.tensor([[tiny, -tiny, 0.0]], dtype=dtype, requires_grad=True)
    rf.approx_kl(logprobs, torch.zeros(1, 3, dtype=dtype), estimator="abs").sum().backward()
    assert logprobs.grad is not None and logprobs.grad.tolist() == [[1, -1, 0]]


def test_what_happens_where_k3_overflows(backend: str) -> None:
    """As the docstring says: infinite below d = -88.7, finite above; the other estimators are finite everywhere."""
    d = torch.tensor([-88.0, -89.0])
    assert rf.approx_kl(d, torch.zeros(2), estimator="k3").isfinite().tolist() == [True, False]
    for estimator in ("k1", "k2", "abs"):
        assert bool(rf.approx_kl(d * 1e4, torch.zeros(2), estimator=estimator).isfinite().all())


@pytest.mark.parametrize("estimator", ["k2", "k3", "abs"])
def test_nan_stays_nan_in_value_and_gradient(backend: str, estimator: str) -> None:
    """sign(NaN) is 0; k1's derivative is 1 whatever the log-ratio."""
    logprobs = torch.tensor([[1.0, float("nan"), 0.0]], requires_grad=True)
    kl = rf.approx_kl(logprobs, torch.zeros(1, 3), estimator=estimator)
    kl.sum().backward()
    assert logprobs.grad is not None
    assert torch.equal(kl.isnan(), logprobs.isnan()) and torch.equal(logprobs.grad.isnan(), logprobs.isnan())
