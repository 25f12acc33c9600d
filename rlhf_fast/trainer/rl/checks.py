# SPDX-License-Identifier: Apache-2.0
"""Checks that PPO makes at every step: each stops the run with what is wrong, where, and what to do about it."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.errors import UserError

# Old and new log-probabilities come from the same function on the same rows, once without and once with autograd. In
# float32 they differ by rounding only. In bfloat16 autograd may pick another attention kernel, and hidden states carry
# 8 bits: single tokens were seen to move by some hundredths of a nat, their mean by less than a thousandth.
RATIO_TOLERANCE = {torch.float32: (1e-3, 1e-4), torch.bfloat16: (0.3, 0.01), torch.float16: (0.1, 0.005)}


def check_finite(name: str, values: Tensor, mask: Tensor | None = None) -> None:
    """Stop unless every entry (where `mask`) is finite; `values` (B,) or (B, T)."""
    bad = ~torch.isfinite(values)
    if mask is not None:
        bad &= mask
    if bool(bad.any()):
        raise UserError(
            f"{name} is {_at(values, bad)}, {int(bad.sum())} such entries in all. "
            "Lower the learning rate, or set dtype to float32"
        )


def check_logprobs(name: str, logprobs: Tensor, mask: Tensor) -> None:
    """Stop if a log-probability is not finite or above 0 (beyond rounding)."""
    check_finite(name, logprobs, mask)
    bad = (logprobs > 1e-3) & mask
    if bool(bad.any()):
        raise UserError(
            f"{name} is {_at(logprobs, bad)}; a log-probability is at most 0. "
            "This is a defect of the backend: set RLHF_FAST_BACKEND=torch and report it"
        )


def check_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, dtype: torch.dtype) -> None:
    """Stop unless the first minibatch of a step has the log-probabilities that the advantages were made from."""
    largest, mean = RATIO_TOLERANCE.get(dtype, RATIO_TOLERANCE[torch.float32])
    gap = (logprobs.detach() - old_logprobs).abs() * mask
    average = float(gap.sum() / mask.sum().clamp(min=1))
    bad = (gap > largest) | (~torch.isfinite(gap) & mask)
    if bool(bad.any()) or average > mean:
        worst = bad if bool(bad.any()) else gap == gap.max()
        raise UserError(
            "the probability ratio of the first minibatch is not 1: |logprobs - old_logprobs| is "
            f"{_at(gap, worst)}, {average:.2g} on average (at most {largest} and {mean} in {dtype} are rounding). "
            "The model gives two answers to one question: look for dropout that is on, or set dtype to float32"
        )


def _at(values: Tensor, bad: Tensor) -> str:
    """Value and place of the first bad entry."""
    place = bad.nonzero()[0].tolist()
    names = " ".join(f"{axis} {i}" for axis, i in zip(("sample", "token"), place, strict=False))
    return f"{float(values[tuple(place)]):.4g} at {names}"
