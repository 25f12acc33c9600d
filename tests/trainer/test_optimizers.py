# SPDX-License-Identifier: Apache-2.0
"""The option `optimizer`: state in CPU memory changes nothing, and 8-bit moments are those of bitsandbytes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from rlhf_fast.errors import UserError
from rlhf_fast.models import moments, optimizers
from rlhf_fast.models.optim import AdamW
from rlhf_fast.models.optimizers import OffloadedAdamW, over_shards
from rlhf_fast.run.checkpoint import load_state, save_state

KINDS = ("adamw", "adamw-offload", "adamw-8bit")
SHAPES = ((90, 50), (33, 300), (5000,), (7,))  # rows that end inside of blocks, that are longer, a vector, a small one


@pytest.fixture
def bitsandbytes() -> Any:
    return pytest.importorskip("bitsandbytes")


def weights(*dtypes: torch.dtype) -> list[Parameter]:
    torch.manual_seed(0)
    return [Parameter(torch.randn(shape).to(dtype)) for dtype in dtypes for shape in SHAPES]


def step(found: Sequence[Parameter], optimizer: Any, seed: int, scale: float = 1.0) -> None:
    """A step with gradients that `seed` decides; the last weight has none every other time."""
    g = torch.Generator().manual_seed(seed)
    for i, weight in enumerate(found):
        gradient = scale * torch.randn(weight.shape, generator=g)
        if i + 1 < len(found) or seed % 2:
            (weight * gradient.to(weight.dtype)).sum().backward()
    optimizer.step(1.0) if isinstance(optimizer, AdamW) else optimizer.step()


def test_state_in_cpu_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A few weights at a time, of both dtypes, with and without a resume in between."""
    monkeypatch.setattr(optimizers, "PORTION", 6000)
    ours, theirs = (weights(torch.bfloat16, torch.float32) for _ in range(2))
    here = AdamW(ours, lr=1e-2, weight_decay=0.1, kind="adamw-offload")
    there = AdamW(theirs, lr=1e-2, weight_decay=0.1)
    for seed in range(6):
        step(ours, here, seed)
        step(theirs, there, seed)
        if seed == 2:
            save_state(tmp_path, here.state_dict())
            ours = [Parameter(torch.zeros_like(weight)) for weight in ours]
            here = AdamW(ours, lr=1e-2, weight_decay=0.1, kind="adamw-offload")
            here.load_state_dict(load_state(tmp_path))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)
    saved, wanted = here.state_dict(), there.state_dict()
    torch.testing.assert_close(saved, wanted, rtol=0, atol=0)
    assert all(moment["exp_avg"].abs().sum() > 0 for moment in wanted["moments"].values())


def test_between_steps_masters_are_empty_and_the_copies_in_cpu_memory_stay_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Within a step the device has the masters of a portion alone. Where moments are cannot be seen on a CPU."""
    monkeypatch.setattr(optimizers, "PORTION", 6000)
    found = weights(torch.bfloat16, torch.float32)
    ours = AdamW(found, lr=1e-2, kind="adamw-offload")
    inner = ours.optimizer
    assert isinstance(inner, OffloadedAdamW)
    lows = [master for weight, master in ours.pairs if weight.dtype == torch.bfloat16]
    then = inner.stepped

    def stepped(masters: list[Tensor]) -> None:
        seen.append([m.untyped_storage().nbytes() for m in masters])
        assert sum(seen[-1]) <= 4 * max(6000, max(p.numel() for p in found))
        assert sum(m.untyped_storage().nbytes() for m in lows) <= sum(seen[-1])
        then(masters)

    inner.stepped = stepped
    for seed in (1, 3):
        seen: list[list[int]] = []
        step(found, ours, seed)
        assert sorted(sum(seen, [])) == sorted(4 * p.numel() for p in found)
        assert all(master.untyped_storage().nbytes() == 0 for master in lows)
        states = [x for p in inner.state for x in (inner.state[p]["exp_avg"], inner.state[p]["exp_avg_sq"])]
        assert len(states) == 16
        if seed == 1:
            first = states
    assert all(one is other for one, other in zip(first, states, strict=True))  # pinned once, not in every step
    assert len({x.data_ptr() for x in [*states, *inner.hosts.values()]}) == 16 + len(lows)  # none shares a buffer


def test_a_weight_without_rows_is_stepped_by_every_kind(bitsandbytes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank may have none of a sharded weight; bitsandbytes' kernels are not started for nothing."""
    update = bitsandbytes.optim.AdamW8bit.update_step

    def of_some(self: Any, group: Any, p: torch.Tensor, *rest: Any) -> None:
        assert p.numel()
        update(self, group, p, *rest)

    monkeypatch.setattr(bitsandbytes.optim.AdamW8bit, "update_step", of_some)
    for kind in KINDS:
        empty, other = Parameter(torch.zeros(0, 20)), Parameter(torch.ones(80, 60))
        ours, pairs = over_shards(kind, [{"params": [empty, other]}], lr=0.1)  # type: ignore[arg-type]
        for weight in (empty, other):
            weight.grad = torch.ones_like(weight)
        ours.step()
        saved = moments.saved_moments(ours, pairs)
        moments.restore_moments(ours, pairs, saved)
        assert float(other.detach()[0, 0]) < 0.95
        for steps in ([saved[i]["step"] for i in "01"], [ours.state[stepped]["step"] for _, stepped in pairs]):
            assert [float(step) for step in steps] == [1, 1], kind


