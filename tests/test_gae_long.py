# SPDX-License-Identifier: Apache-2.0
"""gae and ppo_advantages on rows of several blocks, and on few rows so long that a kernel cuts them into parts.

Too long for a Python loop over tokens: the truth is the reference in float64, made once for all backends.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
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

# Rows and tokens. A GPU's blocks are longer than those of the interpreter and the emulator, which are slow.
MANY, FEW = (65, 1030 if ON_GPU else 300), (3, 3101)
MANY_PLAIN = (66, 2100 if ON_GPU else 600)
# As many as a GPU has multiprocessors (the emulated one has four), and a length in 16s: a block goes along a whole row.
WALKED = (160, 4112) if ON_GPU else (5, 1552)


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


def packed(short: int, masked: bool) -> Case:
    """Two long sequences among short and empty ones; every other one ends in NaN, which must not reach others."""
    g = torch.Generator().manual_seed(2)
    lengths = torch.cat([torch.tensor([2201, 0, 1, 1801]), torch.randint(30, (short,), generator=g)])
    lengths = lengths[torch.randperm(lengths.numel(), generator=g)]
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    rewards, values = (randn(int(lengths.sum()), generator=g) for _ in range(2))
    rewards[cu_seqlens[1:][lengths > 0][1::2] - 1] = NAN
    options: dict[str, Any] = {"cu_seqlens": cu_seqlens, "gamma": 0.99, "lam": torch.rand(short + 4, generator=g)}
    if masked:
        options["mask"] = gappy_mask(1, rewards.numel(), g)[0]
    return rf.gae, {"rewards": rewards, "values": values, **options}


def infinite(bad: float, with_done: bool, shape: tuple[int, int] = (3, 2100)) -> Case:
    """Products of a thousand decays vanish, and 0 * inf would be NaN where a loop gives inf; a done stops even that."""
    g = torch.Generator().manual_seed(3)
    rewards, values = (randn(*shape, generator=g) for _ in range(2))
    rewards[0, -10], rewards[1, -10], values[2, -10] = bad, bad, bad
    dones = torch.zeros(shape, dtype=torch.bool)
    dones[:, 700] = True
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


CASES: dict[str, Callable[[], Case]] = {
    "plain, many": lambda: plain(*MANY_PLAIN),
    "plain, few": lambda: plain(2, 6200),
    **{f"everything, {mode}, {shape}": (lambda s=shape, m=mode: everything(s, m))
       for mode in ("carry", "zero") for shape in (MANY, FEW, WALKED)},
    "plain, whole rows": lambda: plain(*WALKED),
    **{f"packed, {short} short, masked={masked}": (lambda s=short, m=masked: packed(s, m))
       for short, masked in ((5, True), (5, False), (80, True), (80, False))},
    **{f"{bad}, done={done}": (lambda b=bad, d=done: infinite(b, d))
       for bad, done in ((INF, False), (-INF, True), (NAN, False), (NAN, True))},
    **{f"{bad}, whole rows": (lambda b=bad: infinite(b, False, WALKED)) for bad in (INF, NAN)},
    "ppo, many": lambda: ppo(*MANY),
    "ppo, few": lambda: ppo(3, 4500),
}  # fmt: skip


@cache
def truth(name: str) -> tuple[Any, Any]:
    """The reference's results in float64 and, for eager's error, in float32."""
    op, options = CASES[name]()
    with rf.use_backend("torch"):
        return op(**{k: upcast(x) for k, x in options.items()}), op(**options)


@backends
@pytest.mark.parametrize("name", CASES)
def test_long_rows(backend: str, name: str) -> None:
    op, options = CASES[name]()
    for got, true, eager in zip(op(**options), *truth(name), strict=True):
        assert got.dtype == torch.float32
        assert_values(got, true, eager, dtype=torch.float32, what=name)
