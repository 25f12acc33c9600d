# SPDX-License-Identifier: Apache-2.0
"""Autograd's other doors: what an op cannot do there it refuses in our words, and never answers wrongly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.samples import SAMPLES, Sample, build
from helpers.tools import named_outputs
from torch import Tensor
from torch.autograd import forward_ad

import rlhf_fast as rf

DIFFERENTIABLE = [name for name in SAMPLES if build(name, torch.float32).differentiable]
CONSTANT = [name for name in SAMPLES if name not in DIFFERENTIABLE]  # no gradient, by contract
every_differentiable_sample = pytest.mark.parametrize("name", DIFFERENTIABLE)
on_two_backends = pytest.mark.parametrize("backend", ["torch", "native"], indirect=True)  # the dispatcher's side is one


def first_output(sample: Sample, which_input: int = 0) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The op's first differentiable output (or the first) as a function of one of its inputs."""
    name, x = list(sample.inputs.items())[which_input]
    leaves = {**sample.inputs, name: x.clone().requires_grad_()}
    outputs = named_outputs(sample.call(**leaves))
    which = next((k for k, v in outputs.items() if v.requires_grad), next(iter(outputs)))
    return lambda value: named_outputs(sample.call(**{**sample.inputs, name: value}))[which], x


def dual(f: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


FORWARD_MODE: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "make_dual": dual,
    "make_dual_no_grad": lambda f, x: torch.no_grad()(dual)(f, x),
}
REVERSE_MODE: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x),
    "vmap_of_grad": lambda f, x: torch.vmap(torch.func.grad(lambda x: f(x).sum()))(torch.stack([x, x])),
    "hessian": lambda f, x: torch.func.hessian(lambda x: f(x).sum())(x),
}


@on_two_backends
@every_differentiable_sample
@pytest.mark.parametrize("mode", FORWARD_MODE)
def test_forward_mode_is_refused(backend: str, name: str, mode: str) -> None:
    """Without a word it gave tangents of 0."""
    sample = build(name, torch.float32)
    f, x = first_output(sample)
    with pytest.raises(NotImplementedError, match=rf"^rlhf_fast\.{sample.op}: forward-mode .* not supported; use "):
        FORWARD_MODE[mode](f, x)


@on_two_backends
@every_differentiable_sample
@pytest.mark.parametrize("mode", REVERSE_MODE)
def test_functional_gradients_are_refused(backend: str, name: str, mode: str) -> None:
    sample = build(name, torch.float32)
    f, x = first_output(sample)
    with pytest.raises(NotImplementedError, match=rf"^rlhf_fast\.{sample.op}: .* not supported; use "):
        REVERSE_MODE[mode](f, x)


@on_two_backends
@pytest.mark.parametrize("name", CONSTANT)
@pytest.mark.parametrize("mode", [*FORWARD_MODE, *REVERSE_MODE])
def test_what_has_no_gradient_is_refused_too(backend: str, name: str, mode: str) -> None:
    """Advantages are constants; as functions of their inputs they would have derivatives of 0 without a word."""
    sample = build(name, torch.float32)
    for which in range(len(sample.inputs)):
        f, x = first_output(sample, which)
        with pytest.raises(NotImplementedError, match=rf"^rlhf_fast\.{sample.op}: .* not supported; .* constants"):
            {**FORWARD_MODE, **REVERSE_MODE}[mode](f, x)


@pytest.mark.parametrize("name", CONSTANT)
def test_what_has_no_gradient_is_a_constant_to_autograd(backend: str, name: str) -> None:
    sample = build(name, torch.float32)
    outputs = named_outputs(sample.call(**{k: v.clone().requires_grad_() for k, v in sample.inputs.items()}))
    assert not any(x.requires_grad for x in outputs.values())
    f, x = first_output(sample)
    detached = torch.func.grad(lambda x: (x * 2).sum() + f(x.detach()).sum())(x)  # as the message says
    assert torch.equal(detached, torch.full_like(x, 2))


def test_a_constant_inside_a_transform_is_served(backend: str) -> None:
    """Only what carries a tangent, or needs a gradient, is refused."""
    logits, targets, ones = torch.randn(3, 7), torch.arange(3), torch.ones(3)
    wanted = rf.token_logprobs(logits, targets)
    values, tangents = torch.func.jvp(lambda x: x * rf.token_logprobs(logits, targets), (ones,), (ones,))
    assert torch.equal(values, wanted) and torch.equal(tangents, wanted)
    assert torch.equal(torch.func.grad(lambda x: (x * rf.token_logprobs(logits, targets)).sum())(ones), wanted)


@on_two_backends
@pytest.mark.parametrize("name", [n for n in SAMPLES if not n.startswith("linear_policy")])
def test_vmap_gives_what_a_loop_gives(backend: str, name: str) -> None:
    sample = build(name, torch.float32)
    stacked = {k: torch.stack([v, v.flip(0), v * 0.5]) for k, v in sample.inputs.items()}
    wanted = [named_outputs(sample.call(**{k: v[i] for k, v in stacked.items()})) for i in range(3)]
    got = named_outputs(torch.vmap(lambda x: sample.call(**x), in_dims=({k: 0 for k in stacked},))(stacked))
    for key in got:
        torch.testing.assert_close(got[key], torch.stack([w[key] for w in wanted]), rtol=0, atol=0, equal_nan=True)


