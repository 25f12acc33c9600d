# SPDX-License-Identifier: Apache-2.0
"""vtrace: every mask mode, flag, limit and layout against the paper's sum in double precision."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import truths
from helpers.tolerances import assert_values
from helpers.tools import INF, NAN, randn, random_mask, upcast
from torch import Tensor
from torch.nn.functional import pad

import rlhf_fast as rf
from rlhf_fast.ops.vtrace import LARGEST_RATIO, SMALLEST_LIMIT

MODES = ("carry", "zero")
SHAPES = [(1, 1), (1, 2), (3, 1), (2, 17), (5, 128), (17, 33), (33, 5), (1, 1037)]


def check_vtrace(rewards: Tensor, values: Tensor, log_ratios: Tensor, **options: Any) -> None:
    got = rf.vtrace(rewards, values, log_ratios, **options)
    wide = {k: upcast(v) for k, v in options.items()}
    true = truths.vtrace(upcast(rewards), upcast(values), upcast(log_ratios), **wide)
    for name, ours, wanted in zip(("advantages", "returns"), got, true, strict=True):
        assert ours.dtype == (torch.float64 if rewards.dtype == torch.float64 else torch.float32)
        assert not ours.requires_grad
        if options.get("mask") is not None:
            assert bool((ours[~options["mask"]] == 0).all()), f"{name} must be 0 at masked tokens"
        assert_values(ours, wanted, dtype=rewards.dtype, what=name)


def batch(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> list[Tensor]:
    return [randn(*shape, generator=generator, dtype=dtype) for _ in range(3)]


def holes(rows: int, length: int, generator: torch.Generator) -> Tensor:
    """Padding at both sides and holes, one full row and one empty one."""
    mask = random_mask(rows, length, generator=generator, share=0.7)
    for b in range(rows):
        start, stop = sorted(torch.randint(length + 1, (2,), generator=generator).tolist())
        mask[b, :start], mask[b, stop:] = False, False
    mask[0] = True
    if rows > 1:
        mask[1] = False
    return mask


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_plain(backend: str, dtype: torch.dtype, shape: tuple[int, int], generator: torch.Generator) -> None:
    check_vtrace(*batch(generator, dtype, *shape), gamma=0.97, lam=0.9)


@pytest.mark.parametrize("limits", [(1.0, 1.0), (2.5, 0.8), (0.5, 0.5), (LARGEST_RATIO, 1.0), (1.0, 0.01)], ids=str)
def test_limits(backend: str, limits: tuple[float, float], generator: torch.Generator) -> None:
    rewards, values, log_ratios = (x / 2 for x in batch(generator, torch.float32, 5, 41))
    mask = holes(5, 41, generator)
    for mode in MODES:
        check_vtrace(
            rewards, values, log_ratios, rho_clip=limits[0], c_clip=limits[1], gamma=0.97, mask=mask, mask_mode=mode
        )


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (1.0, 0.0), (0.0, 0.5), (0.99, 0.95)])
def test_ends_of_the_range(backend: str, gamma: float, lam: float, generator: torch.Generator) -> None:
    check_vtrace(*batch(generator, torch.float32, 3, 33), gamma=gamma, lam=lam)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("per_row", [False, True])
def test_masks_and_flags(
    backend: str, dtype: torch.dtype, mode: str, per_row: bool, generator: torch.Generator
) -> None:
    """Masked slots hold NaN and are not read; flags at masked tokens are ignored; a done wins over a truncation."""
    shape = (5, 131)
    mask = holes(*shape, generator)
    tokens = [x.masked_fill(~mask, NAN) for x in batch(generator, dtype, *shape)]
    of = shape[:1] if per_row else shape
    share = 0.5 if per_row else 0.1
    dones, truncated = (random_mask(*of, generator=generator, share=share) for _ in range(2))
    read = truncated if per_row else truncated & mask
    bootstrap = randn(*of, generator=generator, dtype=dtype).masked_fill(~read, NAN)
    options: dict[str, Any] = {"mask": mask, "mask_mode": mode, "gamma": 0.97, "lam": 0.9, "rho_clip": 1.5}
    check_vtrace(*tokens, dones=dones, **options)
    check_vtrace(*tokens, dones=dones, truncated=truncated, bootstrap_values=bootstrap, **options)


def test_a_case_worked_by_hand(backend: str) -> None:
    """Ratios 1/2, (masked), 2 with both limits 1; gamma = 1/2. v_2 = 8; v_0 = 2 + (4 + 2 - 2) / 2 + (8 - 4) / 4 = 5."""
    rewards = torch.tensor([[4.0, NAN, 8.0]])
    values = torch.tensor([[2.0, NAN, 4.0]])
    log_ratios = torch.tensor([[0.5, 1.0, 2.0]]).log()
    mask = torch.tensor([[True, False, True]])
    got = rf.vtrace(rewards, values, log_ratios, mask=mask, gamma=0.5)
    assert_values(got.returns, torch.tensor([[5.0, 0.0, 8.0]]).double(), dtype=torch.float32)
    assert_values(got.advantages, torch.tensor([[3.0, 0.0, 4.0]]).double(), dtype=torch.float32)


def test_on_policy_it_is_gae(backend: str, generator: torch.Generator) -> None:
    """IMPALA's remark: with equal policies the targets are the n-step returns."""
    rewards, values, log_ratios = batch(generator, torch.float32, 7, 65)
    mask = holes(7, 65, generator)
    options: dict[str, Any] = {"mask": mask, "gamma": 0.97}
    wanted = truths.gae(rewards.double(), values.double(), lam=0.9, **options)
    got = rf.vtrace(rewards, values, torch.zeros_like(log_ratios), lam=0.9, **options)
    assert_values(got.returns, wanted[1], dtype=torch.float32)
    wanted = truths.gae(rewards.double(), values.double(), lam=1.0, **options)
    got = rf.vtrace(rewards, values, torch.full_like(log_ratios, 3.0), **options)  # limited to 1
    assert_values(got.advantages, wanted[0], dtype=torch.float32)


