# SPDX-License-Identifier: Apache-2.0
"""token_logprobs and token_stats: values and gradients of every option against float64 truth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import truths
from helpers.tolerances import assert_gradient, assert_values
from helpers.tools import (
    HALF,
    LAYOUTS,
    NAN,
    incoming,
    named_outputs,
    randint,
    randn,
    random_mask,
    scribble,
    upcast,
    with_gradients,
)
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import rlhf_fast as rf

ALL_OUTPUTS = ("logprobs", "entropy", "logsumexp", "sum_sq_probs", "argmax")
DIFFERENTIABLE = ("logprobs", "entropy", "logsumexp")

# One column; below, at and past a vector register; odd; several blocks of any plausible size with a ragged end.
WIDTHS = (1, 3, 17, 127, 1000, 4099)

ROWS = (2, 3)


def check_stats(logits: Tensor, targets: Tensor, outputs: tuple[str, ...] = ALL_OUTPUTS, **options: Any) -> None:
    """token_stats here: every asked output, and the gradient of each differentiable one, alone and together."""
    dtype = logits.dtype
    true_options = {k: upcast(v) for k, v in options.items()}
    subsets = [(n,) for n in outputs if n in DIFFERENTIABLE] + [tuple(n for n in outputs if n in DIFFERENTIABLE)]

    def ours(logits: Tensor) -> Any:
        return rf.token_stats(logits, targets, outputs=outputs, **options)

    for subset in subsets:
        got, grads = with_gradients(ours, {"logits": logits}, grads_of=subset)
        true, true_grads = with_gradients(
            lambda logits: truths.token_stats(logits, targets, **true_options),
            {"logits": logits.double()},
            grads_of=subset,
        )
        eager, eager_grads = with_gradients(
            lambda logits: truths.token_stats(logits, targets, **options), {"logits": logits}, grads_of=subset
        )
        assert_gradient(
            grads["logits"], true_grads["logits"], eager_grads["logits"], dtype=dtype, what=f"gradient of {subset}"
        )
    assert set(got) == set(outputs)
    for name in outputs:
        if name == "argmax":
            assert got[name].dtype == torch.int64
            assert torch.equal(got[name], true[name]), "argmax"
        else:
            assert got[name].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert_values(got[name], true[name], eager[name], dtype=dtype, what=name)


@pytest.mark.parametrize("width", WIDTHS)
def test_values_and_gradients(backend: str, dtype: torch.dtype, width: int, generator: torch.Generator) -> None:
    logits = randn(*ROWS, width, generator=generator, dtype=dtype, scale=3)
    check_stats(logits, randint(width, *ROWS, generator=generator))


@pytest.mark.parametrize("width", WIDTHS)
def test_token_logprobs_is_the_logprobs_of_token_stats(
    backend: str, dtype: torch.dtype, width: int, generator: torch.Generator
) -> None:
    logits = randn(*ROWS, width, generator=generator, dtype=dtype, scale=3)
    targets = randint(width, *ROWS, generator=generator)
    alone, grads = with_gradients(lambda logits: rf.token_logprobs(logits, targets), {"logits": logits})
    true, true_grads = with_gradients(
        lambda logits: truths.token_stats(logits, targets)["logprobs"], {"logits": logits.double()}
    )
    _, eager_grads = with_gradients(lambda logits: truths.token_stats(logits, targets)["logprobs"], {"logits": logits})
    assert_values(alone["out"], true["out"], dtype=dtype)
    assert_gradient(grads["logits"], true_grads["logits"], eager_grads["logits"], dtype=dtype)
    both = rf.token_stats(logits, targets)
    assert set(named_outputs(both)) == {"logprobs", "entropy"}, "the default outputs"
    torch.testing.assert_close(alone["out"], both.logprobs, rtol=0, atol=1e-6)


OPTIONS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.7},
    "temperature_high": {"temperature": 3.0},
    "logit_scale": {"logit_scale": 0.25},
    "negative_scale": {"logit_scale": -0.8},
    "softcap": {"softcap": 4.0},
    "negative_scale_softcap": {"logit_scale": -0.8, "softcap": 4.0},
    "vocab_size": {"vocab_size": 119},
    "all": {"temperature": 1.7, "logit_scale": 2.5, "softcap": 6.0, "vocab_size": 97},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(backend: str, dtype: torch.dtype, name: str, generator: torch.Generator) -> None:
    options = OPTIONS[name]
    logits = randn(*ROWS, 127, generator=generator, dtype=dtype, scale=3)
    check_stats(logits, randint(options.get("vocab_size", 127), *ROWS, generator=generator), **options)


@pytest.mark.parametrize("name", OPTIONS)
def test_options_in_token_logprobs(backend: str, name: str, generator: torch.Generator) -> None:
    options = OPTIONS[name]
    logits = randn(*ROWS, 127, generator=generator, scale=3)
    targets = randint(options.get("vocab_size", 127), *ROWS, generator=generator)
    got, grads = with_gradients(lambda logits: rf.token_logprobs(logits, targets, **options), {"logits": logits})
    true, true_grads = with_gradients(
        lambda logits: truths.token_stats(logits, targets, **options)["logprobs"], {"logits": logits.double()}
    )
    assert_values(got["out"], true["out"], dtype=torch.float32)
    assert_gradient(grads["logits"], true_grads["logits"], dtype=torch.float32)


@pytest.mark.parametrize("temperature", ["rows", "zero_dim", "rows_half", "expanded"])
def test_temperature_tensor(backend: str, dtype: torch.dtype, temperature: str, generator: torch.Generator) -> None:
    logits = randn(*ROWS, 127, generator=generator, dtype=dtype, scale=3)
    rows = 0.5 + torch.rand(ROWS, generator=generator)
    tensor = {
        "rows": rows.to(dtype) if dtype == torch.float64 else rows,
        "zero_dim": torch.tensor(0.7),
        "rows_half": rows.bfloat16(),
        "expanded": rows[:, :1].expand(ROWS),
    }[temperature]
    check_stats(logits, randint(127, *ROWS, generator=generator), temperature=tensor, softcap=8.0)


def test_temperature_near_zero(backend: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Towards the argmax: log-probs of thousands of nats keep their digits, gradients stay finite."""
    logits = randn(*ROWS, 127, generator=generator, dtype=dtype, scale=3)
    targets = torch.where(torch.arange(3) > 0, randint(127, *ROWS, generator=generator), logits.argmax(-1))
    got, grads = with_gradients(lambda logits: rf.token_stats(logits, targets, temperature=1e-3), {"logits": logits})
    true, true_grads = with_gradients(
        lambda logits: truths.token_stats(logits, targets, temperature=1e-3),
        {"logits": logits.double()},
        grads_of=("logprobs", "entropy"),
    )
    torch.testing.assert_close(got["logprobs"].double(), true["logprobs"], rtol=5e-7, atol=1e-4)
    torch.testing.assert_close(got["entropy"].double(), true["entropy"], rtol=1e-3, atol=1e-4)
    scale = true_grads["logits"].abs().max().item()
    assert (grads["logits"].double() - true_grads["logits"]).abs().max().item() <= 4e-3 * scale


