# SPDX-License-Identifier: Apache-2.0
"""token_kl (exact, over the vocabulary): values and gradients to both sides against float64, and hostile input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import truths
from helpers.tolerances import assert_gradient, assert_values
from helpers.tools import (
    INF,
    LAYOUTS,
    NAN,
    incoming,
    randn,
    random_mask,
    upcast,
    with_gradients,
)
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import rlhf_fast as rf

KINDS: dict[str, dict[str, Any]] = {
    "reverse": {"kind": "reverse"},
    "forward": {"kind": "forward"},
    "jsd": {"kind": "jsd"},
    "jsd_0.1": {"kind": "jsd", "beta": 0.1},
    "tv": {"kind": "tv"},
}
WIDTHS = (1, 3, 17, 127, 1000, 4099)
ROWS = (2, 3)


def check_kl(logits: Tensor, ref_logits: Tensor, **options: Any) -> None:
    dtype = logits.dtype
    inputs = {"logits": logits, "ref_logits": ref_logits}
    true_options = {k: upcast(v) for k, v in options.items()}
    got, grads = with_gradients(lambda **x: rf.token_kl(**x, **options), inputs)
    true, true_grads = with_gradients(
        lambda **x: truths.token_kl(**x, **true_options), {k: upcast(v) for k, v in inputs.items()}
    )
    eager, eager_grads = with_gradients(lambda **x: truths.token_kl(**x, **options), inputs)
    assert got["out"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_values(got["out"], true["out"], eager["out"], dtype=dtype)
    for side in inputs:
        assert_gradient(grads[side], true_grads[side], eager_grads[side], dtype=dtype, what=f"gradient to {side}")
    kl, grad = rf.token_kl_and_grad(**inputs, grad_kl=incoming("out", got["out"]), **options)
    assert_values(kl, true["out"], eager["out"], dtype=dtype, what="value of token_kl_and_grad")
    assert_gradient(grad, true_grads["logits"], eager_grads["logits"], dtype=dtype, what="gradient of the same")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(
    backend: str, dtype: torch.dtype, kind: str, width: int, generator: torch.Generator
) -> None:
    logits = randn(*ROWS, width, generator=generator, dtype=dtype, scale=2)
    ref_logits = (logits + randn(*ROWS, width, generator=generator)).to(dtype)
    check_kl(logits, ref_logits, **KINDS[kind])


OPTIONS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.7},
    "two_temperatures": {"temperature": 0.7, "ref_temperature": 1.6},
    "ref_temperature": {"ref_temperature": 2.0},
    "logit_scale": {"logit_scale": 0.3},
    "negative_scale": {"logit_scale": -0.8},
    "softcap": {"softcap": 3.0},
    "vocab_size": {"vocab_size": 119},
    "all": {"temperature": 1.5, "ref_temperature": 0.8, "logit_scale": 2.0, "softcap": 5.0, "vocab_size": 97},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_options(backend: str, dtype: torch.dtype, kind: str, name: str, generator: torch.Generator) -> None:
    logits = randn(*ROWS, 127, generator=generator, dtype=dtype, scale=2)
    ref_logits = randn(*ROWS, 127, generator=generator, dtype=dtype, scale=2)
    check_kl(logits, ref_logits, **KINDS[kind], **OPTIONS[name])


@pytest.mark.parametrize("which", ["temperature", "ref_temperature", "both", "zero_dim"])
def test_temperature_tensor(backend: str, dtype: torch.dtype, which: str, generator: torch.Generator) -> None:
    rows, ref_rows = (0.5 + torch.rand(ROWS, generator=generator) for _ in range(2))
    choices: dict[str, dict[str, Any]] = {
        "temperature": {"temperature": rows},
        "ref_temperature": {"temperature": 0.9, "ref_temperature": ref_rows},
        "both": {"temperature": rows, "ref_temperature": ref_rows},
        "zero_dim": {"temperature": torch.tensor(0.6), "ref_temperature": torch.tensor(1.4)},
    }
    options = choices[which]
    logits = randn(*ROWS, 127, generator=generator, dtype=dtype, scale=2)
    check_kl(logits, randn(*ROWS, 127, generator=generator, dtype=dtype, scale=2), kind="reverse", **options)
    check_kl(logits, randn(*ROWS, 127, generator=generator, dtype=dtype, scale=2), kind="forward", **options)


@pytest.mark.parametrize("kind", KINDS)
def test_mask(backend: str, dtype: torch.dtype, kind: str, generator: torch.Generator) -> None:
    """NaN in every masked slot of both logits and of the incoming gradient."""
    shape = (4, 5)
    mask = random_mask(*shape, generator=generator)
    mask[0], mask[1] = True, False
    inputs = {
        "logits": randn(*shape, 127, generator=generator, dtype=dtype, scale=2),
        "ref_logits": randn(*shape, 127, generator=generator, dtype=dtype, scale=2),
    }
    true, true_grads = with_gradients(
        lambda **x: truths.token_kl(**x, mask=mask, **KINDS[kind]), {k: upcast(v) for k, v in inputs.items()}
    )
    _, eager_grads = with_gradients(lambda **x: truths.token_kl(**x, mask=mask, **KINDS[kind]), inputs)
    for x in inputs.values():
        x[~mask] = NAN
    leaves = {k: v.clone().requires_grad_() for k, v in inputs.items()}
    out = rf.token_kl(**leaves, mask=mask, **KINDS[kind])
    assert bool((out[~mask] == 0).all())
    assert_values(out, true["out"], dtype=dtype)
    weight = incoming("out", out)
    weight[~mask] = NAN
    for side, grad in zip(inputs, torch.autograd.grad(out, list(leaves.values()), weight), strict=True):
        assert bool((grad[~mask] == 0).all()), f"{side}: the gradient of masked rows must be exactly 0"
        assert_gradient(grad, true_grads[side], eager_grads[side], dtype=dtype, what=side)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: str, dtype: torch.dtype, layout: str, generator: torch.Generator) -> None:
    logits, ref_logits = (randn(3, 4, 129, generator=generator, dtype=dtype, scale=2) for _ in range(2))
    strided = LAYOUTS[layout](logits)
    check_kl(strided, LAYOUTS[layout](ref_logits))
    check_kl(strided.contiguous(), ref_logits[:1, :1].expand(strided.shape))  # two layouts in one call


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_only_the_side_that_asks(backend: str, kind: str, generator: torch.Generator) -> None:
    logits, ref_logits = (randn(3, 17, generator=generator) for _ in range(2))
    inputs = {"logits": logits, "ref_logits": ref_logits}
    _, both = with_gradients(lambda **x: rf.token_kl(**x, **KINDS[kind]), inputs)
    _, policy = with_gradients(lambda logits: rf.token_kl(logits, ref_logits, **KINDS[kind]), {"logits": logits})
    _, ref = with_gradients(
        lambda ref_logits: rf.token_kl(logits, ref_logits, **KINDS[kind]), {"ref_logits": ref_logits}
    )
    torch.testing.assert_close(policy["logits"], both["logits"], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ref["ref_logits"], both["ref_logits"], rtol=1e-6, atol=1e-7)
    assert not rf.token_kl(logits, ref_logits, **KINDS[kind]).requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_identical_logits_are_zero_apart(
    backend: str, dtype: torch.dtype, kind: str, generator: torch.Generator
) -> None:
    logits = randn(3, 1037, generator=generator, dtype=dtype, scale=3)
    got, grads = with_gradients(
        lambda logits: rf.token_kl(logits, logits.detach().clone(), **KINDS[kind]), {"logits": logits}
    )
    assert got["out"].abs().max().item() <= 1e-6
    assert grads["logits"].abs().max().item() <= 1e-6
    assert bool((got["out"] >= -1e-6).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offsets", [(1e4, 0.0), (-1e4, 1e4), (1e4, 1e4)])
def test_common_offset(backend: str, kind: str, offsets: tuple[float, float], generator: torch.Generator) -> None:
    """Each side's own constant changes nothing, although each logsumexp is 1e4."""
    logits, ref_logits = (randn(3, 1037, generator=generator, scale=2) + offset for offset in offsets)
    check_kl(logits, ref_logits, **KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["scattered", "tail", "head"])