@pytest.mark.parametrize("rho_clip", [1.0, 8.0])
def test_log_ratios_without_bound(
    backend: str, dtype: torch.dtype, rho_clip: float, generator: torch.Generator
) -> None:
    """A ratio that overflows is limited, one that underflows stays finite, and a NaN stays in its row."""
    rewards, values, _ = batch(generator, dtype, 4, 70)
    log_ratios = torch.zeros(4, 70, dtype=dtype)
    log_ratios[0, 5], log_ratios[0, 30], log_ratios[1, 7], log_ratios[1, 8] = 200.0, -200.0, INF, -INF
    check_vtrace(rewards, values, log_ratios, rho_clip=rho_clip)
    log_ratios[2, 60] = NAN
    got = rf.vtrace(rewards, values, log_ratios, rho_clip=rho_clip)
    for x in got:
        assert bool(x[2, :61].isnan().all()) and bool(x[2, 61:].isfinite().all())
        assert bool(x[[0, 1, 3]].isfinite().all())


def test_only_a_log_ratio_of_minus_infinity_has_a_ratio_of_0(backend: str) -> None:
    """A finite one is at least that of -69, even where exp underflows."""
    rewards, log_ratios = torch.full((1, 4), 1e30), torch.tensor([[-INF, -200.0, -88.0, -69.0]])
    got = rf.vtrace(rewards, torch.zeros(1, 4), log_ratios, gamma=0.0).advantages
    wanted = torch.tensor([[0.0, *(1e30 * math.exp(-69.0),) * 3]])
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=0)


def test_the_smallest_limits(backend: str) -> None:
    """As exact as the limit's logarithm, a float32 in steps of 8e-6."""
    rewards, values = torch.full((1, 3), 1 / SMALLEST_LIMIT), torch.zeros(1, 3)
    log_ratios = torch.tensor([[0.0, -68.0, -65.0]])
    options: dict[str, Any] = {"rho_clip": SMALLEST_LIMIT, "c_clip": SMALLEST_LIMIT}
    got = rf.vtrace(rewards, values, log_ratios, gamma=0.0, **options)
    wanted = truths.vtrace(rewards.double(), values.double(), log_ratios.double(), gamma=0.0, **options)
    for ours, true in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=1e-5, atol=0)
    infinite = rf.vtrace(torch.tensor([[0.0, INF]]), torch.zeros(1, 2), torch.zeros(1, 2), **options)
    assert torch.equal(infinite.returns, torch.full((1, 2), INF))  # no factor has become 0