def test_temperature_is_not_differentiated(backend: str, generator: torch.Generator) -> None:
    logits = randn(4, 9, generator=generator).requires_grad_()
    temperature = torch.full((4,), 0.5, requires_grad=True)
    rf.token_logprobs(logits, torch.zeros(4, dtype=torch.int64), temperature=temperature).sum().backward()
    assert temperature.grad is None
    assert logits.grad is not None


@pytest.mark.parametrize("count", [1, 3])
def test_several_targets_a_row(backend: str, dtype: torch.dtype, count: int, generator: torch.Generator) -> None:
    logits = randn(*ROWS, 127, generator=generator, dtype=dtype, scale=3)
    targets = randint(127, *ROWS, count, generator=generator)
    targets[0, 0] = targets[0, 0, 0]  # the same id K times: its gradients must add up
    check_stats(logits, targets, temperature=0.6)


def test_targets_int32(backend: str, generator: torch.Generator) -> None:
    logits = randn(*ROWS, 17, generator=generator)
    targets = randint(17, *ROWS, generator=generator)
    assert torch.equal(rf.token_logprobs(logits, targets.int()), rf.token_logprobs(logits, targets))


@pytest.mark.parametrize("outputs", [(n,) for n in ALL_OUTPUTS] + [("entropy", "argmax"), ("logsumexp", "logprobs")])
def test_output_subsets(backend: str, outputs: tuple[str, ...], generator: torch.Generator) -> None:
    """Each subset gives what the whole set gives, the rest is None, and only three of them carry gradients."""
    logits = randn(*ROWS, 127, generator=generator, scale=3).requires_grad_()
    targets = randint(127, *ROWS, generator=generator)
    whole = rf.token_stats(logits, targets, outputs=ALL_OUTPUTS)
    some = rf.token_stats(logits, targets if "logprobs" in outputs else None, outputs=outputs)
    for name in ALL_OUTPUTS:
        value = getattr(some, name)
        if name in outputs:
            torch.testing.assert_close(value, getattr(whole, name), rtol=0, atol=1e-6)
            assert value.requires_grad == (name in DIFFERENTIABLE)
        else:
            assert value is None


