# SPDX-License-Identifier: Apache-2.0
"""linear_token_kl: the exact KL of two heads, against token_kl's definition on whole logits in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import truths
from helpers.tolerances import ATOL, assert_gradient, max_error
from helpers.tools import NAN, randn, random_mask, upcast, with_gradients
from torch import Tensor

import rlhf_fast as rf
from rlhf_fast.ops.linear import tiles

HIDDEN, REF_HIDDEN, VOCABULARY, ROWS = 16, 12, 133, (3, 5)
KINDS = ("reverse", "forward", "jsd", "tv")

few_backends = pytest.mark.parametrize("backend", ["torch", "native"], indirect=True)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def heads(generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "hidden": randn(*ROWS, HIDDEN, generator=generator, dtype=dtype),
        "weight": randn(VOCABULARY, HIDDEN, generator=generator, dtype=dtype, scale=0.4),
        "ref_hidden": randn(*ROWS, REF_HIDDEN, generator=generator, dtype=dtype),
        "ref_weight": randn(VOCABULARY, REF_HIDDEN, generator=generator, dtype=dtype, scale=0.4),
        "bias": randn(VOCABULARY, generator=generator, dtype=dtype),
        "ref_bias": randn(VOCABULARY, generator=generator, dtype=dtype),
    }


def eager(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ref_logit_scale: float | None = None,
    ref_softcap: float | None = None,
    vocab_size: int | None = None,
    **options: Any,
) -> Tensor:
    """The logits of both heads, each with its own scale and cap, then the divergence."""
    cut = {"vocab_size": vocab_size}
    logits = truths.shaped_logits(
        truths.linear_logits(hidden, weight, bias), logit_scale=logit_scale, softcap=softcap, **cut
    )
    ref_logits = truths.shaped_logits(
        truths.linear_logits(ref_hidden, ref_weight, ref_bias),
        logit_scale=logit_scale if ref_logit_scale is None else ref_logit_scale,
        softcap=softcap if ref_softcap is None else (ref_softcap or None),
        **cut,
    )
    return truths.token_kl(logits, ref_logits, **options)


def check(inputs: dict[str, Tensor], memory_budget: int | None = None, **options: Any) -> None:
    dtype = inputs["hidden"].dtype
    got, grads = with_gradients(lambda **x: rf.linear_token_kl(**x, memory_budget=memory_budget, **options), inputs)
    high = {k: upcast(v) for k, v in options.items()}
    true, true_grads = with_gradients(lambda **x: eager(**x, **high), {k: upcast(v) for k, v in inputs.items()})
    low, low_grads = with_gradients(lambda **x: eager(**x, **options), inputs)
    assert max_error(got["out"], true["out"]) <= 2 * max_error(low["out"], true["out"]) + ATOL[dtype]
    for name in inputs:
        assert_gradient(grads[name], true_grads[name], low_grads[name], dtype=dtype, what=name)


@few_backends
@dtypes
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [0, None])
def test_values_and_gradients(
    backend: str, dtype: torch.dtype, kind: str, budget: int | None, generator: torch.Generator
) -> None:
    check(heads(generator, dtype), budget, kind=kind, beta=0.3, temperature=0.7, ref_temperature=1.2)


@few_backends
@pytest.mark.parametrize("options", [
    {"softcap": 4.0, "logit_scale": 0.6}, {"vocab_size": 120}, {"ref_softcap": 3.0},
    {"softcap": 5.0, "ref_softcap": 0.0},
    {"softcap": 5.0, "ref_softcap": 2.0, "logit_scale": 0.5, "ref_logit_scale": 2.0, "temperature": 0.8},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", ["reverse", "jsd"])
def test_options(backend: str, kind: str, options: dict[str, Any], generator: torch.Generator) -> None:
    check(heads(generator, torch.float32), kind=kind, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_float64(kind: str, generator: torch.Generator) -> None:
    check(heads(generator, torch.float64), kind=kind)


@few_backends
@pytest.mark.parametrize("budget", [0, 2 * 4 * VOCABULARY * 2, None])
def test_mask_and_row_blocks(
    backend: str, budget: int | None, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows at a time, NaN in every masked slot."""
    monkeypatch.setattr(tiles, "CPU_ROW_TILE", 2 * 2 * VOCABULARY * 4)
    monkeypatch.setattr(tiles, "CPU_MIN_ROWS", 1)
    inputs = heads(generator, torch.float32)
    mask = random_mask(*ROWS, generator=generator)
    temperature = 0.5 + torch.rand(ROWS, generator=generator)
    check(inputs, budget, mask=mask, temperature=temperature)
    _, clean = with_gradients(lambda **x: rf.linear_token_kl(**x, mask=mask, temperature=temperature), inputs)
    for name in ("hidden", "ref_hidden"):
        inputs[name][~mask] = NAN
    temperature[~mask] = NAN
    out, grads = with_gradients(lambda **x: rf.linear_token_kl(**x, mask=mask, temperature=temperature), inputs)
    assert bool((out["out"][~mask] == 0).all())
    assert all(torch.equal(grads[name], clean[name]) for name in inputs)


@few_backends
def test_the_reference_gets_a_gradient_only_if_asked(backend: str, generator: torch.Generator) -> None:
    inputs = heads(generator, torch.float32)
    _, every = with_gradients(rf.linear_token_kl, inputs)
    rest = {k: v for k, v in inputs.items() if k.startswith("ref_")}
    moving = {k: v for k, v in inputs.items() if k not in rest}
    _, grads = with_gradients(lambda **x: rf.linear_token_kl(**x, **rest), moving)
    assert all(torch.equal(grads[k], every[k]) for k in moving)


@few_backends
def test_lora_on_the_policy(backend: str, generator: torch.Generator) -> None:
    inputs = heads(generator, torch.float32)
    a = randn(3, HIDDEN, generator=generator)
    b = randn(VOCABULARY, 3, generator=generator)
    got, grads = with_gradients(lambda a, b, **x: rf.linear_token_kl(**x, lora=(a, b, 0.5)), {**inputs, "a": a, "b": b})
    true, true_grads = with_gradients(
        lambda a, b, weight, **x: rf.linear_token_kl(weight=weight + 0.5 * b @ a, **x), {**inputs, "a": a, "b": b}
    )
    torch.testing.assert_close(got["out"], true["out"], rtol=1e-5, atol=1e-5)
    for name in grads:
        torch.testing.assert_close(grads[name], true_grads[name], rtol=1e-4, atol=1e-5)


@few_backends
def test_no_rows_and_none_real(backend: str, generator: torch.Generator) -> None:
    inputs = heads(generator, torch.float32)
    none = torch.zeros(ROWS, dtype=torch.bool)
    out, grads = with_gradients(lambda **x: rf.linear_token_kl(**x, mask=none), inputs)
    assert bool((out["out"] == 0).all()) and all(bool((g == 0).all()) for g in grads.values())
    inputs["hidden"], inputs["ref_hidden"] = torch.empty(0, HIDDEN), torch.empty(0, REF_HIDDEN)
    out, grads = with_gradients(rf.linear_token_kl, inputs)
    assert out["out"].shape == (0,) and all(bool((g == 0).all()) for g in grads.values())


def test_the_reference_of_itself_is_nothing(generator: torch.Generator) -> None:
    inputs = heads(generator, torch.float32)
    hidden, weight = inputs["hidden"], inputs["weight"]
    for kind in KINDS:
        out = rf.linear_token_kl(hidden, weight, hidden, weight, kind=kind)
        assert out.abs().max() <= 1e-6