def test_neighbours_at_the_largest_limit_are_finite(backend: str) -> None:
    """Two limited ratios multiply in an advantage. The limit's logarithm is a float32, in steps of 4e-6."""
    rewards, values, log_ratios = torch.ones(1, 40), torch.zeros(1, 40), torch.full((1, 40), 100.0)
    got = rf.vtrace(rewards, values, log_ratios, rho_clip=LARGEST_RATIO)
    wanted = truths.vtrace(rewards.double(), values.double(), log_ratios.double(), rho_clip=LARGEST_RATIO)
    for ours, true in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=1e-5, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_packed_equals_padded(backend: str, dtype: torch.dtype, mode: str, generator: torch.Generator) -> None:
    lengths = [5, 1, 0, 37, 128, 2, 0, 131]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    total = sum(lengths)
    mask = random_mask(total, generator=generator, share=0.8)
    tokens = [x.masked_fill(~mask, NAN) for x in batch(generator, dtype, total)]
    dones, truncated = (random_mask(total, generator=generator, share=0.1) for _ in range(2))
    bootstrap = randn(total, generator=generator, dtype=dtype)
    options: dict[str, Any] = {"gamma": 0.97, "lam": 0.9, "c_clip": 0.7, "mask_mode": mode}
    flags = {"mask": mask, "dones": dones, "truncated": truncated, "bootstrap_values": bootstrap}
    got = rf.vtrace(*tokens, cu_seqlens=cu_seqlens, **flags, **options)
    for start, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        row = [upcast(x)[None, start:stop] for x in tokens]
        of_row = {k: upcast(v)[None, start:stop] for k, v in flags.items()}
        for ours, wanted in zip(got, truths.vtrace(*row, **of_row, **options), strict=True):
            assert_values(ours[start:stop], wanted[0], dtype=dtype)


@pytest.mark.parametrize("backend", [pytest.param("emulated", id="emulated-fp32")], indirect=True)
@pytest.mark.parametrize(
    "bounds", [[0, 400, 5000], [-40, 30, 90], [0, 400, -7], [900, 20, 400], [2**62, -(2**62), 5]], ids=str
)
def test_bounds_that_no_host_has_seen(backend: str, bounds: list[int], generator: torch.Generator) -> None:
    """On a GPU cu_seqlens cannot be checked: whatever it holds, nothing outside of the tensors is read or written.

    Around the inputs is NaN, and in the outputs before they are written; what is written around the outputs is seen by
    AddressSanitizer, under which test_emulator.py runs this test.
    """
    length, around = 1300, 4096
    tokens = [pad(x, (around, around), value=NAN)[around:-around] for x in batch(generator, torch.float32, length)]
    got = torch.ops.rlhf_fast_emulated.vtrace(*tokens, *(None,) * 4, torch.tensor(bounds), 0.97, 0.9, 1.0, 1.0, True)
    wanted = torch.full((2, length), NAN, dtype=torch.float64)
    inside = [min(max(x, 0), length) for x in bounds]
    for start, stop in zip(inside[:-1], inside[1:], strict=True):
        if start < stop:
            row = [x[None, start:stop].double() for x in tokens]
            wanted[:, start:stop] = torch.cat(truths.vtrace(*row, gamma=0.97, lam=0.9))
    for ours, true in zip(got, wanted, strict=True):
        assert_values(ours, true, dtype=torch.float32)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "unaligned"])
def test_layouts(backend: str, layout: str, generator: torch.Generator) -> None:
    def lay(x: Tensor) -> Tensor:
        if layout == "transposed":
            return x.t().contiguous().t()
        if layout == "sliced":
            return torch.cat([x[:, :1], x, x[:, :1]], dim=1)[:, 1:-1]
        return torch.cat([x.reshape(-1)[:1], x.reshape(-1)])[1:].view(x.shape)

    for shape in ((7, 33), (3, 64)):
        mask, dones = lay(holes(*shape, generator)), lay(random_mask(*shape, generator=generator, share=0.1))
        check_vtrace(*(lay(x) for x in batch(generator, torch.float32, *shape)), mask=mask, dones=dones)


