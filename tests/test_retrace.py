# SPDX-License-Identifier: Apache-2.0
"""retrace: every mask mode, flag and layout against the paper's sum in double precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import truths
from helpers.tolerances import assert_values
from helpers.tools import INF, NAN, randn, random_mask, upcast
from torch import Tensor

import rlhf_fast as rf

MODES = ("carry", "zero")


def check_retrace(*tokens: Tensor, **options: Any) -> Tensor:
    """rewards, q_values, values, log_ratios."""
    got = rf.retrace(*tokens, **options)
    wanted = truths.retrace(*(upcast(x) for x in tokens), **{k: upcast(v) for k, v in options.items()})
    assert got.dtype == (torch.float64 if tokens[0].dtype == torch.float64 else torch.float32)
    assert_values(got, wanted, dtype=tokens[0].dtype)
    return got


def batch(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> list[Tensor]:
    return [randn(*shape, generator=generator, dtype=dtype) for _ in range(4)]


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2, 17), (17, 33), (1, 530)], ids=str)
def test_plain(backend: str, dtype: torch.dtype, shape: tuple[int, int], generator: torch.Generator) -> None:
    check_retrace(*batch(generator, dtype, *shape), gamma=0.97, lam=0.9)


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (1.0, 0.0), (0.0, 0.5)])
def test_ends_of_the_range(backend: str, gamma: float, lam: float, generator: torch.Generator) -> None:
    check_retrace(*batch(generator, torch.float32, 3, 33), gamma=gamma, lam=lam)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("per_row", [False, True])
def test_masks_and_flags(
    backend: str, dtype: torch.dtype, mode: str, per_row: bool, generator: torch.Generator
) -> None:
    """Masked slots hold NaN and are not read; flags at masked tokens are ignored; a done wins over a truncation."""
    shape = (5, 67)
    mask = random_mask(*shape, generator=generator, share=0.7)
    mask[0], mask[1], mask[2, :20], mask[3, 40:] = True, False, False, False
    tokens = [x.masked_fill(~mask, NAN) for x in batch(generator, dtype, *shape)]
    of, share = (shape[:1], 0.5) if per_row else (shape, 0.1)
    dones, truncated = (random_mask(*of, generator=generator, share=share) for _ in range(2))
    read = truncated if per_row else truncated & mask
    bootstrap = randn(*of, generator=generator, dtype=dtype).masked_fill(~read, NAN)
    flags: dict[str, Any] = {"dones": dones, "truncated": truncated, "bootstrap_values": bootstrap}
    got = check_retrace(*tokens, mask=mask, mask_mode=mode, gamma=0.97, lam=0.9, **flags)
    assert bool((got[~mask] == 0).all())


@pytest.mark.parametrize("mode", MODES)
def test_packed_equals_padded(backend: str, dtype: torch.dtype, mode: str, generator: torch.Generator) -> None:
    lengths = [5, 1, 0, 37, 131]
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    mask = random_mask(bounds[-1], generator=generator, share=0.8)
    tokens = [x.masked_fill(~mask, NAN) for x in batch(generator, dtype, bounds[-1])]
    options: dict[str, Any] = {"gamma": 0.97, "lam": 0.9, "mask_mode": mode}
    got = rf.retrace(*tokens, mask=mask, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), **options)
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        row = [upcast(x)[None, start:stop] for x in tokens]
        assert_values(got[start:stop], truths.retrace(*row, mask=mask[None, start:stop], **options)[0], dtype=dtype)


def test_a_case_worked_by_hand(backend: str) -> None:
    """gamma = lam = 1/2. delta = 2 + 6/2 - 1 = 4, then 8 + 0 - 4 = 4. Q' = 1 + 4 + (1/2) (1/2 . 1/2) 4 = 5.5, then 8;
    the first token's own ratio has no part in it."""
    tokens = ([[2.0, 8.0]], [[1.0, 4.0]], [[NAN, 6.0]], [[-INF, -0.6931471805599453]])
    rewards, q_values, values, log_ratios = (torch.tensor(x) for x in tokens)
    got = rf.retrace(rewards, q_values, values.nan_to_num(77.0), log_ratios, gamma=0.5, lam=0.5)
    assert_values(got, torch.tensor([[5.5, 8.0]]).double(), dtype=torch.float32)


def test_with_state_values_it_is_vtrace(backend: str, generator: torch.Generator) -> None:
    """As the docstring has it: V-trace's advantage is ratio (target - V)."""
    rewards, values, log_ratios, _ = batch(generator, torch.float32, 4, 50)
    targets = rf.retrace(rewards, values, values, log_ratios, gamma=0.97)
    wanted = rf.vtrace(rewards, values, log_ratios, gamma=0.97).advantages
    assert_values(log_ratios.clamp(max=0).exp() * (targets - values), wanted.double(), dtype=torch.float32)
    known = rf.gae(rewards, values, gamma=0.97, lam=0).returns
    assert_values(rf.retrace(rewards, known, values, log_ratios, gamma=0.97), known.double(), dtype=torch.float32)


def test_log_ratios_without_bound(backend: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    rewards, q_values, values, log_ratios = batch(generator, dtype, 3, 40)
    log_ratios[0, 5], log_ratios[0, 30], log_ratios[1, 7], log_ratios[1, 8] = 200.0, -200.0, INF, -INF
    check_retrace(rewards, q_values, values, log_ratios)
    log_ratios[2, 30] = NAN
    got = rf.retrace(rewards, q_values, values, log_ratios)
    assert bool(got[2, :31].isnan().all()) and bool(got[:2].isfinite().all()) and bool(got[2, 31:].isfinite().all())


def test_what_is_not_finite_goes_left_to_a_done(backend: str, generator: torch.Generator) -> None:
    tokens = batch(generator, torch.float32, 2, 60)
    dones = torch.zeros(2, 60, dtype=torch.bool)
    dones[1, 20] = True
    tokens[0][:, 50] = INF
    wanted = truths.retrace(*(x.double() for x in tokens), dones=dones, gamma=0.9)
    assert bool(wanted[0, :51].isinf().all()) and bool(wanted[1, 21:51].isinf().all())
    wanted = wanted.where(wanted.isfinite(), NAN)  # as the docstring says
    assert_values(rf.retrace(*tokens, dones=dones, gamma=0.9), wanted, dtype=torch.float32)


def test_layouts_and_empty_batches(backend: str, generator: torch.Generator) -> None:
    tokens = batch(generator, torch.float32, 6, 33)
    wanted = rf.retrace(*tokens)
    assert torch.equal(rf.retrace(*(x.t().contiguous().t() for x in tokens)), wanted)
    assert torch.equal(rf.retrace(*(torch.cat([x[:, :1], x], dim=1)[:, 1:] for x in tokens)), wanted)
    for shape in [(0, 4), (3, 0)]:
        assert rf.retrace(*[torch.empty(shape)] * 4).shape == shape


def test_wrong_arguments() -> None:
    x = torch.zeros(1, 3)
    for options in ({"gamma": 1.5}, {"lam": -0.1}, {"mask_mode": "skip"}):
        with pytest.raises(ValueError, match=rf"^rlhf_fast\.retrace: {next(iter(options))} must be "):
            rf.retrace(x, x, x, x, **options)
    with pytest.raises(ValueError, match=r"^rlhf_fast\.retrace: q_values "):
        rf.retrace(x, x[:, :2], x, x)