@pytest.mark.parametrize("extra", [None, 3])
def test_mask(backend: str, dtype: torch.dtype, extra: int | None, generator: torch.Generator) -> None:
    """NaN and garbage in every masked slot: logits, targets, temperature and the gradient that comes in."""
    shape = (4, 5)
    mask = random_mask(*shape, generator=generator)
    mask[0], mask[1] = True, False
    logits = randn(*shape, 127, generator=generator, dtype=dtype, scale=3)
    targets = randint(127, *shape, *([extra] if extra else []), generator=generator)
    temperature = 0.5 + torch.rand(shape, generator=generator)
    clean = {"mask": mask, "temperature": temperature.clone()}
    true = truths.token_stats(logits.double(), targets, **{k: upcast(v) for k, v in clean.items()})
    _, true_grads = with_gradients(
        lambda logits: truths.token_stats(logits, targets, **{k: upcast(v) for k, v in clean.items()}),
        {"logits": logits.double()},
        grads_of=DIFFERENTIABLE,
    )
    _, eager_grads = with_gradients(
        lambda logits: truths.token_stats(logits, targets, **clean), {"logits": logits}, grads_of=DIFFERENTIABLE
    )
    logits[~mask], temperature[~mask] = NAN, NAN
    targets = scribble(targets, mask)
    leaf = logits.clone().requires_grad_()
    got = named_outputs(rf.token_stats(leaf, targets, mask=mask, temperature=temperature, outputs=ALL_OUTPUTS))
    for name, value in got.items():
        assert bool((value[~mask] == 0).all()), f"{name} must be 0 at masked rows"
        assert_values(value, true[name], dtype=dtype, what=name)
    weights = {n: incoming(n, got[n]) for n in DIFFERENTIABLE}
    for weight in weights.values():
        weight[~mask] = NAN
    (grad,) = torch.autograd.grad([got[n] for n in DIFFERENTIABLE], [leaf], list(weights.values()))
    assert bool((grad[~mask] == 0).all()), "the gradient of masked rows must be exactly 0"
    assert_gradient(grad, true_grads["logits"], eager_grads["logits"], dtype=dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: str, dtype: torch.dtype, layout: str, generator: torch.Generator) -> None:
    """Strided inputs give the same as contiguous ones, and their neighbours in memory stay unread."""
    logits = LAYOUTS[layout](randn(3, 4, 129, generator=generator, dtype=dtype, scale=3))
    targets = randint(129, 4, 3, generator=generator).t()
    check_stats(logits, targets, temperature=(0.5 + torch.rand(4, 3, generator=generator)).t())


