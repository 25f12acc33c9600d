# SPDX-License-Identifier: Apache-2.0
"""gae: every mask mode, flag, lambda and layout against a Python loop in double precision."""

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
ON_GPU = ("native@cuda", "triton@cuda") if torch.cuda.is_available() else ()

# One row and many, one token, odd lengths, lengths past any vector or block, rows past a lane count.
SHAPES = [(1, 1), (1, 2), (3, 1), (2, 17), (5, 128), (9, 131), (17, 33), (33, 5), (1, 1037)]


def check_gae(rewards: Tensor, values: Tensor, **options: Any) -> None:
    dtype = rewards.dtype
    got = rf.gae(rewards, values, **options)
    true = truths.gae(upcast(rewards), upcast(values), **{k: upcast(v) for k, v in options.items()})
    for name, ours, wanted in zip(("advantages", "returns"), got, true, strict=True):
        assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert not ours.requires_grad
        mask = options.get("mask")
        if mask is not None:
            assert bool((ours[~mask] == 0).all()), f"{name} must be 0 at masked tokens"
        assert_values(ours, wanted, dtype=dtype, what=name)


def batch(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> tuple[Tensor, Tensor]:
    return randn(*shape, generator=generator, dtype=dtype), randn(*shape, generator=generator, dtype=dtype)


def padded_mask(rows: int, length: int, generator: torch.Generator) -> Tensor:
    """Left and right padding and holes, one full row and one empty one: what RLHF batches look like, and worse."""
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
    rewards, values = batch(generator, dtype, *shape)
    check_gae(rewards, values)
    check_gae(rewards, values, gamma=0.9, lam=0.7)


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (1.0, 0.0), (0.0, 0.5), (0.99, 0.95)])
def test_ends_of_the_range(
    backend: str, dtype: torch.dtype, gamma: float, lam: float, generator: torch.Generator
) -> None:
    rewards, values = batch(generator, dtype, 3, 33)
    check_gae(rewards, values, gamma=gamma, lam=lam)
    check_gae(rewards, values, gamma=gamma, lam=lam, mask=padded_mask(3, 33, generator), mask_mode="zero")


