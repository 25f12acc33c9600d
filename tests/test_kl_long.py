# SPDX-License-Identifier: Apache-2.0
"""token_kl on rows that several blocks share, and on vocabularies that are masked in long stretches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.tolerances import assert_gradient, assert_values
from helpers.tools import randn, upcast, with_gradients
from test_kl import KINDS, check_kl

import rlhf_fast as rf

# The interpreter would take minutes; its own splits are met by narrower rows.
compiled = pytest.mark.parametrize(
    "backend, dtype",
    [(backend, dtype) for backend in ("native", "emulated") for dtype in (torch.float32, torch.bfloat16)],
    indirect=["backend"],
)


@compiled
@pytest.mark.parametrize(("rows", "width"), [(1, 80_021), (2, 16_411), (3, 16_411)])
@pytest.mark.parametrize("kind", KINDS)
def test_few_long_rows(
    backend: str, dtype: torch.dtype, kind: str, rows: int, width: int, generator: torch.Generator
) -> None:
    """Several blocks share a row: as a cluster, or, where it needs more than a cluster has, a launch for each step."""
    logits = randn(rows, width, generator=generator, dtype=dtype, scale=3)
    ref_logits = (logits + randn(rows, width, generator=generator)).to(dtype)
    check_kl(logits, ref_logits, **KINDS[kind])
    options = {"temperature": 0.7, "ref_temperature": 1.3, "softcap": 20.0, "logit_scale": -0.5}
    check_kl(logits, ref_logits, vocab_size=width - 411, **KINDS[kind], **options)


@compiled
@pytest.mark.parametrize("kind", ["reverse", "forward"])
@pytest.mark.parametrize("low", ["-inf", "min", "-1e4"])
def test_masked_vocabulary(backend: str, dtype: torch.dtype, kind: str, low: str, generator: torch.Generator) -> None:
    """One side forbids more tokens than the other, over long stretches, by -inf or by a very low number."""
    value = torch.finfo(dtype).min if low == "min" else float(low)
    logits, ref_logits = (randn(3, 4099, generator=generator, dtype=dtype, scale=2) for _ in range(2))
    some = torch.rand(3, 4099, generator=generator) < 0.5
    some[:, :1700] = True
    more = some | (torch.rand(3, 4099, generator=generator) < 0.5)
    more[:, :2500] = True
    names = ("logits", "ref_logits") if kind == "reverse" else ("ref_logits", "logits")
    for temperature in (1.0, 2.0):
        options: dict[str, Any] = {"kind": kind, "temperature": temperature}
        for masks, finite in (((more, some), True), ((some, more), False)):
            pair = zip(names, (logits, ref_logits), masks, strict=True)
            inputs = {name: x.masked_fill(mask, value) for name, x, mask in pair}
            got, grads = with_gradients(lambda **x: rf.token_kl(**x, **options), inputs)  # noqa: B023
            with rf.use_backend("torch"):
                doubles = {k: upcast(v) for k, v in inputs.items()}
                true, true_grads = with_gradients(lambda **x: rf.token_kl(**x, **options), doubles)  # noqa: B023
            if finite:
                assert_values(got["out"], true["out"], dtype=dtype)
            else:
                assert bool((got["out"] > 1e3).all()), "a forbidden token costs all it can"
            if finite or low == "-inf":
                for side, grad in grads.items():
                    assert_gradient(grad, true_grads[side], dtype=dtype, what=side)