def test_expanded_rows_and_columns(backend: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Stride 0 along rows or along the vocabulary."""
    targets = randint(33, 5, 2, generator=generator)
    for logits in (
        randn(1, 1, 33, generator=generator, dtype=dtype).expand(5, 2, 33),
        randn(5, 2, 1, generator=generator, dtype=dtype).expand(5, 2, 33),
    ):
        got = rf.token_stats(logits, targets, outputs=("logprobs", "entropy"))
        true = truths.token_stats(logits.double(), targets)
        assert_values(got.logprobs, true["logprobs"], dtype=dtype)
        assert_values(got.entropy, true["entropy"], dtype=dtype)


def test_gradient_through_a_slice(backend: str, generator: torch.Generator) -> None:
    """The usual `logits[:, :-1]` of a model's output: the gradient lands in the right places of the whole."""
    whole = randn(2, 5, 37, generator=generator)
    targets = randint(37, 2, 4, generator=generator)
    _, grads = with_gradients(lambda x: rf.token_logprobs(x[:, :-1], targets), {"x": whole})
    _, true = with_gradients(lambda x: truths.token_stats(x[:, :-1], targets)["logprobs"], {"x": whole.double()})
    assert_gradient(grads["x"], true["x"], dtype=torch.float32)
    assert bool((grads["x"][:, -1] == 0).all())


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5, "softcap": 5.0}], ids=["plain", "shaped"])
def test_inplace_backward(
    backend: str, dtype: torch.dtype, options: dict[str, Any], generator: torch.Generator
) -> None:
    """The gradient is written over the logits: same numbers, no second buffer; the caller's leaf is untouched."""
    shape = (3, 4)
    mask = random_mask(*shape, generator=generator)
    targets = randint(300, *shape, generator=generator)
    x = randn(*shape, 300, generator=generator, dtype=dtype, scale=2)

    def run(inplace: bool) -> tuple[Tensor, Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        logits = leaf * 1
        stats = rf.token_stats(logits, targets, mask=mask, inplace_backward=inplace, **options)
        loss = (stats.logprobs * 0.3 - stats.entropy).sum()
        (grad,) = torch.autograd.grad(loss, leaf)
        return grad, logits.detach(), leaf.detach()

    expected, untouched, _ = run(False)
    grad, overwritten, leaf = run(True)
    assert torch.equal(untouched, x) and torch.equal(leaf, x)
    assert_gradient(grad, expected.double(), dtype=dtype)
    assert bool((overwritten != x).any()), "inplace_backward=True kept a second buffer"


def test_second_backward_after_inplace_raises(backend: str, generator: torch.Generator) -> None:
    leaf = randn(3, 9, generator=generator).requires_grad_()
    loss = rf.token_logprobs(leaf * 1, torch.tensor([0, 1, 2]), inplace_backward=True).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        loss.backward()


def test_inplace_backward_never_corrupts_another_reader(backend: str, generator: torch.Generator) -> None:
    """Another op that saved the same logits either sees them unharmed or autograd refuses; never a wrong gradient."""
    x = randn(3, 9, generator=generator)
    leaf = x.clone().requires_grad_()
    logits = leaf * 1
    other = logits.sin()  # saves logits; its backward runs after ours
    ours = rf.token_logprobs(logits, torch.tensor([0, 1, 2]), inplace_backward=True)
    try:
        (ours.sum() + other.sum()).backward()
    except RuntimeError:
        return
    true_leaf = x.double().requires_grad_()
    (truths.token_stats(true_leaf, torch.tensor([0, 1, 2]))["logprobs"].sum() + true_leaf.sin().sum()).backward()
    assert leaf.grad is not None and true_leaf.grad is not None
    assert_gradient(leaf.grad, true_leaf.grad, dtype=torch.float32)


def test_inplace_backward_of_rows_that_share_memory(backend: str, generator: torch.Generator) -> None:
    """An expanded row cannot hold a gradient per row: refuse, or find another way; never a wrong number."""
    x = randn(1, 33, generator=generator)
    targets = torch.tensor([0, 5, 5, 32])
    leaf = x.clone().requires_grad_()
    try:
        loss = rf.token_logprobs((leaf * 1).expand(4, 33), targets, inplace_backward=True)
        (grad,) = torch.autograd.grad(loss, leaf, incoming("out", loss))
    except (RuntimeError, ValueError):
        return
    _, true = with_gradients(lambda x: truths.token_stats(x.expand(4, 33), targets)["logprobs"], {"x": x.double()})
    assert_gradient(grad, true["x"], dtype=torch.float32)


@pytest.mark.parametrize("backend", ["native"], indirect=True)
@pytest.mark.parametrize("layout", ["plain", "sliced", "first_dims_transposed", "padded_columns"])
def test_memory(backend: str, layout: str, generator: torch.Generator) -> None:
    """Forward and in-place backward allocate nothing of the logits' size, however the rows lie in memory."""
    base = randn(16, 32, 2000, generator=generator)
    logits = base if layout == "plain" else LAYOUTS[layout](base)
    targets = randint(2000, *logits.shape[:2], generator=generator)
    mask = random_mask(*logits.shape[:2], generator=generator)
    leaf = logits.requires_grad_()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        stats = rf.token_stats(leaf, targets, mask=mask, outputs=ALL_OUTPUTS, inplace_backward=True)
        torch.autograd.grad([stats.logprobs, stats.entropy], leaf, [torch.ones(mask.shape)] * 2)
    largest = max(event.cpu_memory_usage for event in seen.events())
    assert 0 < largest <= base.nbytes // 100


def test_half_logits_within_the_promise(backend: str, generator: torch.Generator) -> None:
    """log-probs, entropy and logsumexp from bf16 logits of a real vocabulary's width, within 1e-4 of float64."""
    for dtype in HALF:
        logits = randn(4, 32_003, generator=generator, dtype=dtype, scale=4)
        targets = randint(32_003, 4, generator=generator)
        got = rf.token_stats(logits, targets, outputs=DIFFERENTIABLE)
        true = truths.token_stats(logits.double(), targets)
        for name in DIFFERENTIABLE:
            assert_values(getattr(got, name), true[name], dtype=dtype, what=name)


def test_wide_rows_sum_accurately(backend: str, generator: torch.Generator) -> None:
    """A naive running sum of 131 072 float32 terms is off by up to 1e-4; blocked sums are not."""
    logits = randn(2, 131_072 + 3, generator=generator, scale=0.1)
    targets = randint(131_072, 2, generator=generator)
    got = rf.token_stats(logits, targets, outputs=ALL_OUTPUTS)
    true = truths.token_stats(logits.double(), targets)
    for name in (*DIFFERENTIABLE, "sum_sq_probs"):
        assert_values(getattr(got, name), true[name], dtype=torch.float32, what=name)