def test_a_case_worked_by_hand(backend: str, dtype: torch.dtype) -> None:
    """gamma = lam = 1/2, the middle token masked away: carry skips it, zero lets it count as a step."""
    rewards = torch.tensor([[1.0, 100.0, 2.0]], dtype=dtype)
    values = torch.tensor([[4.0, 100.0, 8.0]], dtype=dtype)
    mask = torch.tensor([[True, False, True]])
    # last: 2 - 8 = -6.  first, carry: 1 + 8/2 - 4 + (-6)/4 = -0.5
    advantages, returns = rf.gae(rewards, values, mask=mask, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[-0.5, 0.0, -6.0]] and returns.tolist() == [[3.5, 0.0, 2.0]]
    # middle, zero: 0 + 8/2 - 0 + (-6)/4 = 2.5.  first: 1 + 0/2 - 4 + 2.5/4 = -2.375
    advantages, returns = rf.gae(rewards, values, mask=mask, gamma=0.5, lam=0.5, mask_mode="zero")
    assert advantages.tolist() == [[-2.375, 0.0, -6.0]] and returns.tolist() == [[1.625, 0.0, 2.0]]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mask(backend: str, dtype: torch.dtype, mode: str, shape: tuple[int, int], generator: torch.Generator) -> None:
    """NaN in every masked slot of rewards and values."""
    mask = padded_mask(*shape, generator)
    rewards, values = (x.masked_fill(~mask, NAN) for x in batch(generator, dtype, *shape))
    check_gae(rewards, values, mask=mask, mask_mode=mode, gamma=0.97, lam=0.9)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("flags", ["dones", "truncated", "both"])
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
def test_flags(
    backend: str, dtype: torch.dtype, masked: bool, flags: str, mode: str, generator: torch.Generator
) -> None:
    """A done cuts the row, a truncation cuts it and bootstraps, done wins, flags at masked tokens are ignored."""
    shape = (9, 41)
    rewards, values = batch(generator, dtype, *shape)
    bootstrap = randn(*shape, generator=generator, dtype=dtype)
    options: dict[str, Any] = {"mask_mode": mode, "gamma": 0.97, "lam": 0.9}
    if masked:
        mask = padded_mask(*shape, generator)
        rewards, values = (x.masked_fill(~mask, NAN) for x in (rewards, values))
        options["mask"] = mask
    if flags != "truncated":
        options["dones"] = torch.rand(shape, generator=generator) < 0.2
    if flags != "dones":
        truncated = torch.rand(shape, generator=generator) < 0.2
        read = truncated & options.get("mask", True)
        options |= {"truncated": truncated, "bootstrap_values": bootstrap.masked_fill(~read, NAN)}
    check_gae(rewards, values, **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("with_dones", [False, True])
def test_flags_of_the_last_real_token(
    backend: str, dtype: torch.dtype, with_dones: bool, mode: str, generator: torch.Generator
) -> None:
    """(B,) flags: the last real token of the row, wherever that is; a row without one ignores them."""
    shape = (9, 41)
    mask = padded_mask(*shape, generator)
    rewards, values = (x.masked_fill(~mask, NAN) for x in batch(generator, dtype, *shape))
    truncated = torch.rand(9, generator=generator) < 0.7
    truncated[0], truncated[1] = True, True
    options: dict[str, Any] = {
        "mask": mask,
        "mask_mode": mode,
        "gamma": 0.97,
        "truncated": truncated,
        "bootstrap_values": randn(9, generator=generator, dtype=dtype).masked_fill(~truncated, NAN),
    }
    if with_dones:
        options["dones"] = torch.rand(9, generator=generator) < 0.5
    check_gae(rewards, values, **options)
    del options["mask"]
    check_gae(*batch(generator, dtype, *shape), **options)


def test_flags_of_rows_when_rows_equal_tokens(backend: str, generator: torch.Generator) -> None:
    """B == T must not make a (B,) flag look like a row of (B, T)."""
    rewards, values = batch(generator, torch.float32, 6, 6)
    truncated = torch.tensor([True, False, True, False, False, True])
    check_gae(rewards, values, truncated=truncated, bootstrap_values=randn(6, generator=generator))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("which", ["lam", "value_lam", "both", "value_lam_float"])
def test_lambdas(backend: str, dtype: torch.dtype, which: str, mode: str, generator: torch.Generator) -> None:
    """Per-row lam; value_lam makes the returns by its own recurrence (VAPO) in the same pass."""
    shape = (9, 41)
    mask = padded_mask(*shape, generator)
    rewards, values = (x.masked_fill(~mask, NAN) for x in batch(generator, dtype, *shape))
    lam, value_lam = (torch.rand(9, generator=generator) for _ in range(2))
    choices: dict[str, dict[str, Any]] = {
        "lam": {"lam": lam},
        "value_lam": {"value_lam": value_lam},
        "both": {"lam": lam, "value_lam": value_lam},
        "value_lam_float": {"lam": 0.9, "value_lam": 1.0},
    }
    options = choices[which]
    check_gae(rewards, values, mask=mask, mask_mode=mode, gamma=0.97, **options)
    dones = torch.rand(shape, generator=generator) < 0.1
    check_gae(rewards, values, mask=mask, mask_mode=mode, gamma=0.97, dones=dones, **options)


def packed(rows: list[Tensor]) -> Tensor:
    return torch.cat(rows)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_packed_equals_padded(
    backend: str, dtype: torch.dtype, index_dtype: torch.dtype, mode: str, generator: torch.Generator
) -> None:
    """Sequence by sequence what the loop gives; nothing leaks over a boundary; empty sequences are legal."""
    lengths = [5, 1, 0, 37, 128, 2, 0, 131]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(index_dtype)
    rows: list[dict[str, Tensor]] = []
    lam, value_lam = (torch.rand(len(lengths), generator=generator) for _ in range(2))
    for length in lengths:
        mask = random_mask(length, generator=generator, share=0.8)
        truncated = random_mask(length, generator=generator, share=0.1)
        rows.append(
            {
                "rewards": randn(length, generator=generator, dtype=dtype).masked_fill(~mask, NAN),
                "values": randn(length, generator=generator, dtype=dtype).masked_fill(~mask, NAN),
                "mask": mask,
                "dones": random_mask(length, generator=generator, share=0.1),
                "truncated": truncated,
                "bootstrap_values": randn(length, generator=generator, dtype=dtype).masked_fill(
                    ~(truncated & mask), NAN
                ),
            }
        )
    flat = {k: packed([row[k] for row in rows]) for k in rows[0]}
    got = rf.gae(**flat, cu_seqlens=cu_seqlens, lam=lam, value_lam=value_lam, gamma=0.97, mask_mode=mode)
    truth_rows = [
        truths.gae(
            **{k: upcast(v).unsqueeze(0) for k, v in row.items()},
            lam=lam[i : i + 1].double(),
            value_lam=value_lam[i : i + 1].double(),
            gamma=0.97,
            mask_mode=mode,
        )
        for i, row in enumerate(rows)
    ]
    for which, name in enumerate(("advantages", "returns")):
        wanted = packed([row[which].squeeze(0) for row in truth_rows])
        assert_values(got[which], wanted, dtype=dtype, what=name)


def test_flags_that_could_be_per_token_or_per_row() -> None:
    """As many sequences as tokens and some are empty: the flags of one would be taken for those of the other."""
    rewards = torch.ones(2)
    flags = {"truncated": torch.tensor([True, False]), "bootstrap_values": torch.tensor([10.0, 0.0])}
    with pytest.raises(ValueError, match="some of them empty, they cannot be told apart"):
        rf.gae(rewards, rewards, cu_seqlens=torch.tensor([0, 2, 2]), **flags)
    got = rf.gae(rewards, rewards, cu_seqlens=torch.tensor([0, 1, 2]), **flags).advantages  # the same either way
    assert got.tolist() == [10, 0]


def test_packed_plain_and_float_lam(backend: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    rewards, values = batch(generator, dtype, 10)
    got = rf.gae(rewards, values, cu_seqlens=torch.tensor([0, 4, 10]), lam=0.8, gamma=0.9)
    for start, stop in [(0, 4), (4, 10)]:
        true = truths.gae(rewards[None, start:stop].double(), values[None, start:stop].double(), lam=0.8, gamma=0.9)
        assert_values(got[0][start:stop], true[0][0], dtype=dtype)
        assert_values(got[1][start:stop], true[1][0], dtype=dtype)


@pytest.mark.parametrize("backend", ["emulated"], indirect=True)
@pytest.mark.parametrize("bounds", [
    [0, 400, 5000], [0, 400, -7], [900, 20, 400], [2**62, -(2**62), 5], [-(2**63), 2**63 - 1], [7] * 9, [-5, 0, 0, 3],
], ids=str)  # fmt: skip
def test_bounds_that_no_host_has_seen(backend: str, bounds: list[int], generator: torch.Generator) -> None:
    """On a GPU cu_seqlens cannot be checked: whatever it holds, nothing outside of the tensors is read or written."""
    rewards, values = batch(generator, torch.float32, 1300)
    lam = torch.rand(len(bounds) - 1, generator=generator)

    def run(cu_seqlens: list[int]) -> Tensor:
        none = (None,) * 4
        return torch.ops.rlhf_fast_emulated.gae(
            rewards, values, *none, torch.tensor(cu_seqlens), lam, lam, 0.97, 0.0, 0.0, True
        )[0]

    got = run(bounds)
    assert got.shape == rewards.shape
    if bounds == [0, 400, 5000]:
        assert torch.equal(got, run([0, 400, 1300]))


@pytest.mark.parametrize("backend", ["native", "emulated"], indirect=True)
@pytest.mark.parametrize("bounds", [[], [0]], ids=str)
def test_tokens_of_no_sequence_are_refused(backend: str, bounds: list[int]) -> None:
    """By the number of bounds alone, which can be seen on every device."""
    ops = torch.ops.rlhf_fast if backend == "native" else torch.ops.rlhf_fast_emulated
    x, none, cu_seqlens = torch.zeros(5), (None,) * 4, torch.tensor(bounds, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=f"gae: cu_seqlens must have .* one more, got {len(bounds)} for 5 tokens"):
        ops.gae(x, x, *none, cu_seqlens, None, None, 1.0, 1.0, 1.0, True)
    with pytest.raises(RuntimeError, match=f"vtrace: cu_seqlens must have .*, got {len(bounds)} for 5 tokens"):
        ops.vtrace(x, x, x, *none, cu_seqlens, 1.0, 1.0, 1.0, 1.0, True)
    there, unseen = torch.zeros(5, device="meta"), cu_seqlens.to("meta")
    with pytest.raises(ValueError, match=r"gae: cu_seqlens must be \(S \+ 1,\)"):
        rf.gae(there, there, cu_seqlens=unseen)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "unaligned"])
