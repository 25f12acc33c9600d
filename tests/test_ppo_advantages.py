# SPDX-License-Identifier: Apache-2.0
"""ppo_advantages and masked_whiten: the whole chain from log-probs to whitened advantages, alone and over ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import truths
from helpers.tolerances import assert_values
from helpers.tools import NAN, named_outputs, randn, random_mask, upcast
from torch import Tensor

import rlhf_fast as rf

SHAPES = [(1, 1), (2, 17), (7, 33), (33, 128), (3, 1037)]


def batch(
    generator: torch.Generator, dtype: torch.dtype, rows: int, length: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """scores, logprobs, ref_logprobs, values, mask; row 0 is full, row 1 empty, the rest padded and full of holes."""
    mask = random_mask(rows, length, generator=generator, share=0.7)
    mask[0] = True
    if rows > 1:
        mask[1] = False
    logprobs = -randn(rows, length, generator=generator).abs()
    ref_logprobs = logprobs + 0.5 * randn(rows, length, generator=generator)
    scores = randn(rows, generator=generator, dtype=dtype, scale=4)
    values = randn(rows, length, generator=generator, dtype=dtype)
    return scores, logprobs.to(dtype), ref_logprobs.to(dtype), values, mask


def check(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, mask: Tensor, **options: Any) -> None:
    inputs = [x.masked_fill(~mask, NAN) for x in (logprobs, ref_logprobs, values)]
    got = named_outputs(rf.ppo_advantages(scores, *inputs, mask, **options))
    true = truths.ppo_advantages(
        upcast(scores), *(upcast(x) for x in (logprobs, ref_logprobs, values)), mask, **options
    )
    assert list(got) == ["kl", "rewards", "advantages", "returns"]
    for name, value in got.items():
        assert value.dtype == (torch.float64 if logprobs.dtype == torch.float64 else torch.float32)
        assert not value.requires_grad
        assert bool((value[~mask] == 0).all()), f"{name} must be 0 at masked tokens"
        assert_values(value, true[name], dtype=logprobs.dtype, what=name)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("whiten", [True, False])
def test_chain(
    backend: str, dtype: torch.dtype, shape: tuple[int, int], whiten: bool, generator: torch.Generator
) -> None:
    """NaN in every masked slot of log-probs and values; a row without a real token drops its score."""
    check(*batch(generator, dtype, *shape), kl_coef=0.2, whiten=whiten)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_estimators(backend: str, dtype: torch.dtype, estimator: str, generator: torch.Generator) -> None:
    check(*batch(generator, dtype, 7, 33), kl_coef=0.3, estimator=estimator, whiten=False)


def test_k3_of_nearly_equal_policies_keeps_its_digits(backend: str) -> None:
    """e^x - 1 - x of a small x, which differences of numbers near 1 would lose."""
    logprobs, mask = torch.full((1, 5), -1.0), torch.ones(1, 5, dtype=torch.bool)
    apart = torch.tensor([[2.0**-6, -(2.0**-6), 2.0**-9, 2.0**-12, -(2.0**-12)]])  # exact, also beside -1
    zeros = torch.zeros(1, 5)
    got = rf.ppo_advantages(torch.zeros(1), logprobs, logprobs + apart, zeros, mask, kl_coef=0.1, estimator="k3")
    x = apart.double()
    torch.testing.assert_close(got.kl.double(), x.square() / 2 + x**3 / 6 + x**4 / 24, rtol=1e-3, atol=0)


@pytest.mark.parametrize("options", [
    {"gamma": 0.9, "lam": 0.5}, {"gamma": 1.0, "lam": 1.0}, {"gamma": 0.97, "lam": 0.0}, {"kl_coef": 0.0},
    {"score_clip": 2.0}, {"score_clip": 0.5, "gamma": 0.9, "estimator": "k3"},
], ids=str)  # fmt: skip
def test_options(backend: str, dtype: torch.dtype, options: dict[str, Any], generator: torch.Generator) -> None:
    inputs = batch(generator, dtype, 7, 33)
    check(*inputs, **{"kl_coef": 0.1, "whiten": False, **options})
    check(*inputs, **{"kl_coef": 0.1, **options})


def test_score_lands_on_the_last_real_token(backend: str) -> None:
    mask = torch.tensor([[False, True, True, False], [True, False, True, True], [False] * 4])
    zeros = torch.zeros(3, 4)
    got = rf.ppo_advantages(torch.tensor([3.0, -9.0, 5.0]), zeros, zeros, zeros, mask, kl_coef=1.0, score_clip=4.0)
    assert got.rewards.tolist() == [[0, 0, 3, 0], [0, 0, 0, -4], [0, 0, 0, 0]]


def test_prompts_and_padding(backend: str, generator: torch.Generator) -> None:
    """A response somewhere in a long row: the score crosses the padding behind it, and no row's end."""
    scores, logprobs, ref_logprobs, values, mask = batch(generator, torch.float32, 5, 1300)
    for row, (start, stop) in enumerate([(0, 3), (700, 701), (5, 5), (600, 1200), (1299, 1300)]):
        mask[row, :start], mask[row, stop:] = False, False
    check(scores, logprobs, ref_logprobs, values, mask, kl_coef=0.2, gamma=0.99, whiten=False)


