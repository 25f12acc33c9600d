# SPDX-License-Identifier: Apache-2.0
"""How close is close enough: the one table of tolerances and the one rule that uses it.

Truth is computed in float64 on the same (already rounded) inputs. A result passes when

    err <= 2 * err_of_eager_pytorch_in_the_same_dtype + ATOL[dtype]

so an op may not be worse than what it replaces. Gradients obey the same rule, both errors divided by the largest
entry of the true gradient. Infinities and NaN must sit exactly where the truth has them.
"""

from __future__ import annotations

import torch
from torch import Tensor

ATOL = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

#: Outputs are float32 whatever comes in, so from half-precision logits they may differ this much from float64, no more.
HALF_INPUT_ATOL = 1e-4


def max_error(actual: Tensor, truth: Tensor) -> float:
    """Largest |actual - truth|; infinite when shapes, infinities or NaN do not agree."""
    if actual.shape != truth.shape:
        return float("inf")
    actual, truth = actual.detach().double(), truth.detach().double()
    finite = truth.isfinite()
    same_nan = torch.equal(actual.isnan(), truth.isnan())
    same_inf = torch.equal(actual[truth.isinf()], truth[truth.isinf()])
    if not (same_nan and same_inf and bool(actual[finite].isfinite().all())):
        return float("inf")
    return (actual[finite] - truth[finite]).abs().max().item() if bool(finite.any()) else 0.0


def assert_values(
    actual: Tensor, truth: Tensor, eager: Tensor | None = None, *, dtype: torch.dtype, what: str = "value"
) -> None:
    """Values against float64 `truth`; `eager` is what plain PyTorch makes of the same inputs in `dtype`.

    From half-precision inputs the outputs are float32 all the same: there the bound is HALF_INPUT_ATOL (relative where
    true values exceed 100: a logsumexp of 1e4 has float32 steps of 1e-3), and eager's far larger error buys nothing.
    """
    error = max_error(actual, truth)
    if dtype in (torch.float16, torch.bfloat16):
        finite = truth.detach()[truth.isfinite()].abs()
        limit = HALF_INPUT_ATOL * max(1.0, finite.max().item() / 100 if finite.numel() else 0.0)
    else:
        limit = ATOL[dtype] + (2 * _finite_error(eager, truth) if eager is not None else 0.0)
    assert error <= limit, f"{what}: error {error:.3e} over the limit {limit:.3e} ({dtype})\n{actual}\n{truth}"


def assert_gradient(
    actual: Tensor | None, truth: Tensor, eager: Tensor | None = None, *, dtype: torch.dtype, what: str = "gradient"
) -> None:
    """Gradients: the same rule, relative to the largest entry of the true gradient (or to 1e-4, where all vanish)."""
    assert actual is not None, f"{what}: no gradient came back"
    assert actual.dtype == dtype, f"{what}: gradient has dtype {actual.dtype}, input has {dtype}"
    finite = truth.detach()[truth.isfinite()].abs()
    scale = max(finite.max().item() if finite.numel() else 0.0, 1e-4)
    error = max_error(actual, truth)
    limit = ATOL[dtype] * scale + (2 * _finite_error(eager, truth) if eager is not None else 0.0)
    assert error <= limit, (
        f"{what}: error {error:.3e} over the limit {limit:.3e} ({dtype}, largest true entry {scale:.3e})"
    )


def _finite_error(eager: Tensor, truth: Tensor) -> float:
    """Eager's error; where eager itself breaks (NaN, inf) it grants no allowance."""
    error = max_error(eager, truth)
    return error if error < float("inf") else 0.0