def test_empty_and_all_masked(backend: str, dtype: torch.dtype) -> None:
    for shape in [(0, 4), (3, 0), (0, 0)]:
        empty = torch.empty(shape, dtype=dtype)
        assert [x.shape for x in rf.vtrace(empty, empty, empty)] == [shape, shape]
    nothing = torch.empty(0, dtype=dtype)
    for cu_seqlens in (torch.tensor([0]), torch.tensor([0, 0, 0])):
        assert rf.vtrace(nothing, nothing, nothing, cu_seqlens=cu_seqlens)[0].shape == (0,)
    unread = torch.full((2, 5), NAN, dtype=dtype)
    for mode in MODES:
        for out in rf.vtrace(unread, unread, unread, mask=torch.zeros(2, 5, dtype=torch.bool), mask_mode=mode):
            assert bool((out == 0).all())


@pytest.mark.parametrize("mode", MODES)
def test_a_long_row_with_a_long_gap(backend: str, mode: str, generator: torch.Generator) -> None:
    """The states come through every tile, also those without a real token. Eighths are summed without rounding."""
    rewards, values = (torch.randint(-16, 17, (2, 1500), generator=generator) / 8 for _ in range(2))
    log_ratios = torch.where(random_mask(2, 1500, generator=generator, share=0.01), -INF, 0.0)
    mask = random_mask(2, 1500, generator=generator, share=0.8)
    mask[0, 200:1300] = False
    check_vtrace(rewards, values, log_ratios, mask=mask, mask_mode=mode)


def test_infinite_rewards_go_left_to_a_done(backend: str, generator: torch.Generator) -> None:
    rewards, values, _ = batch(generator, torch.float32, 2, 300)
    dones = torch.zeros(2, 300, dtype=torch.bool)
    dones[1, 40] = True
    rewards[:, 280] = INF
    check_vtrace(rewards, values, torch.full_like(values, -2.0), dones=dones, gamma=0.9)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("gamma", "lam"), [(0.97, 0.9), (0.97, 0.0), (0.0, 0.9)])
def test_zero_times_infinity(backend: str, gamma: float, lam: float, mode: str, generator: torch.Generator) -> None:
    """A factor of 0 before an infinity gives NaN, up to an episode's end, in whichever tile, warp or lane it is. A
    finite log-ratio has no such factor, however low it is; a masked token is not read."""
    rewards, values, log_ratios = (x.clamp(-2, 2) for x in batch(generator, torch.float32, 5, 600))
    mask = random_mask(5, 600, generator=generator, share=0.9)
    dones = torch.zeros(5, 600, dtype=torch.bool)
    mask[:, ::10], mask[:, 1::10] = True, False
    rewards[:3, 590] = INF
    rewards[3, 590], values[4, 300] = -INF, INF
    log_ratios[0, 300], log_ratios[1, 570], log_ratios[2, 580], log_ratios[3, 310] = -INF, -INF, -200.0, -90.0
    log_ratios[4, 40] = -INF
    dones[1, 100], dones[2, 200], dones[4, 20] = True, True, True
    log_ratios[:, 501] = -INF  # masked
    options: dict[str, Any] = {"mask": mask, "mask_mode": mode, "dones": dones, "gamma": gamma, "lam": lam}
    check_vtrace(rewards, values, log_ratios, **options)


def test_limits_that_cannot_be() -> None:
    x = torch.zeros(1, 3)
    wrong: list[dict[str, float]] = [{"c_clip": x} for x in (1.5, 0.0, 9e-30, NAN)]
    wrong += [{"rho_clip": x} for x in (0.5, 1e16, NAN)] + [{"rho_clip": 9e-30, "c_clip": SMALLEST_LIMIT}]
    for options in wrong:
        with pytest.raises(ValueError, match=rf"^rlhf_fast\.vtrace: {next(iter(options))} must be "):
            rf.vtrace(x, x, x, **options)
    with pytest.raises(ValueError, match=r"^rlhf_fast\.vtrace: log_ratios "):
        rf.vtrace(x, x, x[:, :2])


def test_no_gradient_and_bitwise_repeatable(backend: str, generator: torch.Generator) -> None:
    tokens = [x.requires_grad_() for x in batch(generator, torch.float32, 16, 200)]
    first, second = rf.vtrace(*tokens), rf.vtrace(*tokens)
    assert not first.advantages.requires_grad
    assert torch.equal(first.advantages, second.advantages) and torch.equal(first.returns, second.returns)
