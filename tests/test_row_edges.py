# SPDX-License-Identifier: Apache-2.0
"""Where a row kernel can go wrong between its blocks, splits and tiles, although whole rows come out right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import truths
from helpers.tolerances import assert_gradient, assert_values
from helpers.tools import INF, NAN, incoming, randn, random_mask, with_gradients
from torch import Tensor

import rlhf_fast as rf

# Several blocks of any backend's tests. Triton's interpreter reads odd widths in vectors, even ones one by one.
WIDTHS = (1037, 1300)
KINDS = ("reverse", "forward", "jsd", "tv")
ROWS = (1, 3, 7)  # there: many splits, few, one


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
def test_targets_on_both_sides_of_every_block(backend: str, rows: int, width: int, generator: torch.Generator) -> None:
    edges = torch.arange(0, width, 64)
    targets = torch.cat([edges, edges[1:] - 1, torch.tensor([width - 1])]).expand(rows, -1)
    logits = randn(rows, width, generator=generator, scale=2)
    got, grads = with_gradients(lambda logits: rf.token_logprobs(logits, targets), {"logits": logits})
    true, true_grads = with_gradients(
        lambda logits: truths.token_stats(logits, targets)["logprobs"], {"logits": logits.double()}
    )
    assert_values(got["out"], true["out"], dtype=torch.float32)
    assert_gradient(grads["logits"], true_grads["logits"], dtype=torch.float32)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
def test_a_lone_probability_anywhere(backend: str, rows: int, width: int) -> None:
    """All of a row's mass in one column, wherever it is: no lane, block or split is lost or read twice."""
    columns = torch.arange(0, width, 31)
    columns = columns[: columns.numel() // rows * rows].view(-1, rows)
    for places in columns[:: max(1, columns.shape[0] // 6)]:
        logits = torch.zeros(rows, width).scatter_(1, places.unsqueeze(1), 50.0)
        stats = rf.token_stats(logits, places, outputs=("logprobs", "entropy", "argmax"))
        assert torch.equal(stats.argmax, places)
        assert stats.logprobs.abs().max().item() == 0.0 and stats.entropy.abs().max().item() <= 1e-9
        flat = torch.zeros(rows, width)
        true, eager = truths.token_kl(flat.double(), logits.double()), truths.token_kl(flat, logits)
        assert_values(rf.token_kl(flat, logits), true, eager, dtype=torch.float32)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("vocab_size", [None, 1021])
def test_masked_rows_beside_padding(
    backend: str, softcap: float | None, vocab_size: int | None, generator: torch.Generator
) -> None:
    """NaN in masked rows and in padding columns, with and without a softcap, which makes finite numbers of -inf."""
    mask = random_mask(5, generator=generator)
    mask[0], mask[1] = True, False
    options: dict[str, Any] = {"softcap": softcap, "mask": mask, "vocab_size": vocab_size}
    shape = (5, 1037)
    clean = {k: randn(*shape, generator=generator) for k in ("logits", "ref_logits")}
    dirty = {k: v.masked_fill(~mask.unsqueeze(1), NAN) for k, v in clean.items()}
    for x in dirty.values():
        x[:, vocab_size or shape[1] :] = NAN
    targets = torch.tensor([0, 5, 9, 1020, 77])

    def ours(logits: Tensor, ref_logits: Tensor) -> tuple[Tensor | None, ...]:
        stats = rf.token_stats(logits, targets, **options)
        return stats.logprobs, stats.entropy, rf.token_kl(logits, ref_logits, **options)

    def true(logits: Tensor, ref_logits: Tensor) -> tuple[Tensor, ...]:
        stats = truths.token_stats(logits, targets, **options)
        return stats["logprobs"], stats["entropy"], truths.token_kl(logits, ref_logits, **options)

    got, grads = with_gradients(ours, dirty)
    wanted, true_grads = with_gradients(true, {k: v.double() for k, v in clean.items()})
    for name in got:
        assert_values(got[name], wanted[name], dtype=torch.float32, what=name)
    for side in grads:
        assert_gradient(grads[side], true_grads[side], dtype=torch.float32, what=side)


def test_a_target_out_of_range_makes_its_row_nan(backend: str, generator: torch.Generator) -> None:
    """As on a GPU, where nobody looks at targets beforehand: that row is NaN, its padding 0, no other row is hurt."""
    ops = getattr(torch.ops, "rlhf_fast" if backend == "native" else f"rlhf_fast_{backend}")
    columns = 1021
    logits = randn(4, 1037, generator=generator)
    targets = torch.tensor([3, columns, -1, 2**40])
    logprobs, *_, parts = ops.token_stats(logits, targets, None, None, 1.0, 1.0, 0.0, columns, 1, False)
    assert logprobs.isnan().tolist() == [False, True, True, True]
    grad = ops.token_stats_backward(
        torch.ones(4), None, None, logits, targets, None, None, None, parts, 1.0, 1.0, 0.0, columns
    )
    assert bool(grad[0].isfinite().all()) and bool(grad[1:, :columns].isnan().all())
    assert bool((grad[:, columns:] == 0).all())


def test_kl_keeps_every_share_of_a_forbidden_reference(backend: str, generator: torch.Generator) -> None:
    """Columns that only the reference forbids, scattered over blocks and splits: the KL is +inf, and for the
    gradient their log-probability is -104 in all of them."""
    inputs = {k: randn(3, 1037, generator=generator, scale=2) for k in ("logits", "ref_logits")}
    inputs["ref_logits"][torch.rand(3, 1037, generator=generator) < 0.3] = -torch.inf
    inputs["ref_logits"][1, :600] = -torch.inf
    for kind in ("reverse", "forward"):
        sides = inputs if kind == "reverse" else {"logits": inputs["ref_logits"], "ref_logits": inputs["logits"]}
        got, grads = with_gradients(lambda kind=kind, **x: rf.token_kl(**x, kind=kind), sides)
        with rf.use_backend("torch"):
            wanted, true_grads = with_gradients(
                lambda kind=kind, **x: rf.token_kl(**x, kind=kind), {k: v.double() for k, v in sides.items()}
            )
        assert torch.equal(got["out"].double(), wanted["out"]) and bool((got["out"] == torch.inf).all())
        _, both = rf.token_kl_and_grad(**sides, grad_kl=incoming("out", got["out"]), kind=kind)
        for side in grads:
            assert_gradient(grads[side], true_grads[side], dtype=torch.float32, what=f"{kind}, {side}")
        assert_gradient(both, true_grads["logits"], dtype=torch.float32, what=f"{kind}, token_kl_and_grad")


@pytest.mark.parametrize(
    ("kind", "softcap"), [*((kind, None) for kind in ("logprobs", "entropy", "logsumexp", *KINDS)), ("reverse", 5.0)]
)
def test_a_row_that_is_nan_throughout_is_nan_in_value_and_gradient(
    backend: str, kind: str, softcap: float | None, generator: torch.Generator
) -> None:
    """A maximum that passes NaN over stays at -inf there, which is what a row without any probability has."""
    inputs = {k: randn(6, 1037, generator=generator) for k in ("logits", "ref_logits")}
    for x in inputs.values():
        x[1] = NAN
        x[2], x[2, 5] = -INF, NAN
    inputs["logits"][3] = NAN
    inputs["ref_logits"][4] = NAN
    options: dict[str, Any] = {"softcap": softcap}
    targets = torch.arange(6)
    one_side = kind not in KINDS
    hurt = torch.tensor([False, True, True, True, not one_side, False])

    def ours(logits: Tensor, ref_logits: Tensor) -> Tensor:
        if one_side:
            return getattr(rf.token_stats(logits, targets, outputs=(kind,), **options), kind)
        return rf.token_kl(logits, ref_logits, kind=kind, **options)

    leaves = {k: v.clone().requires_grad_() for k, v in inputs.items()}
    got = ours(**leaves)
    got.sum().backward()
    assert torch.equal(got.isnan(), hurt)
    for name, leaf in leaves.items():
        if one_side and name == "ref_logits":
            continue
        assert leaf.grad is not None and bool(leaf.grad[~hurt].isfinite().all())
        finite = leaf.grad[hurt].isfinite()  # at -inf nothing is left to differentiate with softcap
        assert not bool(finite[inputs[name][hurt].isfinite() | inputs[name][hurt].isnan()].any()), name
    if not one_side:
        both = rf.token_kl_and_grad(**inputs, grad_kl=torch.ones(6), kind=kind, **options)
        assert torch.equal(both[0].isnan(), hurt) and not bool(both[1][hurt][:, 6].isfinite().any())


@pytest.mark.parametrize("kind", ["logprobs", *KINDS])
def test_padding_of_a_row_with_a_nan_takes_no_gradient(backend: str, kind: str, generator: torch.Generator) -> None:
    """Its other columns do: their probabilities are NaN."""
    inputs = {k: randn(2, 40, generator=generator) for k in ("logits", "ref_logits")}
    inputs["logits"][1, 3] = NAN

    def ours(logits: Tensor, ref_logits: Tensor) -> Tensor:
        if kind == "logprobs":
            return rf.token_logprobs(logits, torch.tensor([1, 2]), vocab_size=37)
        return rf.token_kl(logits, ref_logits, kind=kind, vocab_size=37)

    sides = ("logits",) if kind == "logprobs" else ("logits", "ref_logits")
    leaves = {k: v.clone().requires_grad_(k in sides) for k, v in inputs.items()}
    grads = torch.autograd.grad(ours(**leaves).sum(), [leaves[k] for k in sides])
    for grad in grads:
        assert bool(grad[1, :37].isnan().any()) and not bool(grad[:, 37:].any())
