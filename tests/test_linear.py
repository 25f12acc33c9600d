# SPDX-License-Identifier: Apache-2.0
"""linear_token_logprobs and linear_token_stats: the row ops on hidden @ weight.T + bias, without the logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.linear_heads import (
    ALL_OUTPUTS,
    DIFFERENTIABLE,
    HIDDEN,
    VOCABULARY,
    both,
    both_and_dtype,
    check_linear,
    eager_stats,
    head,
)
from helpers.tolerances import ATOL, assert_gradient, max_error
from helpers.tools import NAN, incoming, named_outputs, randint, randn, random_mask, scribble, upcast, with_gradients
from torch import Tensor

import rlhf_fast as rf
from rlhf_fast.ops.linear import tiles


@both_and_dtype
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("width", [1, 3, 17, 127, 1000])
def test_values_and_gradients(
    backend: str, dtype: torch.dtype, width: int, bias: bool, generator: torch.Generator
) -> None:
    inputs = head(generator, dtype, (2, 5), width, bias)
    check_linear(inputs, randint(width, 2, 5, generator=generator))


def test_logprobs_are_those_of_stats(backend: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    inputs = head(generator, dtype, (2, 5))
    targets = randint(VOCABULARY, 2, 5, generator=generator)
    got, grads = with_gradients(lambda **x: rf.linear_token_logprobs(**x, targets=targets, temperature=0.8), inputs)
    stats, stats_grads = with_gradients(
        lambda **x: rf.linear_token_stats(**x, targets=targets, temperature=0.8, outputs=("logprobs",)).logprobs, inputs
    )
    assert torch.equal(got["out"], stats["out"])
    assert all(torch.equal(grads[name], stats_grads[name]) for name in inputs)
    assert set(named_outputs(rf.linear_token_stats(**inputs, targets=targets))) == {"logprobs", "entropy"}
    only = rf.linear_token_stats(inputs["hidden"], inputs["weight"], None, outputs=("entropy", "argmax"))
    assert only.logprobs is None and only.entropy is not None and only.argmax is not None


@both_and_dtype
@pytest.mark.parametrize("options", [
    {"temperature": 0.7}, {"logit_scale": 0.3}, {"softcap": 2.0}, {"vocab_size": 257},
    {"temperature": 1.4, "logit_scale": 1.5, "softcap": 5.0, "vocab_size": 250},
], ids=str)  # fmt: skip
def test_options(backend: str, dtype: torch.dtype, options: dict[str, Any], generator: torch.Generator) -> None:
    targets = randint(250, 2, 5, generator=generator)
    check_linear(head(generator, dtype, (2, 5)), targets, **options)


@both_and_dtype
@pytest.mark.parametrize("count", [1, 3])
def test_several_targets_a_row(backend: str, dtype: torch.dtype, count: int, generator: torch.Generator) -> None:
    targets = randint(VOCABULARY, 2, 5, count, generator=generator)
    targets[0, 0] = targets[0, 0, 0]
    check_linear(head(generator, dtype, (2, 5)), targets)


@both_and_dtype
@pytest.mark.parametrize("budget", [0, 7 * VOCABULARY * 4, None], ids=["none_kept", "some_kept", "all_kept"])
@pytest.mark.parametrize(("tile_bytes", "tile_rows"), [(8, 1), (1000, 8), (4096, 100), (10**6, 100)])
def test_every_tile_shape_gives_the_same(
    backend: str,
    dtype: torch.dtype,
    tile_bytes: int,
    tile_rows: int,
    budget: int | None,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From one entry a tile over ragged tiles on both sides to a single one; with all per-row options."""
    if tile_bytes == 8 and (dtype not in (torch.float32, torch.float64) or budget is not None):
        pytest.skip("a tile of one entry once is enough: it is slow")
    monkeypatch.setattr(tiles, "CPU_TILE", tile_bytes)
    monkeypatch.setattr(tiles, "CPU_ROWS", tile_rows)
    rows = (5, 7)
    mask = random_mask(*rows, generator=generator)
    check_linear(
        head(generator, dtype, rows),
        randint(VOCABULARY, *rows, 2, generator=generator),
        budget,
        mask=mask,
        temperature=0.5 + torch.rand(rows, generator=generator),
        softcap=6.0,
    )