def test_vmap_over_targets_and_masks(backend: str) -> None:
    """What is looked at on a CPU cannot be looked at there."""
    logits, targets, mask = torch.randn(2, 3, 7), torch.randint(7, (2, 3)), torch.rand(2, 3) < 0.5
    temperature = torch.rand(2, 3) + 0.5
    got = torch.vmap(lambda x, t, m, h: rf.token_logprobs(x, t, mask=m, temperature=h))(
        logits, targets, mask, temperature
    )
    assert torch.equal(got, rf.token_logprobs(logits, targets, mask=mask, temperature=temperature))


@on_two_backends
@every_differentiable_sample
def test_a_batch_of_gradients_is_right_or_refused(backend: str, name: str) -> None:
    sample = build(name, torch.float32)
    f, x = first_output(sample)
    leaf = x.clone().requires_grad_()
    out = f(leaf)
    grads = torch.stack([torch.ones_like(out), torch.rand_like(out)])
    try:
        (got,) = torch.autograd.grad(out, leaf, grads, is_grads_batched=True)
    except NotImplementedError as error:
        assert (
            sample.op.startswith("linear_")
            and str(error).startswith(f"rlhf_fast.{sample.op}: ")
            and "once for each" in str(error)
        )
        return
    for i, grad in enumerate(grads):
        leaf = x.clone().requires_grad_()
        (wanted,) = torch.autograd.grad(f(leaf), leaf, grad)
        torch.testing.assert_close(got[i], wanted, rtol=1e-6, atol=1e-7)


# ----------------------------------------------------------------------------------------------- saved tensors


class _Identity(torch.autograd.graph.saved_tensors_hooks):
    def __init__(self) -> None:
        super().__init__(lambda x: x, lambda x: x)


HOOKS: dict[str, Callable[[], Any]] = {"save_on_cpu": torch.autograd.graph.save_on_cpu, "identity": _Identity}


@pytest.mark.parametrize("hooks", HOOKS)
@every_differentiable_sample
def test_two_backwards_under_saved_tensor_hooks(backend: str, name: str, hooks: str) -> None:
    """Where hooks unpack what was saved, autograd no longer sees that it was overwritten."""
    sample = build(name, torch.float32)
    leaves = {k: v.clone().requires_grad_() for k, v in sample.inputs.items()}
    plain = sum(x.sum() for x in named_outputs(sample.call(**leaves)).values() if x.requires_grad)
    wanted = torch.autograd.grad(plain, list(leaves.values()))
    with HOOKS[hooks]():
        loss = sum(x.sum() for x in named_outputs(sample.call(**leaves)).values() if x.requires_grad)
    first = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, wanted, strict=True))
    try:
        second = torch.autograd.grad(loss, list(leaves.values()))
    except RuntimeError as error:
        assert str(error).startswith("rlhf_fast.") and "second backward" in str(error)
        return
    assert all(torch.equal(a, b) for a, b in zip(second, wanted, strict=True))


def test_inplace_backward_on_views_of_one_tensor_says_what_to_do(backend: str) -> None:
    logits = torch.randn(4, 7, requires_grad=True) * 1
    parts = [rf.token_logprobs(x, torch.arange(2), inplace_backward=True) for x in logits.split(2)]
    with pytest.raises(RuntimeError, match=r"^rlhf_fast\.token_logprobs: .*split\(n\).*whole"):
        torch.cat(parts).sum().backward()


@every_differentiable_sample
def test_constants_made_under_inference_mode(backend: str, name: str) -> None:
    """A rollout's tensors are often made there; autograd would refuse to save them."""
    sample = build(name, torch.float32)
    first, *others = sample.inputs
    leaf = sample.inputs[first].clone().requires_grad_()
    outputs = named_outputs(sample.call(**{**sample.inputs, first: leaf}))
    (wanted,) = torch.autograd.grad(sum(x.sum() for x in outputs.values() if x.requires_grad), leaf)
    with torch.inference_mode():
        constants = {k: sample.inputs[k].clone() for k in others}
    outputs = named_outputs(sample.call(**{first: leaf}, **constants))
    (got,) = torch.autograd.grad(sum(x.sum() for x in outputs.values() if x.requires_grad), leaf)
    assert torch.equal(got, wanted)


def test_targets_masks_and_temperatures_made_under_inference_mode(backend: str) -> None:
    with torch.inference_mode():
        options = {"mask": torch.tensor([True, False, True]), "temperature": torch.tensor([0.5, 1.0, 2.0])}
        targets, ref_logits = torch.arange(3), torch.randn(3, 7)
    logits = torch.randn(3, 7, requires_grad=True)
    total = rf.token_logprobs(logits, targets, **options).sum() + rf.token_kl(logits, ref_logits, **options).sum()
    total.backward()
    assert logits.grad is not None and bool(logits.grad[0].any()) and not bool(logits.grad[1].any())
