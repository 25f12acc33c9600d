# SPDX-License-Identifier: Apache-2.0
"""linear_sampled_logprobs: the softmax over each row's kept ids, against whole logits with everything else at -inf."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import truths
from helpers.tolerances import ATOL, assert_gradient, max_error
from helpers.tools import randint, randn, upcast, with_gradients
from torch import Tensor

import rlhf_fast as rf
from rlhf_fast.ops.linear import sampled

HIDDEN, VOCABULARY, ROWS = 12, 601, 23

few_backends = pytest.mark.parametrize("backend", ["torch", "native"], indirect=True)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def head(generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "hidden": randn(ROWS, HIDDEN, generator=generator, dtype=dtype),
        "weight": randn(VOCABULARY, HIDDEN, generator=generator, dtype=dtype, scale=0.4),
        "bias": randn(VOCABULARY, generator=generator, dtype=dtype),
    }


def supports(sizes: list[int], generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Targets, ids and offsets; each row keeps so many different ids in no order, its target among them."""
    kept = [torch.randperm(VOCABULARY, generator=generator)[:size] for size in sizes]
    targets = torch.stack([ids[randint(len(ids), 1, generator=generator)].squeeze() for ids in kept])
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    return targets, torch.cat(kept), offsets


def eager(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    ids: Tensor,
    offsets: Tensor,
    temperature: Any = 1.0,
    **shaping: Any,
) -> Tensor:
    logits = truths.shaped_logits(truths.linear_logits(hidden, weight, bias), **shaping)
    kept = torch.zeros(logits.shape, dtype=torch.bool)
    for n in range(len(kept)):
        kept[n, ids[offsets[n] : offsets[n + 1]]] = True
    return truths.token_stats(logits.masked_fill(~kept, -torch.inf), targets, temperature=temperature)["logprobs"]


def check(inputs: dict[str, Tensor], support: tuple[Tensor, Tensor, Tensor], **options: Any) -> None:
    dtype = inputs["hidden"].dtype
    targets, ids, offsets = support
    got, grads = with_gradients(
        lambda hidden, weight, bias: rf.linear_sampled_logprobs(
            hidden, weight, targets, ids, offsets, bias=bias, **options
        ),
        inputs,
    )
    high = {k: upcast(v) for k, v in options.items()}
    true, true_grads = with_gradients(lambda **x: eager(**x, targets=targets, ids=ids, offsets=offsets, **high),
                                      {k: upcast(v) for k, v in inputs.items()})  # fmt: skip
    low, low_grads = with_gradients(
        lambda **x: eager(**x, targets=targets, ids=ids, offsets=offsets, **options), inputs
    )
    assert max_error(got["out"], true["out"]) <= 2 * max_error(low["out"], true["out"]) + ATOL[dtype]
    for name in inputs:
        assert_gradient(grads[name], true_grads[name], low_grads[name], dtype=dtype, what=name)