@pytest.mark.parametrize("softcap", [None, 6.0])
def test_tiles_merge_on_every_backend(
    backend: str, softcap: float | None, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the logits share an offset of 1e4: a merged maximum must be in the kernels' own unit."""
    monkeypatch.setattr(tiles, "CPU_TILE", 7 * 64 * 4)
    rows = (7,)
    inputs, targets = head(generator, torch.float32, rows, width=150), randint(150, *rows, generator=generator)
    temperature = 0.5 + torch.rand(rows, generator=generator)
    check_linear(inputs, targets, temperature=temperature, softcap=softcap, logit_scale=0.7)
    if softcap is None:
        exact = {k: v.round() for k, v in inputs.items()}
        plain = rf.linear_token_stats(**exact, targets=targets, temperature=0.5)
        exact["bias"] = exact["bias"] + 1e4
        moved = rf.linear_token_stats(**exact, targets=targets, temperature=0.5)
        torch.testing.assert_close(moved.logprobs, plain.logprobs, rtol=1e-6, atol=4e-6)
        torch.testing.assert_close(moved.entropy, plain.entropy, rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize("budget", [0, None])
@pytest.mark.parametrize("extra", [None, 2])
def test_mask(
    backend: str, dtype: torch.dtype, extra: int | None, budget: int | None, generator: torch.Generator
) -> None:
    """NaN in every masked slot: hidden states, temperature, incoming gradients; ids that exist nowhere as targets."""
    rows = (4, 5)
    mask = random_mask(*rows, generator=generator)
    mask[0], mask[1] = True, False
    inputs = head(generator, dtype, rows)
    targets = randint(VOCABULARY, *rows, *([extra] if extra else []), generator=generator)
    temperature = 0.5 + torch.rand(rows, generator=generator)
    true, true_grads = with_gradients(
        lambda **x: eager_stats(**x, targets=targets, mask=mask, temperature=temperature.double()),
        {k: upcast(v) for k, v in inputs.items()},
        grads_of=DIFFERENTIABLE,
    )
    eager, eager_grads = with_gradients(
        lambda **x: eager_stats(**x, targets=targets, mask=mask, temperature=temperature),
        inputs,
        grads_of=DIFFERENTIABLE,
    )
    inputs["hidden"][~mask], temperature[~mask] = NAN, NAN
    leaves = {k: v.clone().requires_grad_() for k, v in inputs.items()}
    got = named_outputs(
        rf.linear_token_stats(
            **leaves,
            targets=scribble(targets, mask),
            mask=mask,
            temperature=temperature,
            outputs=ALL_OUTPUTS,
            memory_budget=budget,
        )
    )
    for name, value in got.items():
        assert bool((value[~mask] == 0).all()), f"{name} must be 0 at masked rows"
        if name != "argmax":
            assert max_error(value, true[name]) <= 2 * max_error(eager[name], true[name]) + ATOL[dtype], name
    weights = {n: incoming(n, got[n]) for n in DIFFERENTIABLE}
    for weight in weights.values():
        weight[~mask] = NAN
    grads = torch.autograd.grad([got[n] for n in DIFFERENTIABLE], list(leaves.values()), list(weights.values()))
    for (name, _), grad in zip(leaves.items(), grads, strict=True):
        assert_gradient(grad, true_grads[name], eager_grads[name], dtype=dtype, what=name)
    assert bool((grads[0][~mask] == 0).all())


@both
@pytest.mark.parametrize("frozen", ["weight", "hidden", "bias", "weight+bias"])
def test_frozen_parts_get_no_gradient(backend: str, frozen: str, generator: torch.Generator) -> None:
    inputs = head(generator, torch.float32, (2, 5))
    targets = randint(VOCABULARY, 2, 5, generator=generator)
    _, all_grads = with_gradients(lambda **x: rf.linear_token_logprobs(**x, targets=targets), inputs)
    rest = {k: inputs[k] for k in frozen.split("+")}
    moving = {k: v for k, v in inputs.items() if k not in rest}
    _, grads = with_gradients(lambda **x: rf.linear_token_logprobs(**x, **rest, targets=targets), moving)
    for name in moving:
        torch.testing.assert_close(grads[name], all_grads[name], rtol=1e-6, atol=1e-7)
    assert not rf.linear_token_logprobs(**inputs, targets=targets).requires_grad


@both_and_dtype
@pytest.mark.parametrize("layout", ["sliced", "transposed", "tied_slice", "expanded"])
def test_layouts(backend: str, dtype: torch.dtype, layout: str, generator: torch.Generator) -> None:
    inputs = head(generator, dtype, (4, 6))
    hidden, weight = inputs["hidden"], inputs["weight"]
    if layout == "sliced":
        inputs["hidden"] = torch.cat([hidden, hidden[:, :1]], dim=1)[:, :-1]
    elif layout == "transposed":
        inputs["hidden"] = hidden.transpose(0, 1).contiguous().transpose(0, 1)
        inputs["weight"] = weight.t().contiguous().t()
    elif layout == "tied_slice":
        inputs["weight"] = torch.cat([weight, weight], dim=1)[:, :HIDDEN]
    else:
        inputs["hidden"] = hidden[:1].expand(4, 6, HIDDEN)
    check_linear(inputs, randint(VOCABULARY, 4, 6, generator=generator))


def test_empty_one_and_all_masked(backend: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    weight = randn(VOCABULARY, HIDDEN, generator=generator, dtype=dtype)
    for shape in [(0,), (3, 0)]:
        leaves = [torch.empty(*shape, HIDDEN, dtype=dtype), weight.clone()]
        for leaf in leaves:
            leaf.requires_grad_()
        out = rf.linear_token_logprobs(*leaves, torch.empty(shape, dtype=torch.int64))
        assert out.shape == shape
        out.sum().backward()
        assert leaves[1].grad is not None and bool((leaves[1].grad == 0).all())
    hidden = torch.full((2, 3, HIDDEN), NAN, dtype=dtype, requires_grad=True)
    head_weight = weight.clone().requires_grad_()
    nowhere = torch.zeros(2, 3, dtype=torch.bool)
    out = rf.linear_token_logprobs(hidden, head_weight, torch.full((2, 3), -100), mask=nowhere)
    out.sum().backward()
    assert bool((out == 0).all())
    for leaf in (hidden, head_weight):
        assert leaf.grad is not None and bool((leaf.grad == 0).all())
    one = rf.linear_token_logprobs(weight[0], weight, torch.tensor(0))
    assert one.shape == () and bool(one.isfinite())


@both
def test_minus_infinity_bias_forbids_a_token(backend: str, generator: torch.Generator) -> None:
    """-inf in the bias: probability 0, and every gradient stays finite."""
    inputs = head(generator, torch.float32, (2, 5))
    inputs["bias"][[7, 300]] = -torch.inf
    targets = randint(7, 2, 5, generator=generator)
    got, grads = with_gradients(lambda **x: rf.linear_token_stats(**x, targets=targets), inputs)
    keep = torch.ones(VOCABULARY, dtype=torch.bool)
    keep[[7, 300]] = False
    true = eager_stats(
        inputs["hidden"].double(), inputs["weight"][keep].double(), targets, inputs["bias"][keep].double()
    )
    assert max_error(got["logprobs"], true["logprobs"]) <= 1e-5
    assert max_error(got["entropy"], true["entropy"]) <= 1e-5
    assert all(bool(grad.isfinite().all()) for grad in grads.values())
    assert bool((grads["weight"][[7, 300]] == 0).all())


@both
def test_gradients_accumulate_in_float32(
    backend: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many small tiles of half-precision rows: a weight gradient summed in bf16 would lose the small terms."""
    inputs = head(generator, torch.bfloat16, (600,), width=64, bias=False)
    targets = randint(64, 600, generator=generator)
    monkeypatch.setattr(tiles, "CPU_ROWS", 2)
    _, grads = with_gradients(lambda **x: rf.linear_token_logprobs(**x, targets=targets), inputs)
    monkeypatch.undo()
    _, whole = with_gradients(lambda **x: rf.linear_token_logprobs(**x, targets=targets), inputs)
    _, true = with_gradients(
        lambda **x: eager_stats(**x, targets=targets)["logprobs"], {k: upcast(v) for k, v in inputs.items()}
    )
    scale = true["weight"].abs().max().item()
    chunked, at_once = (max_error(g["weight"], true["weight"]) / scale for g in (grads, whole))
    assert chunked <= 2 * at_once + 4e-3, f"{chunked:.2e} in chunks, {at_once:.2e} at once"


@both
@pytest.mark.parametrize("budget", [None, 0])
def test_lora(backend: str, budget: int | None, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the head that the factors make, formed; in tiles of some rows and some columns."""
    monkeypatch.setattr(tiles, "CPU_TILE", 4 * 7 * 40)
    monkeypatch.setattr(tiles, "CPU_ROWS", 7)
    inputs = head(generator, torch.float32, (20,))
    inputs |= {"a": randn(3, HIDDEN, generator=generator), "b": randn(VOCABULARY, 3, generator=generator, scale=0.3)}
    targets = randint(VOCABULARY, 20, generator=generator)

    def ours(a: Tensor, b: Tensor, **x: Tensor) -> Tensor:
        return rf.linear_token_logprobs(**x, targets=targets, lora=(a, b, 0.5), memory_budget=budget)

    def formed(a: Tensor, b: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return eager_stats(hidden, weight + 0.5 * b @ a, targets, bias)["logprobs"]

    got, grads = with_gradients(ours, inputs)
    true, true_grads = with_gradients(formed, {k: upcast(v) for k, v in inputs.items()})
    torch.testing.assert_close(got["out"], true["out"].float(), rtol=1e-5, atol=1e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, true_grads[name].float(), rtol=1e-4, atol=1e-5, msg=name)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_float_logits(backend: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """From half-precision operands, without rounding the logits."""
    inputs = head(generator, dtype, (20,))
    targets = randint(VOCABULARY, 20, generator=generator)
    got = rf.linear_token_logprobs(**inputs, targets=targets, logits_dtype=torch.float32)
    true = eager_stats(**{k: upcast(v) for k, v in inputs.items()}, targets=targets)["logprobs"]
    torch.testing.assert_close(got, true.float(), rtol=1e-5, atol=1e-5)


@both_and_dtype
def test_bitwise_repeatable(backend: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    inputs = head(generator, dtype, (40,))
    targets = randint(VOCABULARY, 40, generator=generator)
    (first, first_grads), (second, second_grads) = (
        with_gradients(lambda **x: rf.linear_token_stats(**x, targets=targets), inputs) for _ in range(2)
    )
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert all(torch.equal(first_grads[k], second_grads[k]) for k in inputs)