def test_layouts(backend: str, dtype: torch.dtype, layout: str, generator: torch.Generator) -> None:
    def lay(x: Tensor) -> Tensor:
        if layout == "transposed":
            return x.t().contiguous().t()
        if layout == "sliced":
            return torch.cat([x[:, :1], x, x[:, :1]], dim=1)[:, 1:-1]
        if layout == "expanded":
            return x[:1].expand(x.shape)
        return torch.cat([x.reshape(-1)[:1], x.reshape(-1)])[1:].view(x.shape)

    shape = (7, 33)
    mask = lay(padded_mask(*shape, generator))
    rewards, values, bootstrap = (lay(randn(*shape, generator=generator, dtype=dtype)) for _ in range(3))
    dones, truncated = (lay(torch.rand(shape, generator=generator) < 0.1) for _ in range(2))
    lam = torch.rand(7, 2, generator=generator)[:, 0]
    check_gae(rewards, values)
    check_gae(
        rewards,
        values,
        mask=mask,
        dones=dones,
        truncated=truncated,
        bootstrap_values=bootstrap,
        lam=lam,
    )


def test_empty_and_all_masked(backend: str, dtype: torch.dtype) -> None:
    for shape in [(0, 4), (3, 0), (0, 0)]:
        empty = torch.empty(shape, dtype=dtype)
        assert [x.shape for x in rf.gae(empty, empty)] == [shape, shape]
        mask = torch.empty(shape, dtype=torch.bool)
        assert [x.shape for x in rf.gae(empty, empty, mask=mask)] == [shape, shape]
    nothing = torch.empty(0, dtype=dtype)
    for cu_seqlens in (torch.tensor([0]), torch.tensor([0, 0, 0])):
        assert rf.gae(nothing, nothing, cu_seqlens=cu_seqlens)[0].shape == (0,)
    holes = torch.full((2, 5), NAN, dtype=dtype)
    for mode in MODES:
        for out in rf.gae(holes, holes, mask=torch.zeros(2, 5, dtype=torch.bool), mask_mode=mode):
            assert bool((out == 0).all())


