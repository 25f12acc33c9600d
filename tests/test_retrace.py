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
    tokens = ([[2.0, 8.0]], [[1.0, 4.0]], [[77.0, 6.0]], [[-INF, -0.6931471805599453]])
    got = rf.retrace(*(torch.tensor(x) for x in tokens), gamma=0.5, lam=0.5)
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
    assert bool(got[2, :30].isnan().all()) and bool(got[:2].isfinite().all()) and bool(got[2, 30:].isfinite().all())


@pytest.mark.parametrize("mode", MODES)
def test_a_tokens_own_value_has_no_part_in_its_target(backend: str, mode: str, generator: torch.Generator) -> None:
    """Where nothing goes before them, values of 1e7 stand in no target, and cost none its digits."""
    tokens = batch(generator, torch.float32, 3, 40)
    mask, dones, truncated = (torch.full((3, 40), x) for x in (True, False, False))
    mask[1, 20:23], mask[2, :5] = False, False
    dones[:2, 19], truncated[2, 19] = True, True
    first = [(0, 0), (0, 20), (1, 0), (1, 23), (2, 5), (2, 20)]
    for row, t in first:
        tokens[2][row, t] = 1e7
    flags = {"dones": dones, "truncated": truncated, "bootstrap_values": randn(3, 40, generator=generator)}
    got = check_retrace(*tokens, mask=mask, mask_mode=mode, gamma=0.9, lam=0.9, **flags)
    assert float(got.abs().max()) < 100
    assert_values(rf.retrace(*(torch.tensor([x]) for x in ([0.1, 0.1], [0.0, 0.0], [1e7, 0.0], [0.0, 0.0])), gamma=0.9),
                  torch.tensor([[0.19, 0.1]]).double(), dtype=torch.float32)  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_without_discounted_future_it_is_the_reward(backend: str, mode: str, generator: torch.Generator) -> None:
    tokens, mask = batch(generator, torch.float32, 3, 40), random_mask(3, 40, generator=generator, share=0.7)
    got = rf.retrace(*tokens, mask=mask, mask_mode=mode, gamma=0.0)
    assert torch.equal(got, tokens[0].masked_fill(~mask, 0))


@pytest.mark.parametrize("mode", MODES)
def test_what_is_infinite_goes_left_to_an_end(backend: str, mode: str, generator: torch.Generator) -> None:
    """Rows: rewards, without and with a done; values; q_values, of which a token's own is not in its target; a
    bootstrap value; and a factor of 0 before an infinity."""
    shape = (6, 60)
    tokens, mask = batch(generator, torch.float32, *shape), random_mask(*shape, generator=generator, share=0.8)
    mask[:, ::5] = True
    dones, truncated = (torch.zeros(shape, dtype=torch.bool) for _ in range(2))
    bootstrap = randn(*shape, generator=generator)
    dones[1, 20], truncated[4, 50], bootstrap[4, 50] = True, True, -INF
    tokens[0][[0, 1, 5], 50], tokens[2][2, 50], tokens[3][5, 30] = INF, INF, -INF
    options: dict[str, Any] = {"mask": mask, "mask_mode": mode, "dones": dones, "truncated": truncated}
    options.update(bootstrap_values=bootstrap, gamma=0.9, lam=0.9)
    finite = truths.retrace(*(x.double() for x in tokens), **options)[3, 50:]
    tokens[1][3, 50] = INF
    wanted = truths.retrace(*(x.double() for x in tokens), **options)
    wanted[3, 50:] = finite
    signs = wanted[:, [0, 25, 45, 50, 55]].nan_to_num(0, 9, -9).clamp(-9, 9).div(9).trunc().int().tolist()
    assert signs == [[1, 1, 1, 1, 0], [0, 1, 1, 1, 0], [1, 1, 1, 0, 0], [-1, -1, -1, 0, 0], [-1, -1, -1, -1, 0],
                     [0, 0, 1, 1, 0]]  # fmt: skip
    assert bool(wanted[5, :30:5].isnan().all())
    assert_values(rf.retrace(*tokens, **options), wanted, dtype=torch.float32)


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
