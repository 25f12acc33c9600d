# SPDX-License-Identifier: Apache-2.0
"""token_logprobs and token_stats on hostile input: infinities, NaN, huge offsets, ties, huge and empty shapes."""

from __future__ import annotations

import pytest
import torch
from helpers import truths
from helpers.tolerances import assert_gradient, assert_values, max_error
from helpers.tools import INF, NAN, named_outputs, randint, randn, with_gradients
from torch import Tensor

import rlhf_fast as rf

ALL_OUTPUTS = ("logprobs", "entropy", "logsumexp", "sum_sq_probs", "argmax")

# Wide enough for full vector blocks and a ragged end, so that an infinity can sit in either.
WIDTH = 1000 + 37


def stats_and_gradient(
    logits: Tensor, targets: Tensor, grads_of: tuple[str, ...] = ("logprobs", "entropy", "logsumexp")
) -> tuple[dict[str, Tensor], Tensor]:
    got, grads = with_gradients(
        lambda logits: rf.token_stats(logits, targets, outputs=ALL_OUTPUTS), {"logits": logits}, grads_of=grads_of
    )
    return got, grads["logits"]


@pytest.mark.parametrize("where", ["scattered", "first_half", "last_half", "tail", "head", "all_but_target"])
def test_minus_infinity_beside_the_target(
    backend: str, dtype: torch.dtype, where: str, generator: torch.Generator
) -> None:
    """Probability 0 contributes 0: everything stays finite and equals the softmax over the columns that remain."""
    logits = randn(4, WIDTH, generator=generator, dtype=dtype, scale=2)
    targets = torch.tensor([WIDTH // 2, WIDTH // 2 - 1, WIDTH // 2 + 1, WIDTH // 2])
    dead = {
        "scattered": torch.rand(4, WIDTH, generator=generator) < 0.5,
        "first_half": (torch.arange(WIDTH) < WIDTH // 2 - 1).expand(4, -1).clone(),
        "last_half": (torch.arange(WIDTH) > WIDTH // 2 + 1).expand(4, -1).clone(),
        "tail": (torch.arange(WIDTH) >= 1000).expand(4, -1).clone(),
        "head": (torch.arange(WIDTH) < 64).expand(4, -1).clone(),
        "all_but_target": torch.ones(4, WIDTH, dtype=torch.bool),
    }[where]
    dead.scatter_(1, targets.unsqueeze(1), False)
    logits[dead] = -INF
    got, grad = stats_and_gradient(logits, targets)
    assert bool((grad[dead] == 0).all()), "a column of probability 0 takes no gradient here"

    for row in range(4):  # the truth: the same row without its dead columns
        keep = ~dead[row]
        target = keep[: int(targets[row])].sum()
        true = truths.token_stats(logits[row, keep].double(), target)
        for name in ("logprobs", "entropy", "logsumexp", "sum_sq_probs"):
            assert_values(got[name][row], true[name], dtype=dtype, what=f"{name}, row {row}")
        assert int(keep[: int(got["argmax"][row])].sum()) == int(true["argmax"])
    finite = logits.double().masked_fill(dead, -600.0)  # exp(-600) is 1e-261
    _, true_grads = with_gradients(
        lambda logits: truths.token_stats(logits, targets),
        {"logits": finite},
        grads_of=("logprobs", "entropy", "logsumexp"),
    )
    assert_gradient(grad, true_grads["logits"], dtype=dtype)


def test_minus_infinity_target(backend: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Its log-probability is -inf, the rest of the row is unharmed, every gradient is finite."""
    logits = randn(3, WIDTH, generator=generator, dtype=dtype, scale=2)
    targets = torch.tensor([0, 500, WIDTH - 1])
    logits[torch.arange(3), targets] = -INF
    got, grad = stats_and_gradient(logits, targets)
    assert bool((got["logprobs"] == -INF).all())
    assert bool(grad.isfinite().all())
    true = truths.token_stats(logits.double().masked_fill(logits == -INF, -600.0), targets)
    assert_values(got["entropy"], true["entropy"], dtype=dtype)
    assert_values(got["logsumexp"], true["logsumexp"], dtype=dtype)


def test_row_of_minus_infinity(backend: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    logits = randn(3, WIDTH, generator=generator, dtype=dtype)
    logits[1] = -INF
    got, grad = stats_and_gradient(logits, torch.tensor([1, 2, 3]))
    wanted = {"logprobs": -INF, "entropy": 0.0, "logsumexp": -INF, "sum_sq_probs": 0.0, "argmax": 0}
    assert {name: value[1].item() for name, value in got.items()} == wanted
    assert bool((grad[1] == 0).all())
    true = truths.token_stats(logits[[0, 2]].double(), torch.tensor([1, 3]))
    for name in ("logprobs", "entropy", "logsumexp"):
        assert_values(got[name][[0, 2]], true[name], dtype=dtype, what=name)


@pytest.mark.parametrize("column", [0, 500, WIDTH - 1])
def test_nan_row(backend: str, dtype: torch.dtype, column: int, generator: torch.Generator) -> None:
    """One NaN logit makes its own row NaN and no other."""
    logits = randn(3, WIDTH, generator=generator, dtype=dtype)
    logits[1, column] = NAN
    targets = torch.tensor([7, 8, 9])
    got, grad = stats_and_gradient(logits, targets)
    true = truths.token_stats(logits.double(), targets)
    for name in ("logprobs", "entropy", "logsumexp", "sum_sq_probs"):
        assert got[name][1].isnan(), name
        assert_values(got[name], torch.where(torch.tensor([0, 1, 0]) == 1, NAN, true[name]), dtype=dtype, what=name)
    assert 0 <= got["argmax"][1] < WIDTH
    assert bool(grad[1].isnan().all())
    assert bool(grad[[0, 2]].isfinite().all())


@pytest.mark.parametrize("offset", [1e4, -1e4])
@pytest.mark.parametrize("output", ["logprobs", "entropy", "logsumexp"])
def test_common_offset(
    backend: str, dtype: torch.dtype, offset: float, output: str, generator: torch.Generator
) -> None:
    """A constant added to a row changes neither probabilities nor gradients; a saved logsumexp of 1e4 would."""
    logits = (randn(4, WIDTH, generator=generator, scale=3) + offset).to(dtype)
    targets = randint(WIDTH, 4, generator=generator)
    got, grad = stats_and_gradient(logits, targets, (output,))
    true, true_grads = with_gradients(
        lambda logits: truths.token_stats(logits, targets), {"logits": logits.double()}, grads_of=(output,)
    )
    eager = truths.token_stats(logits, targets)
    for name in ("logprobs", "entropy", "logsumexp", "sum_sq_probs"):
        allowance = eager[name] if name == "logsumexp" else None  # |logsumexp| is 1e4: float32 has 1e-3 steps there
        assert_values(got[name], true[name], allowance, dtype=dtype, what=name)
    assert_gradient(grad, true_grads["logits"], dtype=dtype)


def test_extreme_spread(backend: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """One logit far above the rest, at the top of the dtype's range: nothing overflows, and the far target is exact."""
    top = 6e4 if dtype == torch.float16 else 1e30
    logits = randn(2, WIDTH, generator=generator, dtype=dtype)
    logits[:, 700] = top
    got, grad = stats_and_gradient(logits, torch.tensor([700, 3]))
    assert got["logprobs"][0].item() == 0.0
    assert got["logprobs"][1].item() == pytest.approx(-top, rel=1e-2)
    assert got["entropy"].tolist() == [0.0, 0.0]
    assert got["sum_sq_probs"].tolist() == [1.0, 1.0]
    assert got["argmax"].tolist() == [700, 700]
    assert bool(grad.isfinite().all())


@pytest.mark.parametrize("ties", [(0, 1), (5, 1030), (16, 17), (1031, 1036), (3, 500, 1000), tuple(range(WIDTH))])
def test_argmax_ties_take_the_lowest_index(backend: str, dtype: torch.dtype, ties: tuple[int, ...]) -> None:
    logits = torch.linspace(-1, 0, WIDTH).roll(11).to(dtype).expand(2, -1).clone()
    logits[:, list(ties)] = 2.0
    got = rf.token_stats(logits, outputs=("argmax",), targets=None)
    assert got.argmax.tolist() == [ties[0], ties[0]]


@pytest.mark.parametrize("options", [
    {}, {"softcap": 5.0}, {"softcap": 30.0, "logit_scale": 0.7}, {"logit_scale": 0.3, "temperature": 0.9},
], ids=str)  # fmt: skip
def test_thousands_of_rows_hold_to_the_last_bit(
    backend: str, dtype: torch.dtype, options: dict[str, float], generator: torch.Generator
) -> None:
    """What only a row in a hundred shows: an argmax found by comparing floats, a log-probability a rounding above 0."""
    logits = randn(2000, 67, generator=generator, dtype=dtype, scale=2)
    logits[1000:, 5] += 40  # the winner has all of the probability
    best = truths.shaped_logits(logits.double(), **options).argmax(-1)
    got = rf.token_stats(logits, best, outputs=ALL_OUTPUTS, **options)
    reached = truths.shaped_logits(logits.double(), **options).gather(1, got.argmax.unsqueeze(1)).squeeze(1)
    top = truths.shaped_logits(logits.double(), **options).amax(-1)
    slack = 1e-6 if "softcap" in options and dtype != torch.float64 else 0.0  # tanh may round two logits into one
    assert bool((top - reached <= slack * top.abs()).all()), "argmax"
    assert got.logprobs.max().item() <= 0.0, "a log-probability above 0"
    assert got.entropy.min().item() >= 0.0, "a negative entropy"
    assert got.sum_sq_probs.max().item() <= 1.0 + 1e-6


def test_argmax_of_the_columns_that_count(backend: str, dtype: torch.dtype) -> None:
    """Padding columns never win, a negative scale turns the order round, and softcap may make ties."""
    logits = torch.zeros(1, 40, dtype=dtype)
    logits[0, 39], logits[0, 7], logits[0, 9] = 9.0, 3.0, -3.0
    argmax = ("argmax",)
    assert rf.token_stats(logits, None, outputs=argmax, vocab_size=35).argmax.item() == 7
    assert rf.token_stats(logits, None, outputs=argmax, vocab_size=35, logit_scale=-1.0).argmax.item() == 9


def test_padding_columns_hold_anything(backend: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """NaN past vocab_size is not read and takes no gradient."""
    logits = randn(3, 131, generator=generator, dtype=dtype)
    logits[:, 127:] = NAN
    targets = torch.tensor([0, 60, 126])
    got, grads = with_gradients(lambda logits: rf.token_stats(logits, targets, vocab_size=127), {"logits": logits})
    true = truths.token_stats(logits[:, :127].double(), targets)
    assert_values(got["logprobs"], true["logprobs"], dtype=dtype)
    assert_values(got["entropy"], true["entropy"], dtype=dtype)
    assert bool((grads["logits"][:, 127:] == 0).all())


@pytest.mark.parametrize("width", [1, 33], ids=["scalar", "vector"])
def test_every_half_precision_number_is_read_and_written_exactly(
    backend: str, half: torch.dtype, width: int, generator: torch.Generator
) -> None:
    """With all other logits -inf the logsumexp is the logit itself, and the gradient is the incoming one, rounded once.

    So all finite bit patterns can be read back, subnormal ones too, and a gradient must be what `.to(half)` makes of
    it: rounded to nearest, ties to even, past the largest number to infinity.
    """
    numbers = torch.arange(-(2**15), 2**15).short().view(half)
    numbers = numbers[numbers.isfinite()]
    logits = torch.full((numbers.numel(), width), -INF, dtype=half)
    logits[:, width // 2] = numbers
    leaf = logits.requires_grad_()
    out = rf.token_stats(leaf, None, outputs=("logsumexp",)).logsumexp
    assert out is not None and torch.equal(out, numbers.float())
    incoming = numbers.float() * (1 + torch.randint(-4, 5, numbers.shape, generator=generator) * 2.0**-12)
    (grad,) = torch.autograd.grad(out, leaf, incoming)
    assert torch.equal(grad[:, width // 2], incoming.to(half))


def test_empty_batch_and_one_token(backend: str, dtype: torch.dtype) -> None:
    for shape in [(0,), (0, 5), (4, 0)]:
        leaf = torch.empty(*shape, 11, dtype=dtype, requires_grad=True)
        got = rf.token_stats(leaf, torch.empty(shape, dtype=torch.int64), outputs=ALL_OUTPUTS)
        assert {tuple(x.shape) for x in named_outputs(got).values()} == {shape}
        (got.logprobs.sum() + got.entropy.sum()).backward()
        assert leaf.grad is not None and leaf.grad.shape == leaf.shape
    single = rf.token_logprobs(torch.tensor([1.0, 2.0], dtype=dtype), torch.tensor(1))
    assert single.shape == ()
    assert single.item() == pytest.approx(-0.3132616875, abs=1e-6)


def test_one_row_without_leading_dimensions(backend: str, generator: torch.Generator) -> None:
    """(V,) logits: targets, mask and temperature have no dimensions then."""
    logits, target = torch.randn(9, generator=generator), torch.tensor(4)
    for real in (True, False):
        stats = rf.token_stats(logits, target, mask=torch.tensor(real), temperature=torch.tensor(2.0))
        wanted = (logits / 2).log_softmax(-1)[4] if real else torch.zeros(())
        torch.testing.assert_close(stats.logprobs, wanted)


def test_all_masked(backend: str, dtype: torch.dtype) -> None:
    leaf = torch.full((2, 3, 19), NAN, dtype=dtype, requires_grad=True)
    got = rf.token_stats(leaf, torch.full((2, 3), -100), mask=torch.zeros(2, 3, dtype=torch.bool), outputs=ALL_OUTPUTS)
    for value in named_outputs(got).values():
        assert bool((value == 0).all())
    (got.logprobs.sum() + got.entropy.sum()).backward()
    assert leaf.grad is not None and bool((leaf.grad == 0).all())


def test_more_rows_than_a_launch_dimension(backend: str, generator: torch.Generator) -> None:
    logits = randn(70_001, 3, generator=generator)
    targets = randint(3, 70_001, generator=generator)
    got, grads = with_gradients(lambda logits: rf.token_logprobs(logits, targets), {"logits": logits})
    true, true_grads = with_gradients(
        lambda logits: truths.token_stats(logits, targets)["logprobs"], {"logits": logits.double()}
    )
    assert_values(got["out"], true["out"], dtype=torch.float32)
    assert_gradient(grads["logits"], true_grads["logits"], dtype=torch.float32)


@pytest.mark.parametrize("backend", ["native"], indirect=True)  # the reference does read masked rows
@pytest.mark.parametrize("expanded", [True, False], ids=["stride_0", "real_offsets"])
def test_offsets_beyond_int32(lazy_memory: None, backend: str, expanded: bool, generator: torch.Generator) -> None:
    """N * V = 2.6e9 elements. Only the unmasked rows are ever touched, so 5 GB of address space cost no memory."""
    rows, width = 20_000, 131_072
    picked = torch.tensor([0, 1, 16_384, rows - 1])
    mask = torch.zeros(rows, dtype=torch.bool)
    mask[picked] = True
    targets = torch.full((rows,), -100)
    targets[picked] = torch.tensor([0, width - 1, 77, width - 1])
    if expanded:
        logits = randn(1, width, generator=generator, dtype=torch.bfloat16, scale=3).expand(rows, width)
    else:
        logits = torch.empty(rows, width, dtype=torch.bfloat16)
        logits[picked] = randn(4, width, generator=generator, dtype=torch.bfloat16, scale=3)
    got = rf.token_logprobs(logits, targets, mask=mask)
    true = truths.token_stats(logits[picked].double(), targets[picked])["logprobs"]
    assert max_error(got[picked], true) <= 1e-4
    assert int((got != 0).sum()) <= 4


def test_bitwise_repeatable(backend: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    logits = randn(64, WIDTH, generator=generator, dtype=dtype, scale=3)
    targets = randint(WIDTH, 64, generator=generator)
    first, first_grad = stats_and_gradient(logits, targets)
    second, second_grad = stats_and_gradient(logits, targets)
    assert torch.equal(first_grad, second_grad)
    assert all(torch.equal(first[name], second[name]) for name in ALL_OUTPUTS)