def test_minus_infinity_on_both_sides(
    backend: str, dtype: torch.dtype, kind: str, where: str, generator: torch.Generator
) -> None:
    """Tokens that both distributions forbid contribute nothing to value or gradient."""
    width = 1037
    dead = {
        "scattered": torch.rand(3, width, generator=generator) < 0.5,
        "tail": (torch.arange(width) >= 1000).expand(3, -1),
        "head": (torch.arange(width) < 64).expand(3, -1),
    }[where]
    logits, ref_logits = (randn(3, width, generator=generator, dtype=dtype, scale=2) for _ in range(2))
    inputs = {"logits": logits.masked_fill(dead, -INF), "ref_logits": ref_logits.masked_fill(dead, -INF)}
    got, grads = with_gradients(lambda **x: rf.token_kl(**x, **KINDS[kind]), inputs)
    nearly = {k: v.double().masked_fill(dead, -600.0) for k, v in inputs.items()}  # exp(-600) is 1e-261
    true, true_grads = with_gradients(lambda **x: truths.token_kl(**x, **KINDS[kind]), nearly)
    assert_values(got["out"], true["out"], dtype=dtype)
    for side, grad in grads.items():
        assert bool((grad[dead] == 0).all())
        assert_gradient(grad, true_grads[side], dtype=dtype, what=side)


