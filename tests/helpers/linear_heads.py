# SPDX-License-Identifier: Apache-2.0
"""Random heads for the tests of the linear ops, and what a model's head and PyTorch make of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import rlhf_fast as rf
from helpers import truths
from helpers.tolerances import ATOL, assert_gradient, max_error
from helpers.tools import randn, upcast, with_gradients

ALL_OUTPUTS = ("logprobs", "entropy", "logsumexp", "sum_sq_probs", "argmax")
DIFFERENTIABLE = ("logprobs", "entropy", "logsumexp")
HIDDEN, VOCABULARY = 24, 301
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


# The loops are the same Python on every backend, and their row kernels have tests of their own: most of what is here
# runs on two backends, the rest shows that the others serve tiles, masks and empty inputs too.
both = pytest.mark.parametrize("backend", ["torch", "native"], indirect=True)
both_and_dtype = pytest.mark.parametrize(
    "backend, dtype",
    [
        pytest.param(backend, DTYPES[dtype], id=f"{backend}-{dtype}")
        for backend, dtypes in (("torch", ("fp64", "fp32", "bf16")), ("native", ("fp32", "fp16", "bf16")))
        for dtype in dtypes
    ],
    indirect=["backend"],
)


def head(
    generator: torch.Generator, dtype: torch.dtype, rows: tuple[int, ...], width: int = VOCABULARY, bias: bool = True
) -> dict[str, Tensor]:
    inputs = {
        "hidden": randn(*rows, HIDDEN, generator=generator, dtype=dtype),
        "weight": randn(width, HIDDEN, generator=generator, dtype=dtype, scale=0.5),
    }
    if bias:
        inputs["bias"] = randn(width, generator=generator, dtype=dtype)
    return inputs


def eager_stats(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, **options: Any
) -> dict[str, Tensor]:
    """What a model's head and PyTorch give: logits in the dtype of the head, the statistics from them."""
    return truths.token_stats(truths.linear_logits(hidden, weight, bias), targets, **options)


def check_linear(inputs: dict[str, Tensor], targets: Tensor, memory_budget: int | None = None, **options: Any) -> None:
    """All outputs, and the gradients to hidden, weight and bias of each differentiable output alone and of all."""
    dtype = inputs["hidden"].dtype
    true_inputs = {k: upcast(v) for k, v in inputs.items()}
    true_options = {k: upcast(v) for k, v in options.items()}
    for subset in [DIFFERENTIABLE, *((name,) for name in DIFFERENTIABLE)]:
        got, grads = with_gradients(
            lambda **x: rf.linear_token_stats(
                **x, targets=targets, outputs=ALL_OUTPUTS, memory_budget=memory_budget, **options
            ),
            inputs,
            grads_of=subset,
        )
        true, true_grads = with_gradients(
            lambda **x: eager_stats(**x, targets=targets, **true_options), true_inputs, grads_of=subset
        )
        eager, eager_grads = with_gradients(
            lambda **x: eager_stats(**x, targets=targets, **options), inputs, grads_of=subset
        )
        for name in inputs:
            assert_gradient(
                grads[name], true_grads[name], eager_grads[name], dtype=dtype, what=f"gradient of {subset} to {name}"
            )
    for name in ALL_OUTPUTS[:-1]:
        assert got[name].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        limit = 2 * max_error(eager[name], true[name]) + ATOL[dtype]
        assert max_error(got[name], true[name]) <= limit, name
    if dtype in (torch.float64, torch.float32):  # rounded logits may tie otherwise
        assert torch.equal(got["argmax"], true["argmax"])