def test_infinite_score_stays_in_its_row(backend: str, generator: torch.Generator) -> None:
    scores, *rest = batch(generator, torch.float32, 5, 300)
    scores[2], scores[3] = float("inf"), -float("inf")
    check(scores, *rest, kl_coef=0.1, gamma=0.9, lam=0.1, whiten=False)
    check(scores, *rest, kl_coef=0.1, score_clip=3.0)


def test_nan_score_of_an_empty_row_is_dropped(backend: str, generator: torch.Generator) -> None:
    scores, *rest = batch(generator, torch.float32, 5, 9)
    scores[1] = NAN  # row 1 has no real token
    got = rf.ppo_advantages(scores, *rest, kl_coef=0.1)
    assert all(bool(x.isfinite().all()) for x in got)


def test_layouts(backend: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    scores, *rest = batch(generator, dtype, 9, 33)
    check(scores, *(x.t().contiguous().t() for x in rest), kl_coef=0.1)
    wide = [torch.cat([x[:, :1], x, x[:, -1:]], dim=1)[:, 1:-1] for x in rest]
    check(torch.stack([scores, scores], 1)[:, 0], *wide, kl_coef=0.1)
    given = [torch.cat([x, x])[::2] for x in rest]
    got = rf.ppo_advantages(torch.cat([scores, scores])[::2], *given, kl_coef=0.1)
    contiguous = rf.ppo_advantages(
        torch.cat([scores, scores])[::2].contiguous(), *(x.contiguous() for x in given), kl_coef=0.1
    )
    for a, b in zip(got, contiguous, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_empty_and_all_masked(backend: str, dtype: torch.dtype) -> None:
    for shape in [(0, 4), (3, 0)]:
        x = torch.empty(shape, dtype=dtype)
        scores = torch.zeros(shape[0], dtype=dtype)
        got = rf.ppo_advantages(scores, x, x, x, torch.empty(shape, dtype=torch.bool), kl_coef=0.1)
        assert all(out.shape == shape for out in got)
    x = torch.full((2, 3), NAN, dtype=dtype)
    nowhere = torch.zeros(2, 3, dtype=torch.bool)
    for out in rf.ppo_advantages(torch.ones(2, dtype=dtype), x, x, x, nowhere, kl_coef=0.1):
        assert bool((out == 0).all())
    assert bool((rf.masked_whiten(x, nowhere) == 0).all())


def test_bitwise_repeatable(backend: str, generator: torch.Generator) -> None:
    inputs = batch(generator, torch.float32, 64, 200)
    first, second = (rf.ppo_advantages(*inputs, kl_coef=0.1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ------------------------------------------------------------------------------------------- masked_whiten


@pytest.mark.parametrize("shape", [(1, 2), (3, 17), (64, 131)], ids=str)
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten(
    backend: str, dtype: torch.dtype, shape: tuple[int, int], shift_mean: bool, generator: torch.Generator
) -> None:
    """Unbiased variance over the real tokens of the whole batch; NaN in masked slots."""
    values = randn(*shape, generator=generator, dtype=dtype, scale=3) + 2
    for mask in (torch.ones(shape, dtype=torch.bool), random_mask(*shape, generator=generator)):
        mask[0, :2] = True
        got = rf.masked_whiten(values.masked_fill(~mask, NAN), mask, shift_mean=shift_mean)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert not got.requires_grad
        assert_values(got, truths.masked_whiten(values, mask, shift_mean), dtype=dtype)
        strided = torch.stack([values, values], -1)[..., 0]
        assert_values(
            rf.masked_whiten(strided, mask, shift_mean=shift_mean),
            truths.masked_whiten(values, mask, shift_mean),
            dtype=dtype,
        )


def test_whiten_a_far_away_mean(backend: str, generator: torch.Generator) -> None:
    """A mean of 1000 standard deviations: sums of squares in float32 would leave no digit of the variance."""
    values = randn(8, 100, generator=generator) + 1000
    mask = torch.ones(8, 100, dtype=torch.bool)
    got = rf.masked_whiten(values, mask)
    true = truths.masked_whiten(values, mask)
    assert (got.double() - true).abs().max().item() < 5e-4  # |x| * float32 step / std, of the subtraction itself


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("mean", [1e4, 1e8])
def test_whiten_float64_far_away(mean: float, shift_mean: bool, generator: torch.Generator) -> None:
    """The digits that the subtraction of the mean leaves are all there, in the sums of squares too."""
    values = randn(8, 100, generator=generator, dtype=torch.float64) + mean
    mask = random_mask(8, 100, generator=generator)
    got = rf.masked_whiten(values, mask, shift_mean=shift_mean)
    real = values[mask]
    centred = real - mean  # exact
    centred = centred - centred.mean()
    wanted = centred / (centred.square().sum() / (len(real) - 1) + 1e-8).sqrt()
    wanted = wanted if shift_mean else wanted + real.mean()
    torch.testing.assert_close(got[mask], wanted, rtol=1e-14, atol=5e-8)  # a step of 1e8 is 1.5e-8
    assert not bool(got[~mask].any())


def test_whiten_one_token_and_a_constant(backend: str) -> None:
    mask = torch.tensor([[False, True, False]])
    values = torch.tensor([[NAN, 7.0, NAN]])
    assert rf.masked_whiten(values, mask).tolist() == [[0, 0, 0]]
    assert rf.masked_whiten(values, mask, shift_mean=False).tolist() == [[0, 7, 0]]
    for number in (0.1, 1234.567, *(1e6 / k for k in range(3, 12))):  # the variance may round to less than -1e-8
        constant = rf.masked_whiten(torch.full((3, 101), number), torch.ones(3, 101, dtype=torch.bool))
        assert constant.abs().max().item() <= 1e-3  # the mean of equal floats may round, and 1e-8 is all that it meets
    large = torch.full((1, 237), 123456789.0)  # the difference of two sums of squares is below 0 here
    assert rf.masked_whiten(large, torch.ones(1, 237, dtype=torch.bool)).abs().max().item() <= 1e-3


RANKS = """
import sys, torch
import torch.distributed as dist
import rlhf_fast as rf
rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
g = torch.Generator().manual_seed(0)
x, ref, v = (torch.randn(6, 9, generator=g) for _ in range(3))
scores, mask = torch.randn(6, generator=g), torch.rand(6, 9, generator=g) < 0.7
mine = slice(0, 2) if rank == 0 else slice(2, 6)
world = {"process_group": dist.group.WORLD}
ppo = rf.ppo_advantages(scores[mine], x[mine], ref[mine], v[mine], mask[mine], kl_coef=0.1, **world)
white = rf.masked_whiten(x[mine], mask[mine], **world)
whole = rf.ppo_advantages(scores, x, ref, v, mask, kl_coef=0.1), rf.masked_whiten(x, mask)
for a, b in [(white, whole[1][mine])] + [(a, b[mine]) for a, b in zip(ppo, whole[0])]:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
assert not torch.allclose(white, rf.masked_whiten(x[mine], mask[mine]), atol=1e-3)
open(out + str(rank), "w").write("equal")
dist.destroy_process_group()
"""


def test_statistics_over_ranks(tmp_path: Path) -> None:
    """Two processes with unequal shares whiten as one process with the whole batch."""
    script = [sys.executable, "-c", RANKS]
    args = [str(tmp_path / "store"), str(tmp_path / "out")]
    ranks = [subprocess.Popen([*script, str(r), *args], stderr=subprocess.PIPE, text=True) for r in range(2)]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
    assert [(tmp_path / f"out{r}").read_text() for r in range(2)] == ["equal", "equal"]