def spike(column: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(width, dtype=dtype).index_fill(0, torch.tensor([column]), -INF).expand(2, -1).clone()


@pytest.mark.parametrize("column", [0, 500, 1036])
def test_infinite_kl_has_a_finite_gradient(backend: str, dtype: torch.dtype, column: int) -> None:
    """One side forbids what the other allows: +inf where the formula says so, finite gradients everywhere."""
    open_, closed = torch.zeros(2, 1037, dtype=dtype), spike(column, 1037, dtype)
    for kind, logits, ref_logits, value in [
        ("reverse", open_, closed, INF),
        ("reverse", closed, open_, math.log(1037 / 1036)),
        ("forward", closed, open_, INF),
        ("forward", open_, closed, math.log(1037 / 1036)),
        ("tv", open_, closed, 1 / 1037),
        ("jsd", open_, closed, None),
        ("jsd", closed, open_, None),
    ]:
        got, grads = with_gradients(
            lambda kind=kind, **x: rf.token_kl(**x, kind=kind), {"logits": logits, "ref_logits": ref_logits}
        )
        assert bool(got["out"].isfinite().all()) == (value != INF), kind
        assert not bool(got["out"].isnan().any()), kind
        if value is not None:
            assert got["out"].tolist() == pytest.approx([value] * 2, rel=1e-3, abs=1e-6), kind
        for side, grad in grads.items():
            assert bool(grad.isfinite().all()), f"{kind}: gradient to {side}"


@pytest.mark.parametrize("kind", ["jsd", "tv"])
def test_disjoint_supports(backend: str, dtype: torch.dtype, kind: str) -> None:
    """Nothing in common: TV is 1, JSD is log 2, whatever is -inf."""
    left = torch.full((1, 64), -INF, dtype=dtype)
    right = left.clone()
    left[:, :32], right[:, 32:] = 0.0, 0.0
    got, grads = with_gradients(lambda **x: rf.token_kl(**x, kind=kind), {"logits": left, "ref_logits": right})
    assert got["out"].item() == pytest.approx(1.0 if kind == "tv" else math.log(2), abs=1e-6)
    assert all(bool(g.isfinite().all()) for g in grads.values())


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_minus_infinity_and_nan_stay_alone(backend: str, kind: str, generator: torch.Generator) -> None:
    """A NaN row is NaN; a row without any probability harms no other; gradients of dead rows hold no NaN."""
    logits, ref_logits = (randn(4, 1037, generator=generator) for _ in range(2))
    clean = truths.token_kl(logits.double(), ref_logits.double(), **KINDS[kind])
    logits[1], ref_logits[1] = -INF, -INF
    logits[2, 1030] = NAN
    got, grads = with_gradients(
        lambda **x: rf.token_kl(**x, **KINDS[kind]), {"logits": logits, "ref_logits": ref_logits}
    )
    assert got["out"][2].isnan()
    assert_values(got["out"][[0, 3]], clean[[0, 3]], dtype=torch.float32)
    for grad in grads.values():
        assert bool(grad[[0, 3]].isfinite().all())
        assert bool((grad[1] == 0).all()), "a row without probability takes no gradient"


@pytest.mark.parametrize("kind", KINDS)
def test_a_side_without_probability_takes_no_gradient(backend: str, kind: str, generator: torch.Generator) -> None:
    """Also where the other side has one, and the divergence is +inf."""
    logits, ref_logits = (randn(3, 137, generator=generator) for _ in range(2))
    logits[0], ref_logits[1] = -INF, -INF
    got, grads = with_gradients(
        lambda **x: rf.token_kl(**x, **KINDS[kind]), {"logits": logits, "ref_logits": ref_logits}
    )
    assert not bool(got["out"].isnan().any())
    assert bool((grads["logits"][0] == 0).all()) and bool((grads["ref_logits"][1] == 0).all())
    assert all(bool(grad.isfinite().all()) for grad in grads.values())


def test_tv_takes_the_sign_of_0_as_0(backend: str) -> None:
    """Each side allows six tokens, four of them in common, where p - q is exactly 0."""
    tokens = torch.arange(3, 40, 4)
    common, left, right = tokens[:4], tokens[4:6], tokens[6:8]
    inputs, wanted = {}, {}
    for side, own in (("logits", left), ("ref_logits", right)):
        inputs[side] = torch.full((1, 41), -INF)
        inputs[side][0, torch.cat([common, own])] = 2.0
        wanted[side] = torch.zeros(1, 41, dtype=torch.float64)  # p (s - 1/6), s = 0 or 1/2
        wanted[side][0, common], wanted[side][0, own] = -1 / 36, 1 / 18
    leaves = {k: v.requires_grad_() for k, v in inputs.items()}
    kl = rf.token_kl(**leaves, kind="tv")
    assert kl.item() == pytest.approx(1 / 3, abs=1e-6)
    for (side, true), grad in zip(wanted.items(), torch.autograd.grad(kl.sum(), list(leaves.values())), strict=True):
        assert_gradient(grad, true, dtype=torch.float32, what=side)


@pytest.mark.parametrize("nans", ["one", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_beside_a_row_without_probability_is_nan(
    backend: str, kind: str, nans: str, generator: torch.Generator
) -> None:
    """A side that is all -inf takes part in no product, which must not hide the other side's NaN."""
    logits, ref_logits = (randn(3, 1037, generator=generator) for _ in range(2))
    columns = slice(None) if nans == "all" else slice(500, 501)
    logits[0], ref_logits[0, columns] = -INF, NAN
    logits[1, columns], ref_logits[1] = NAN, -INF
    got, grads = with_gradients(
        lambda **x: rf.token_kl(**x, **KINDS[kind]), {"logits": logits, "ref_logits": ref_logits}
    )
    assert got["out"].isnan().tolist() == [True, True, False]
    assert all(bool(grad[2].isfinite().all()) for grad in grads.values())


@pytest.mark.parametrize("kind", ["reverse", "forward"])
def test_nan_beside_a_forbidden_column_is_nan(backend: str, kind: str, generator: torch.Generator) -> None:
    """A column that only one side forbids makes the divergence infinite, unless the row holds a NaN elsewhere."""
    allowing, forbidding = (randn(3, 1037, generator=generator) for _ in range(2))
    forbidding[:, 40], allowing[0, 900], forbidding[1, 900] = -INF, NAN, NAN
    sides = (allowing, forbidding) if kind == "reverse" else (forbidding, allowing)
    got = rf.token_kl(*sides, kind=kind)
    assert got[:2].isnan().all() and got[2].item() == INF


@pytest.mark.parametrize("kind", KINDS)
def test_empty_and_one_and_all_masked(backend: str, dtype: torch.dtype, kind: str) -> None:
    for shape in [(0,), (0, 4), (3, 0)]:
        leaf = torch.empty(*shape, 9, dtype=dtype, requires_grad=True)
        out = rf.token_kl(leaf, torch.empty(*shape, 9, dtype=dtype), **KINDS[kind])
        assert out.shape == shape
        out.sum().backward()
        assert leaf.grad is not None and leaf.grad.shape == leaf.shape
    one = torch.tensor([1.0, 2.0], dtype=dtype)
    assert rf.token_kl(one, one.flip(0), **KINDS[kind]).item() == pytest.approx(
        truths.token_kl(one.double(), one.flip(0).double(), **KINDS[kind]).item(), abs=1e-6
    )
    leaf = torch.full((2, 9), NAN, dtype=dtype, requires_grad=True)
    out = rf.token_kl(leaf, leaf.detach(), mask=torch.zeros(2, dtype=torch.bool), **KINDS[kind])
    out.sum().backward()
    assert out.tolist() == [0.0, 0.0] and leaf.grad is not None and bool((leaf.grad == 0).all())


@pytest.mark.parametrize("backend", ["native"], indirect=True)
@pytest.mark.parametrize("layout", ["sliced", "first_dims_transposed", "padded_columns"])
def test_memory(backend: str, layout: str, generator: torch.Generator) -> None:
    """The forward copies neither side, however the rows lie in memory."""
    logits, ref_logits = (LAYOUTS[layout](randn(16, 32, 2000, generator=generator)) for _ in range(2))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        rf.token_kl(logits, ref_logits)
    assert 0 < max(event.cpu_memory_usage for event in seen.events()) <= logits.nbytes // 100


def test_more_rows_than_a_launch_dimension(backend: str, generator: torch.Generator) -> None:
    check_kl(randn(70_001, 3, generator=generator), randn(70_001, 3, generator=generator))


@pytest.mark.parametrize("backend", ["native"], indirect=True)  # the reference does read masked rows
@pytest.mark.parametrize("expanded", [True, False], ids=["stride_0", "real_offsets"])
def test_offsets_beyond_int32(lazy_memory: None, backend: str, expanded: bool, generator: torch.Generator) -> None:
    """See the test of the same name in test_logprob_edges.py."""
    rows, width = 20_000, 131_072
    picked = torch.tensor([0, 16_384, rows - 1])
    mask = torch.zeros(rows, dtype=torch.bool)
    mask[picked] = True
    few, ref_row = (randn(n, width, generator=generator, dtype=torch.bfloat16, scale=2) for n in (3, 1))
    if expanded:
        logits = few[:1].expand(rows, width)
    else:
        logits = torch.empty(rows, width, dtype=torch.bfloat16)
        logits[picked] = few
    got = rf.token_kl(logits, ref_row.expand(rows, width), mask=mask)
    true = truths.token_kl((few[:1].expand(3, -1) if expanded else few).double(), ref_row.double())
    assert_values(got[picked], true, dtype=torch.bfloat16)
    assert int((got != 0).sum()) <= 3


def test_bitwise_repeatable(backend: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    inputs = {k: randn(64, 1037, generator=generator, dtype=dtype) for k in ("logits", "ref_logits")}
    (first, first_grads), (second, second_grads) = (with_gradients(rf.token_kl, inputs) for _ in range(2))
    assert torch.equal(first["out"], second["out"])
    assert all(torch.equal(first_grads[k], second_grads[k]) for k in inputs)