@few_backends
@dtypes
@pytest.mark.parametrize("dense_from", [1, 256, 10**6], ids=["gather", "mixed", "dense"])
def test_ragged_supports(
    backend: str, dtype: torch.dtype, dense_from: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One id, two, all of them; gathered, multiplied whole, and each where it is cheaper."""
    monkeypatch.setattr(sampled, "DENSE_FROM", dense_from)
    sizes = [1, 2, VOCABULARY, *([3, 1, 7, 40] * 5)]
    check(head(generator, dtype), supports(sizes, generator))


@few_backends
@pytest.mark.parametrize("options", [
    {"temperature": 0.6}, {"softcap": 2.0}, {"logit_scale": 0.3, "softcap": 3.0, "temperature": 1.3},
    {"temperature": torch.linspace(0.5, 2.0, ROWS)},
], ids=["temperature", "softcap", "all", "per_row"])  # fmt: skip
def test_options(backend: str, options: dict[str, Any], generator: torch.Generator) -> None:
    check(head(generator, torch.float32), supports([1 + n * 5 % 7 for n in range(ROWS)], generator), **options)


@few_backends
@pytest.mark.parametrize("dense_from", [1, 30, 10**6], ids=["gather", "mixed", "dense"])
def test_lora(backend: str, dense_from: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the head that the factors make, formed."""
    monkeypatch.setattr(sampled, "DENSE_FROM", dense_from)
    inputs = head(generator, torch.float32)
    factors = {"a": randn(3, HIDDEN, generator=generator), "b": randn(VOCABULARY, 3, generator=generator, scale=0.3)}
    targets, ids, offsets = supports([1 + n for n in range(ROWS)], generator)
    got, grads = with_gradients(
        lambda a, b, hidden, weight, bias: rf.linear_sampled_logprobs(
            hidden, weight, targets, ids, offsets, bias=bias, lora=(a, b, 0.5)
        ),
        {**factors, **inputs},
    )

    def formed(a: Tensor, b: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return eager(hidden, weight + 0.5 * b @ a, bias, targets, ids, offsets)

    true, true_grads = with_gradients(formed, {k: upcast(v) for k, v in {**factors, **inputs}.items()})
    torch.testing.assert_close(got["out"], true["out"].float(), rtol=1e-5, atol=1e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, true_grads[name].float(), rtol=1e-4, atol=1e-5, msg=name)


@few_backends
@pytest.mark.parametrize("dense_from", [1, 10**6], ids=["gather", "dense"])
def test_mask(backend: str, dense_from: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masked rows may hold anything; they return 0 and get no gradient."""
    monkeypatch.setattr(sampled, "DENSE_FROM", dense_from)
    inputs = head(generator, torch.float32)
    targets, ids, offsets = supports([1 + n % 5 for n in range(ROWS)], generator)
    mask = torch.arange(ROWS) % 3 != 0
    temperature = torch.linspace(0.5, 2.0, ROWS)

    def call(targets: Tensor, mask: Tensor | None, temperature: Tensor, **x: Tensor) -> Tensor:
        return rf.linear_sampled_logprobs(
            **x, targets=targets, support_ids=ids, support_offsets=offsets, mask=mask, temperature=temperature
        )

    whole, whole_grads = with_gradients(lambda **x: call(targets, None, temperature, **x) * mask, inputs)
    spoilt = {**inputs, "hidden": inputs["hidden"].masked_fill(~mask.unsqueeze(-1), torch.nan)}
    elsewhere, cold = targets.masked_fill(~mask, -100), temperature.masked_fill(~mask, 0)
    got, grads = with_gradients(lambda **x: call(elsewhere, mask, cold, **x), spoilt)
    torch.testing.assert_close(got["out"], whole["out"])
    for name, grad in grads.items():
        torch.testing.assert_close(grad, whole_grads[name], rtol=1e-4, atol=1e-6, msg=name)


@few_backends
@pytest.mark.parametrize("dense_from", [1, 10**6], ids=["gather", "dense"])
def test_float_logits(
    backend: str, dense_from: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From half-precision operands, without rounding the logits."""
    monkeypatch.setattr(sampled, "DENSE_FROM", dense_from)
    inputs = head(generator, torch.bfloat16)
    support = supports([9] * ROWS, generator)
    got = rf.linear_sampled_logprobs(
        inputs["hidden"], inputs["weight"], *support, bias=inputs["bias"], logits_dtype=torch.float32
    )
    targets, ids, offsets = support
    true = eager(**{k: upcast(v) for k, v in inputs.items()}, targets=targets, ids=ids, offsets=offsets)
    torch.testing.assert_close(got, true.float(), rtol=1e-5, atol=1e-5)


def test_float64(generator: torch.Generator) -> None:
    check(head(generator, torch.float64), supports([9] * ROWS, generator))


@few_backends
@pytest.mark.parametrize("dense_from", [1, 10**6], ids=["gather", "dense"])
def test_blocks(backend: str, dense_from: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows at a time."""
    monkeypatch.setattr(sampled, "DENSE_FROM", dense_from)
    monkeypatch.setattr(sampled, "CPU_ROW_TILE", 4 * 3 * HIDDEN * 7)
    check(head(generator, torch.float32), supports([3 + n % 4 for n in range(ROWS)], generator))


@few_backends
def test_the_whole_vocabulary_is_the_plain_op(backend: str, generator: torch.Generator) -> None:
    inputs = head(generator, torch.float32)
    targets, ids, offsets = supports([VOCABULARY] * ROWS, generator)
    got = rf.linear_sampled_logprobs(inputs["hidden"], inputs["weight"], targets, ids, offsets, bias=inputs["bias"])
    torch.testing.assert_close(got, rf.linear_token_logprobs(**inputs, targets=targets))


@few_backends
def test_no_rows(backend: str, generator: torch.Generator) -> None:
    weight = randn(VOCABULARY, HIDDEN, generator=generator).requires_grad_()
    none = torch.empty(0, dtype=torch.int64)
    out = rf.linear_sampled_logprobs(torch.empty(0, HIDDEN), weight, none, none, torch.zeros(1, dtype=torch.int64))
    out.sum().backward()
    assert out.shape == (0,) and weight.grad is not None and bool((weight.grad == 0).all())


def test_wrong_supports(generator: torch.Generator) -> None:
    inputs = head(generator, torch.float32)
    targets, ids, offsets = supports([4] * ROWS, generator)
    elsewhere = targets.clone()
    elsewhere[3] = next(i for i in range(VOCABULARY) if i not in ids[12:16])
    for error, argument, support in [
        (ValueError, "support_ids must hold each row's target, got a row 3", (elsewhere, ids, offsets)),
        (ValueError, "support_offsets must have the shape", (targets, ids, offsets[:-1])),
        (ValueError, "support_offsets must rise", (targets, ids, offsets + 1)),
        (ValueError, "support_offsets must rise", (targets, ids, offsets.flip(0))),
        (ValueError, "support_ids must be between 0 and 600, got 700", (targets, ids + (ids == ids[0]) * 700, offsets)),
        (ValueError, "support_ids must have one dimension", (targets, ids.view(-1, 4), offsets)),
        (TypeError, "support_ids must be an int64", (targets, ids.float(), offsets)),
    ]:
        with pytest.raises(error, match=rf"^rlhf_fast\.linear_sampled_logprobs: {argument.split(', got 700')[0]}"):
            rf.linear_sampled_logprobs(inputs["hidden"], inputs["weight"], *support)
