# SPDX-License-Identifier: Apache-2.0
"""gae and ppo_advantages on rows of several blocks, and on few rows so long that a kernel cuts them into parts.

Too long for a Python loop over tokens: the truth is the reference in float64, made once for all backends.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import torch
from helpers import interpreter
from helpers.tolerances import assert_values
from helpers.tools import INF, NAN, randn, random_mask, upcast
from torch import Tensor

import rlhf_fast as rf

ON_GPU = ("native@cuda", "triton@cuda") if torch.cuda.is_available() else ()
backends = pytest.mark.parametrize(
    "backend",
    ["native", "triton", "emulated", *(pytest.param(name, marks=pytest.mark.gpu) for name in ON_GPU)],
    indirect=True,
)

Case = tuple[Callable[..., Any], dict[str, Any]]


class Shapes(NamedTuple):
    """(rows, tokens) that a backend cuts up in every way it has."""

    many: tuple[int, int]  # rows of several blocks, too many for rows in parts
    many_plain: tuple[int, int]  # the same for a kernel with few inputs, whose blocks are longer
    few: tuple[int, int]  # rows in parts
    few_plain: tuple[int, int]
    walked: tuple[int, int]  # in 16s: a block of CUDA's goes along a whole row where there are so many rows
    ppo: tuple[int, int]
    packed: tuple[int, int]  # two long sequences


if ON_GPU:  # blocks are longer, and a row for each multiprocessor
    SHAPES = Shapes((65, 1030), (66, 2100), (3, 3101), (2, 6200), (160, 4112), (3, 4500), (2201, 1801))
else:  # the emulated GPU has four multiprocessors
    SHAPES = Shapes((65, 300), (66, 600), (3, 3101), (2, 6200), (5, 1552), (3, 4500), (2201, 1801))
# In the interpreter a token takes half a millisecond; a block has 256 tokens or, of kernels with many inputs, 128.
INTERPRETED = Shapes((65, 140), (66, 300), (3, 1101), (2, 1300), (4, 656), (3, 1130), (1201, 601))


def gappy_mask(rows: int, length: int, generator: torch.Generator) -> Tensor:
    """Holes everywhere, and in each row but the last a gap of a third of the row: wider than kernels' blocks."""
    mask = random_mask(rows, length, generator=generator, share=0.8)
    for b in range(rows - 1):
        start = int(torch.randint(length - length // 3, (), generator=generator))
        mask[b, start : start + length // 3] = False
    return mask


def plain(rows: int, length: int) -> Case:
    """gamma = lam = 1 sums the whole row up."""
    g = torch.Generator().manual_seed(0)
    rewards, values = (randn(rows, length, generator=g) for _ in range(2))
    return rf.gae, {"rewards": rewards, "values": values, "gamma": 1.0, "lam": 1.0}


def everything(shape: tuple[int, int], mode: str) -> Case:
    """Gaps, and episodes that mostly reach over several blocks; NaN wherever nothing may be read."""
    g = torch.Generator().manual_seed(1)
    mask, truncated = gappy_mask(*shape, g), torch.rand(shape, generator=g) < 0.002
    options = {
        "rewards": randn(*shape, generator=g).masked_fill(~mask, NAN),
        "values": randn(*shape, generator=g).masked_fill(~mask, NAN),
        "mask": mask,
        "dones": torch.rand(shape, generator=g) < 0.002,
        "truncated": truncated,
        "bootstrap_values": randn(*shape, generator=g).masked_fill(~(truncated & mask), NAN),
        "lam": 1 - torch.rand(shape[0], generator=g) / 100,
    }
    return rf.gae, {**options, "gamma": 0.999, "value_lam": 1.0, "mask_mode": mode}


def packed(long: tuple[int, int], short: int, masked: bool) -> Case:
    """Two long sequences among short and empty ones; every other one ends in NaN, which must not reach others."""
    g = torch.Generator().manual_seed(2)
    lengths = torch.cat([torch.tensor([long[0], 0, 1, long[1]]), torch.randint(30, (short,), generator=g)])
    lengths = lengths[torch.randperm(lengths.numel(), generator=g)]
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    rewards, values = (randn(int(lengths.sum()), generator=g) for _ in range(2))
    rewards[cu_seqlens[1:][lengths > 0][1::2] - 1] = NAN
    options: dict[str, Any] = {"cu_seqlens": cu_seqlens, "gamma": 0.99, "lam": torch.rand(short + 4, generator=g)}
    if masked:
        options["mask"] = gappy_mask(1, rewards.numel(), g)[0]
    return rf.gae, {"rewards": rewards, "values": values, **options}


def infinite(bad: float, with_done: bool, shape: tuple[int, int]) -> Case:
    """Products of a thousand decays vanish, and 0 * inf would be NaN where a loop gives inf; a done stops even that."""
    g = torch.Generator().manual_seed(3)
    rewards, values = (randn(*shape, generator=g) for _ in range(2))
    rewards[0, -10], rewards[1, -10], values[2, -10] = bad, bad, bad
    dones = torch.zeros(shape, dtype=torch.bool)
    dones[:, shape[1] // 3] = True
    options: dict[str, Any] = {"dones": dones} if with_done else {}
    return rf.gae, {"rewards": rewards, "values": values, "gamma": 0.99, "lam": 0.9, **options}


def ppo(rows: int, length: int) -> Case:
    """The score crosses a masked tail longer than a block, an empty row drops it, and the sums take in all parts."""
    g = torch.Generator().manual_seed(4)
    mask = gappy_mask(rows, length, g)
    mask[0, length // 3 :], mask[1] = False, False
    logprobs, values = -randn(rows, length, generator=g).abs(), randn(rows, length, generator=g)
    ref_logprobs = logprobs + 0.5 * randn(rows, length, generator=g)
    options = {"kl_coef": 0.1, "estimator": "k3", "gamma": 0.999, "lam": 0.99}
    tokens = {"logprobs": logprobs, "ref_logprobs": ref_logprobs, "values": values}
    tokens = {name: x.masked_fill(~mask, NAN) for name, x in tokens.items()}
    return rf.ppo_advantages, {"scores": randn(rows, generator=g, scale=4), **tokens, "mask": mask, **options}


def cases(shapes: Shapes) -> dict[str, Callable[[], Case]]:
    """By name; the infinite ones are of rows so long that the products of their decays vanish."""
    everywhere = {"many": shapes.many, "few": shapes.few, "whole rows": shapes.walked}
    return {
        "plain, many": lambda: plain(*shapes.many_plain),
        "plain, few": lambda: plain(*shapes.few_plain),
        **{f"everything, {mode}, {name}": partial(everything, shape, mode)
           for mode in ("carry", "zero") for name, shape in everywhere.items()},
        "plain, whole rows": lambda: plain(*shapes.walked),
        **{f"packed, {short} short, masked={masked}": partial(packed, shapes.packed, short, masked)
           for short, masked in ((5, True), (5, False), (80, True), (80, False))},
        **{f"{bad}, done={done}": partial(infinite, bad, done, (3, 2100))
           for bad, done in ((INF, False), (-INF, True), (NAN, False), (NAN, True))},
        **{f"{bad}, whole rows": partial(infinite, bad, False, shapes.walked) for bad in (INF, NAN)},
        "ppo, many": lambda: ppo(*shapes.many),
        "ppo, few": lambda: ppo(*shapes.ppo),
    }  # fmt: skip


CASES, SHORT_CASES = cases(SHAPES), cases(INTERPRETED)


@cache
def truth(name: str, short: bool) -> tuple[Any, Any]:
    """The reference's results in float64 and, for eager's error, in float32."""
    op, options = (SHORT_CASES if short else CASES)[name]()
    with rf.use_backend("torch"):
        return op(**{k: upcast(x) for k, x in options.items()}), op(**options)


@backends
@pytest.mark.parametrize("name", CASES)
def test_long_rows(backend: str, name: str) -> None:
    short = backend == "triton" and interpreter.usable
    op, options = (SHORT_CASES if short else CASES)[name]()
    for got, true, eager in zip(op(**options), *truth(name, short), strict=True):
        assert got.dtype == torch.float32
        assert_values(got, true, eager, dtype=torch.float32, what=name)


def test_triton_divides_long_rows_only_where_they_are_few() -> None:
    """Undivided, a row or a long sequence would leave most of a GPU idle; enough of them fill it in one launch."""
    pytest.importorskip("triton")
    from rlhf_fast.kernels.scan import PROGRAMS, plan_for

    length = 1_000_000
    for rows, packed in ((1, None), (3, None), (63, None), (1, 1), (1, 63)):
        plan = plan_for(rows, length, [length], packed=packed)
        assert len(plan.passes) == 2 and PROGRAMS // 2 <= plan.programs <= PROGRAMS
        assert (plan.parts - 1) * plan.part < length <= plan.parts * plan.part
    for rows, packed in ((64, None), (1, 64)):
        assert len(plan_for(rows, length, [length], packed=packed).passes) == 1
    assert plan_for(64, length, [length]).programs == 64