def test_more_rows_than_a_launch_dimension(backend: str, generator: torch.Generator) -> None:
    rewards, values = batch(generator, torch.float32, 70_001, 2)
    advantages, returns = rf.gae(rewards, values, gamma=0.9, lam=0.8)
    last = rewards[:, 1].double() - values[:, 1].double()
    first = rewards[:, 0].double() + 0.9 * values[:, 1].double() - values[:, 0].double() + 0.72 * last
    assert_values(advantages, torch.stack([first, last], 1), dtype=torch.float32)
    assert_values(returns, torch.stack([first, last], 1) + values.double(), dtype=torch.float32)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "backend, length",
    [
        ("torch", 2_000),
        ("native", 17_500),
        ("emulated", 17_500),
        *(pytest.param(name, 150_000, marks=pytest.mark.gpu) for name in ON_GPU),
    ],
    indirect=["backend"],
)
def test_a_row_as_long_as_a_book(backend: str, length: int, mode: str, generator: torch.Generator) -> None:
    """The state comes through a long stretch without a real token, and through every tile where rows are cut up.

    Eighths, undiscounted, are summed without rounding: a token that is lost or counted twice shows.
    """
    rewards, values = (torch.randint(-16, 17, (1, length), generator=generator) / 8 for _ in range(2))
    mask = random_mask(1, length, generator=generator, share=0.8)
    mask[0, length // 6 : length // 3] = False
    rewards, values = (x.masked_fill(~mask, NAN) for x in (rewards, values))
    check_gae(rewards, values, mask=mask, mask_mode=mode, gamma=1.0, lam=1.0)


def test_many_packed_sequences(backend: str, generator: torch.Generator) -> None:
    """Sequences of every length below 60 and empty ones between them, each with its own lam and value_lam."""
    lengths = torch.randint(60, (40,), generator=generator)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    total = int(cu_seqlens[-1])
    rewards, values = batch(generator, torch.float32, total)
    mask = random_mask(total, generator=generator, share=0.8)
    lam, value_lam = (torch.rand(40, generator=generator) for _ in range(2))
    options: dict[str, Any] = {"mask": mask, "cu_seqlens": cu_seqlens, "gamma": 0.97}
    got = rf.gae(rewards, values, **options, lam=lam, value_lam=value_lam)
    for s, (start, stop) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
        row = [x[None, start:stop] for x in (rewards.double(), values.double(), mask)]
        true = truths.gae(*row[:2], mask=row[2], lam=lam[s].double(), value_lam=value_lam[s].double(), gamma=0.97)
        for ours, wanted in zip(got, true, strict=True):
            assert_values(ours[start:stop], wanted[0], dtype=torch.float32)


@pytest.mark.parametrize("gamma, lam", [(0.9, 0.1), (0.9, 1e-6), (0.9, 0.0), (0.0, 0.9), (0.99, 0.95)])
@pytest.mark.parametrize("where", ["rewards", "values", "bootstrap"])
def test_infinities(backend: str, where: str, gamma: float, lam: float, generator: torch.Generator) -> None:
    """They go as far to the left as the loop carries them, which is to a done, however small the discount gets."""
    shape = (4, 300)
    rewards, values = batch(generator, torch.float32, *shape)
    dones = torch.zeros(shape, dtype=torch.bool)
    dones[1, 40], dones[2, 290] = True, True
    options: dict[str, Any] = {"dones": dones, "gamma": gamma, "lam": lam}
    if where == "bootstrap":
        truncated = torch.zeros(shape, dtype=torch.bool)
        truncated[:, 280] = True
        options |= {"truncated": truncated, "bootstrap_values": torch.full(shape, INF)}
    else:
        (rewards if where == "rewards" else values)[:3, 280] = INF
        check_gae(rewards, values, gamma=gamma, lam=lam)  # without flags the scans have no cuts
    check_gae(rewards, values, **options)


def test_nan_in_a_real_slot_stays_in_its_row(backend: str, generator: torch.Generator) -> None:
    rewards, values = batch(generator, torch.float32, 20, 9)
    clean = rf.gae(rewards, values)
    rewards[3, 4] = NAN
    advantages, returns = rf.gae(rewards, values)
    others = torch.arange(20) != 3
    assert bool(advantages[3, :5].isnan().all()) and bool(advantages[3, 5:].isfinite().all())
    assert torch.equal(advantages[others], clean[0][others]) and torch.equal(returns[others], clean[1][others])


def test_no_gradient(backend: str, generator: torch.Generator) -> None:
    rewards, values = batch(generator, torch.float32, 2, 5)
    advantages, returns = rf.gae(rewards.requires_grad_(), values.requires_grad_())
    assert not advantages.requires_grad and not returns.requires_grad


def test_bitwise_repeatable(backend: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    rewards, values = batch(generator, dtype, 64, 200)
    first, second = rf.gae(rewards, values), rf.gae(rewards, values)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
