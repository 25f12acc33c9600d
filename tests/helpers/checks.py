# SPDX-License-Identifier: Apache-2.0
"""What every integration is held to, function by function."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.integrations import Patch
from rlhf_fast.integrations._patch import plain_signature

#: Ours and theirs are both float32 computations of one number: they may differ by this much, relative to its size.
AGREE = 2e-5
#: Below this error against float64 a float32 result is as good as another.
ROUNDING = 2e-6


def split_path(path: str) -> tuple[str, str]:
    """ "package.module.Class.name" -> ("package.module", "Class.name"); the module must be loaded."""
    module = path.rpartition(".")[0]
    while module not in sys.modules:
        module = module.rpartition(".")[0]
    return module, path.removeprefix(module + ".")


def look_up(path: str) -> Any:
    """What stands there now."""
    module, names = split_path(path)
    found: Any = sys.modules[module]
    for name in names.split("."):
        found = vars(found)[name]
    return found


def assert_signature(path: str, recorded: str) -> None:
    actual = plain_signature(look_up(path))
    assert actual == recorded, (
        f"{path} has a new signature, ({actual}), recorded is ({recorded}). It is now left alone. Read what changed "
        "there, adapt the replacement in rlhf_fast/integrations, and record the signature in SIGNATURES."
    )


def assert_replaces_and_restores(apply: Callable[[], Patch], paths: list[str]) -> None:
    """Each path is ours inside; a module that imported it by name sees ours; afterwards the identical objects."""
    before = {path: look_up(path) for path in paths}
    by_name = {path: path.replace(".", "_") for path in paths if "." not in split_path(path)[1]}  # functions only
    consumer = ModuleType("somebody_elses_trainer")
    vars(consumer).update({name: before[path] for path, name in by_name.items()})
    sys.modules[consumer.__name__] = consumer
    try:
        with apply() as patch:
            for path, original in before.items():
                assert patch.rows[path].startswith("replaced"), patch.report()
                assert look_up(path).rlhf_fast_replaces is original
            for path, name in by_name.items():
                assert getattr(consumer, name) is look_up(path)
            with apply() as again:
                assert all(again.rows[path].startswith("ours already") for path in paths), again.report()
            assert look_up(paths[0]) is not before[paths[0]], "undoing the second patch undid the first"
        for path, original in before.items():
            assert look_up(path) is original, path
        for path, name in by_name.items():
            assert getattr(consumer, name) is before[path]
    finally:
        del sys.modules[consumer.__name__]


def results_and_gradients(
    function: Callable[..., Any], inputs: dict[str, Tensor], cotangents_seed: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of a fixed random combination of those that have one, in the float inputs."""
    leaves = {name: x.detach().clone().requires_grad_(x.is_floating_point()) for name, x in inputs.items()}
    # Non-leaf copies: some of the trainers' functions write to what they are given.
    made = function(**{name: x * 1 if x.is_floating_point() else x for name, x in leaves.items()})
    outputs = [x for x in (made if isinstance(made, tuple) else (made,)) if x is not None]
    generator = torch.Generator().manual_seed(cotangents_seed)
    loss = torch.zeros((), dtype=torch.float64)
    for x in outputs:
        weights = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        if x.requires_grad:
            loss = loss + (x.double() * weights).sum()
    floats = [x for x in leaves.values() if x.is_floating_point()]
    gradients = torch.autograd.grad(loss, floats, allow_unused=True) if loss.requires_grad else [None] * len(floats)
    zeros = [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, floats, strict=True)]
    return [x.detach() for x in outputs], zeros


def largest_error(actual: list[Tensor], truth: list[Tensor]) -> float:
    """Largest difference, relative to the largest true entry of each tensor (or to 1)."""
    worst = 0.0
    for a, t in zip(actual, truth, strict=True):
        assert a.shape == t.shape, f"shapes {tuple(a.shape)} and {tuple(t.shape)}"
        t = t.double()
        scale = max(1.0, t.abs().max().item()) if t.numel() else 1.0
        worst = max(worst, (a.double() - t).abs().max().item() / scale if t.numel() else 0.0)
    return worst


def assert_as_original(
    ours: Callable[..., Any],
    original: Callable[..., Any],
    inputs: dict[str, Tensor],
    *,
    real: Tensor | None = None,
    truth: Callable[..., Any] | None = None,
) -> None:
    """Values and gradients are the original's, and no further from float64 than its own (or than rounding).

    Args:
        real: compare the outputs only there (where masked slots hold numbers that nobody reads).
        truth: what to run in float64, where the original computes in float32 whatever comes in.
    """
    doubled = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    runs = ((ours, inputs), (original, inputs), (truth or original, doubled))
    made = [results_and_gradients(f, x) for f, x in runs]
    if real is not None:
        made = [([x[real] for x in outputs], gradients) for outputs, gradients in made]
    for what, a, b, exact in zip(("value", "gradient"), *made, strict=True):
        assert largest_error(a, b) <= AGREE, f"{what}: ours and the original differ by {largest_error(a, b):.2e}"
        ours_error, their_error = largest_error(a, exact), largest_error(b, exact)
        assert ours_error <= max(their_error, ROUNDING), f"{what}: error {ours_error:.2e}, theirs {their_error:.2e}"
