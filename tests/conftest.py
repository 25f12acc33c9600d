# SPDX-License-Identifier: Apache-2.0
"""Fixtures of every op test: which backend, which dtype, a seeded generator, and memory that arrives full of NaN."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from helpers import interpreter  # first: it must set TRITON_INTERPRET before anything looks at it

# isort: split
import pytest
import torch
from emulator import build as emulator
from helpers.on_gpu import run_ops_on
from helpers.progress import pytest_configure  # noqa: F401, a hook
from helpers.samples import SAMPLES, build
from helpers.tools import native_is_built

import rlhf_fast as rf
from rlhf_fast import _dispatch, _ext

# "native" takes the best instruction set of this host; the others cap it.
# "triton" is Triton's interpreter, "emulated" the CUDA kernels in tests/emulator: both on the CPU, neither sees races.
BACKENDS = ("torch", "native", "native:avx2", "native:default", "triton", "emulated")
ON_GPU = ("torch@cuda", "native@cuda", "triton@cuda") if torch.cuda.is_available() else ()
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TRAINER = Path(__file__).parent / "trainer"
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def serves(backend: str, dtype: str) -> bool:
    """Only the reference has float64. The interpreter is slow, and one half is as good as the other there."""
    return {"torch": True, "triton": dtype in ("fp32", "bf16")}.get(backend.split("@")[0], dtype != "fp64")


def marked(backend: str, *more: object, name: str) -> object:
    return pytest.param(backend, *more, id=name, marks=pytest.mark.gpu if "@" in backend else ())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests that ask for `backend` and `dtype` (or `half`) run on every pair that exists."""
    names = set(metafunc.fixturenames)
    for mark in metafunc.definition.iter_markers("parametrize"):  # a test may choose its own
        names -= {name.strip() for name in str(mark.args[0]).split(",")}
    for fixture, dtypes in (("dtype", DTYPES), ("half", HALVES)):
        if {"backend", fixture} <= names:
            pairs = [(b, d) for b in BACKENDS + ON_GPU for d in dtypes if serves(b, d)]
            metafunc.parametrize(
                ("backend", fixture),
                [marked(b, dtypes[d], name=f"{b}-{d}") for b, d in pairs],
                indirect=["backend"],
            )
            return
    if "backend" in names:
        once = [b for b in BACKENDS + ON_GPU if ":" not in b]
        metafunc.parametrize("backend", [marked(b, name=b) for b in once], indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The samples of an op that has no kernels run on the reference alone: there is no other backend to force.

    The trainer's are the last, and the whole tutorial the first of those: else one worker would run it when the others
    have nothing left.
    """
    items[:] = [item for item in items if not _forces_missing_kernels(getattr(item, "callspec", None))]
    items.sort(key=lambda item: item.path.parent == TRAINER and 1 + (item.path.name != "test_tutorial.py"))


def _forces_missing_kernels(callspec: Any) -> bool:
    name, backend = (callspec.params.get(x) for x in ("name", "backend")) if callspec else (None, None)
    if backend in (None, "torch") or name not in SAMPLES:
        return False
    return not _dispatch.KERNEL_OF[build(name, torch.float32).op]


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every rlhf_fast call of the test runs on this backend, forced."""
    name, _, device = request.param.partition("@")
    name, _, instruction_set = name.partition(":")
    if name == "native" and not native_is_built():
        pytest.skip("extension not built; tests/test_dispatch.py::test_native_backend_is_built says so once")
    if name == "triton" and not device:
        if not interpreter.usable:
            pytest.skip(interpreter.why_not)
        interpreter.quicken()
    if name == "emulated":
        emulator.load()
    if device:
        run_ops_on(device, monkeypatch)
    with rf.use_backend(name), capped_cpu(instruction_set):
        yield name


@contextmanager
def capped_cpu(instruction_set: str) -> Iterator[None]:
    """The CPU kernels of this instruction set, or those that were in use where it is empty."""
    before = _ext.cpu_capability()
    if not instruction_set or before is None:
        yield
        return
    _ext.cap_cpu(instruction_set)
    try:
        if _ext.cpu_capability() != instruction_set:
            pytest.skip(f"this host has no {instruction_set}")
        yield
    finally:
        _ext.cap_cpu(before)


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """Seeded by the test's name: the same numbers in every run, different ones in every test."""
    return torch.Generator().manual_seed(zlib.crc32(request.node.name.encode()))


@pytest.fixture
def lazy_memory() -> None:
    """Ask for it, and allocations are not filled: pages that nobody touches cost nothing."""


@pytest.fixture(autouse=True)
def nan_filled_allocations(request: pytest.FixtureRequest) -> Iterator[None]:
    """torch.empty and its kin, from Python and C++ alike, come filled with NaN (integers: the largest value).

    An output or scratch buffer that a kernel forgets to write then shows. Tests that need more address space than
    memory opt out by the fixture `lazy_memory`.
    """
    if "lazy_memory" in request.fixturenames:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(before)