def test_pinned_memory_is_counted_in_powers_of_two() -> None:
    """As PyTorch's allocator of pinned memory rounds; that needs a GPU, so this is the arithmetic alone."""
    sizes = (0, 1, 1023.5, 1024, 1025, 3 * 2**20)
    assert [optimizers.pinned_bytes(size) for size in sizes] == [0, 1, 1024, 1024, 2048, 2**22]


def oracle(bitsandbytes: Any, found: Sequence[Parameter], **adam: Any) -> Any:
    return bitsandbytes.optim.AdamW8bit(found, **adam)


def test_moments_of_8_bits_are_those_of_bitsandbytes(bitsandbytes: Any) -> None:
    """Its own step on the same float32 weights; ours also on bfloat16 ones, which are rounded from the masters."""
    exact = [Parameter(weight.detach().bfloat16().float()) for weight in weights(torch.float32)]
    full, low = ([Parameter(p.detach().clone().to(kind)) for p in exact] for kind in (torch.float32, torch.bfloat16))
    adam: dict[str, Any] = {"lr": 1e-5, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    theirs = oracle(bitsandbytes, exact, **adam)
    ours = [AdamW(found, kind="adamw-8bit", **adam) for found in (full, low)]
    g = torch.Generator().manual_seed(1)
    for _ in range(40):
        gradients = [torch.randn(p.shape, generator=g).bfloat16() for p in exact]
        for found in (exact, full, low):
            for weight, gradient in zip(found, gradients, strict=True):
                weight.grad = None
                (weight * gradient.to(weight.dtype)).sum().backward()
        theirs.step()
        for optimizer in ours:
            optimizer.step()
    for one, whole, rounded, (_, master) in zip(exact, full, low, ours[1].pairs, strict=True):
        assert torch.equal(one, whole) and torch.equal(one, master) and torch.equal(rounded, one.bfloat16())
    start = weights(torch.float32)
    assert all((p - was.bfloat16().float()).abs().max() > 1e-4 for p, was in zip(exact, start, strict=True))
    sizes = [ours[1].optimizer.state[master]["state1"].element_size() for _, master in ours[1].pairs]
    assert sizes == [1, 1, 1, 4]


def fresh(kind: Any) -> tuple[list[Parameter], AdamW]:
    found = weights(torch.bfloat16)
    return found, AdamW(found, lr=1e-2, kind=kind)


def test_8_bit_state_comes_back_exactly(bitsandbytes: Any, tmp_path: Path) -> None:
    found, optimizer = fresh("adamw-8bit")
    for seed in (1, 2, 3):
        step(found, optimizer, seed)
    save_state(tmp_path, optimizer.state_dict())
    others, other = fresh("adamw-8bit")
    other.load_state_dict(load_state(tmp_path))
    for one, two in zip(optimizer.pairs, other.pairs, strict=True):
        state, loaded = optimizer.optimizer.state[one[1]], other.optimizer.state[two[1]]
        assert state.keys() == loaded.keys() and state["step"] == loaded["step"]
        assert all(torch.equal(x, loaded[name]) for name, x in state.items() if name != "step")
    step(found, optimizer, 5)
    step(others, other, 5)
    assert all(torch.equal(one, two) for one, two in zip(found, others, strict=True))


def values_of(state: dict[str, Any]) -> Callable[[str], Tensor]:
    """bitsandbytes' meaning of its state, number by number."""

    def numbers(k: str) -> Tensor:
        if f"absmax{k}" not in state:
            return state[f"state{k}"].flatten()
        codes = state[f"state{k}"].flatten().long()
        scales = state[f"absmax{k}"].repeat_interleave(256)[: len(codes)]
        return state[f"qmap{k}"][codes] * scales

    return numbers


def test_another_kind_of_optimizer_can_resume(bitsandbytes: Any, tmp_path: Path) -> None:
    """From 8 bits to 32 without any error; back, within the step of a code, which is largest near a block's maximum."""
    found, eight = fresh("adamw-8bit")
    for seed in (1, 3):
        step(found, eight, seed)
    for kind in ("adamw", "adamw-offload"):
        _, other = fresh(kind)
        other.load_state_dict(eight.state_dict())
        for (_, master), (_, here) in zip(eight.pairs, other.pairs, strict=True):
            numbers, state = values_of(eight.optimizer.state[master]), other.optimizer.state[here]
            assert torch.equal(state["exp_avg"].flatten(), numbers("1"))
            assert torch.equal(state["exp_avg_sq"].flatten(), numbers("2"))
            assert float(state["step"]) == 2
    found, plain = fresh("adamw")
    for seed in (1, 3):
        step(found, plain, seed)
    others, back = fresh("adamw-8bit")
    back.load_state_dict(plain.state_dict())
    assert all(torch.equal(one, other) for one, other in zip(found, others, strict=True))
    for (_, master), (_, here) in zip(plain.pairs, back.pairs, strict=True):
        numbers, state = values_of(back.optimizer.state[here]), plain.optimizer.state[master]
        for k, name in (("1", "exp_avg"), ("2", "exp_avg_sq")):
            wanted = state[name].flatten()
            assert (numbers(k) - wanted).abs().max() <= 0.04 * wanted.abs().max()


@pytest.mark.parametrize("cut", [(32, 58), (45, 45), (1, 89)])
def test_8_bit_moments_of_other_rows_are_rounded_anew_where_blocks_differ(
    bitsandbytes: Any, cut: tuple[int, int]
) -> None:
    """Rows of 64 numbers: a block has four, so a part that begins at no multiple of four has other blocks."""
    whole = Parameter(torch.zeros(90, 64))
    optimizer = AdamW([whole], lr=0.1, kind="adamw-8bit")
    whole.grad = torch.randn(90, 64, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    saved = optimizer.state_dict()["moments"]["0"]
    numbers = values_of(optimizer.optimizer.state[whole])("1").view(90, 64)
    first = 0
    for rows in cut:
        part = Parameter(torch.zeros(rows, 64))
        ours, pairs = over_shards("adamw-8bit", [{"params": [part]}], lr=0.1)
        optimizer_state = {name: x[first : first + rows] if x.dim() else x for name, x in saved.items()}
        if part.numel() < optimizers.LEAST_8BIT:  # a small part of a large weight has 8 bits as well
            ours = optimizers.build("adamw-8bit", [{"params": [part]}], [(whole, part)], lr=0.1)
        moments.restore_moments(ours, pairs, {"0": optimizer_state})
        wanted, found = numbers[first : first + rows].flatten(), values_of(ours.state[part])("1")
        if first % 4 == 0:
            assert torch.equal(found, wanted)
        else:
            assert not torch.equal(found, wanted) and (found - wanted).abs().max() < 0.02 * wanted.abs().max()
        first += rows


@pytest.mark.parametrize("version", [None, "0.9.2"])
def test_without_its_package_8_bits_are_refused(version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a checkpoint that another optimizer resumes from."""
    found = version and SimpleNamespace(__version__=version)
    monkeypatch.setitem(sys.modules, "bitsandbytes", found)  # type: ignore[arg-type]
    got = r", 0\.50 or later, and this is 0\.9\.2" if version else ""
    ending = rf"package bitsandbytes{got}: pip install 'rlhf-fast\[8bit\]'"
    with pytest.raises(UserError, match=f"^optimizer adamw-8bit needs the {ending}"):
        AdamW(weights(torch.float32), lr=0.1, kind="adamw-8bit")
    codes, scales = torch.zeros(90, 50, dtype=torch.uint8), torch.zeros(90, 3)
    saved = {"step": torch.tensor(1.0)}
    saved |= {f"{name}{end}": x for name in moments.MOMENTS for end, x in (("", codes), ("_scales", scales))}
    for kind in KINDS[:2]:
        ours = AdamW(weights(torch.float32)[:1], lr=0.1, kind=kind)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=f"^this checkpoint has 8-bit moments, which need the {ending}"):
            moments.restore_moments(ours.optimizer, ours.pairs, {"0": saved})
