# SPDX-License-Identifier: Apache-2.0
"""Token log-probabilities and statistics straight from hidden states, without ever holding all the logits.

A head is many logits tiles. Rows that the mask drops leave before the matmul; the rest go in chunks: BLAS makes a
tile, `token_stats` folds it, and in the backward its in-place gradient turns the tile into dlogits, which BLAS
consumes. The backward makes each tile again (four matmuls for forward and backward instead of three), so nothing
of size `[N, V]` outlives a chunk. Gradients accumulate in float32 over chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast import _dispatch
from rlhf_fast.ops import _check, codes, reference
from rlhf_fast.ops._register import define, define_backward
from rlhf_fast.ops.logprob import (
    ROW_OPTIONS,
    TokenStats,
    as_token_stats,
    check_row_options,
    check_targets,
    fake_stats,
    not_differentiable,
    output_bits,
)

# Default budget for one tile of logits, in bytes, and the largest tile that is worth having on a CPU: above it the
# caches are long left, below it BLAS loses speed and the float32 accumulation of the weight gradient costs more.
DEFAULT_BUDGET = {"cpu": 512 * 2**20, "cuda": 2 * 2**30}
CPU_TILE = 64 * 2**20


def linear_token_logprobs(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (...) or (..., K)
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,  # (...)
    vocab_size: int | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """`token_logprobs(hidden @ weight.T + bias, targets, ...)` without the logits.

    Args:
        hidden: `(..., H)` float32, bfloat16, float16 or float64; weight `(V, H)` and bias `(V,)` of the same dtype.
            Under autocast all three are cast to its dtype, as the model's own head would.
        targets, temperature, logit_scale, softcap, vocab_size: as for `token_logprobs`.
        mask: `(...)` bool, True = real token. Masked rows are dropped before the matmul and return 0.
        memory_budget: bytes that one tile of logits may take; None = 512 MiB on CPU, 2 GiB on CUDA. One row is always
            allowed. Results depend on it only by rounding.

    Returns:
        `targets.shape` float32 (float64 for float64); differentiable in hidden, weight and bias. Gradients that nobody
        needs (a frozen head) are not computed.
    """
    results = _linear_stats(
        "linear_token_logprobs", hidden, weight, targets, bias, temperature, logit_scale, softcap, mask, vocab_size,
        memory_budget, codes.LOGPROBS,
    )  # fmt: skip
    return results[0]


def linear_token_stats(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    targets: Tensor | None = None,  # (...) or (..., K)
    *,
    outputs: tuple[str, ...] = ("logprobs", "entropy"),
    bias: Tensor | None = None,  # (V,)
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,  # (...)
    vocab_size: int | None = None,
    memory_budget: int | None = None,
) -> TokenStats:
    """`token_stats(hidden @ weight.T + bias, targets, ...)` without the logits; arguments as `linear_token_logprobs`.

    logprobs, entropy and logsumexp are differentiable in hidden, weight and bias.
    """
    op = "linear_token_stats"
    asked = output_bits(op, outputs, targets)
    results = _linear_stats(
        op, hidden, weight, targets, bias, temperature, logit_scale, softcap, mask, vocab_size, memory_budget, asked
    )
    return as_token_stats(results, asked)


def _linear_stats(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    bias: Tensor | None,
    temperature: float | Tensor,
    logit_scale: float,
    softcap: float | None,
    mask: Tensor | None,
    vocab_size: int | None,
    memory_budget: int | None,
    asked: int,
) -> tuple[Tensor, ...]:
    _check.is_float(op, "hidden", hidden)
    if hidden.dim() == 0:
        raise ValueError(f"rlhf_fast.{op}: hidden must be (..., H), got a tensor without dimensions")
    hidden, weight, bias = _under_autocast(hidden, weight, bias)
    _check.same_dtype(op, "weight", weight, "hidden", hidden)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"rlhf_fast.{op}: weight must be (V, H) with H = {hidden.shape[-1]} as hidden, got {tuple(weight.shape)}"
        )
    _check.on_device(op, "weight", weight, "hidden", hidden)
    if bias is not None:
        _check.same_dtype(op, "bias", bias, "hidden", hidden)
        _check.shape_is(op, "bias", bias, weight.shape[:1], "the vocabulary")
    if memory_budget is not None and memory_budget < 0:
        raise ValueError(f"rlhf_fast.{op}: memory_budget must be at least 0 bytes, got {memory_budget}")
    rows, width = hidden.shape[:-1], weight.shape[0]
    row_temperature, scalar, cap, columns = check_row_options(
        op, rows, width, temperature, softcap, mask, vocab_size, hidden
    )
    if asked & codes.LOGPROBS:
        check_targets(op, targets, rows, width if columns < 0 else columns, mask, hidden)
    else:
        targets = None
    return _dispatch.select(op, hidden).linear_token_stats(
        hidden, weight, bias, targets, mask, row_temperature, scalar, float(logit_scale), cap, columns, asked,
        -1 if memory_budget is None else memory_budget,
    )  # fmt: skip


def _under_autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    device = hidden.device.type
    if hidden.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


# ----------------------------------------------------------------------------------------------- the chunk loop


def _chunks(rows: int, hidden: Tensor, weight: Tensor, memory_budget: int) -> Iterator[slice]:
    """Slices of the compacted rows whose logits tile stays inside the budget; one row is always allowed."""
    device = hidden.device.type
    tile = DEFAULT_BUDGET.get(device, DEFAULT_BUDGET["cuda"]) if memory_budget < 0 else memory_budget
    if device == "cpu":
        tile = min(tile, CPU_TILE)
    step = max(1, tile // max(1, weight.shape[0] * hidden.element_size()))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


class _Rows:
    """The real rows of the inputs, flattened and dense, and the way back."""

    def __init__(self, shape: torch.Size, mask: Tensor | None) -> None:
        self.shape = shape
        self.count = shape.numel()
        self.index = None if mask is None else mask.reshape(-1).nonzero().squeeze(-1)
        self.real = self.count if self.index is None else self.index.shape[0]

    def take(self, x: Tensor | None, width: tuple[int, ...] = ()) -> Tensor | None:
        """(*rows, *width) -> (real, *width), contiguous: BLAS is slow on strided rows."""
        if x is None:
            return None
        flat = x.reshape(self.count, *width)
        return flat.contiguous() if self.index is None else flat.index_select(0, self.index)

    def put(self, x: Tensor, width: tuple[int, ...] = ()) -> Tensor:
        """(real, *width) -> (*rows, *width), 0 at masked rows."""
        if self.index is not None:
            x = x.new_zeros(self.count, *width).index_copy_(0, self.index, x)
        return x.view((*self.shape, *width))


def _logits_tile(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with torch.autocast(hidden.device.type, enabled=False):  # the caller cast already
        return F.linear(hidden, weight, bias)


def _k_of(targets: Tensor | None, rows: torch.Size) -> tuple[int, ...]:
    return () if targets is None or targets.shape == rows else (targets.shape[-1],)


def _linear_reference(
    ops: Any,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor | None,
    mask: Tensor | None,
    row_temperature: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float,
    vocab_size: int,
    outputs: int,
    memory_budget: int,
) -> tuple[Tensor, ...]:
    rows, k = _Rows(hidden.shape[:-1], mask), _k_of(targets, hidden.shape[:-1])
    real_hidden = rows.take(hidden, (hidden.shape[-1],))
    real_targets, real_temperature = rows.take(targets, k), rows.take(row_temperature)
    assert real_hidden is not None
    widths = (k, (), (), (), (), (2,))
    asked = [bool(outputs & (1 << bit)) for bit in range(5)] + [True]
    dtype = reference.accumulate_dtype(hidden.dtype)
    dtypes = [dtype] * 4 + [torch.int64, dtype]
    results = [
        torch.empty((rows.real, *w) if wanted else (0,), dtype=dt, device=hidden.device)
        for w, wanted, dt in zip(widths, asked, dtypes, strict=True)
    ]
    for chunk in _chunks(rows.real, hidden, weight, memory_budget):
        logits = _logits_tile(real_hidden[chunk], weight, bias)
        parts = ops.token_stats(
            logits,
            None if real_targets is None else real_targets[chunk],
            None,
            None if real_temperature is None else real_temperature[chunk],
            temperature, logit_scale, softcap, vocab_size, outputs, False,
        )  # fmt: skip
        for whole, part, wanted in zip(results, parts, asked, strict=True):
            if wanted:
                whole[chunk] = part
    return tuple(rows.put(x, w) if wanted else x for x, w, wanted in zip(results, widths, asked, strict=True))


def _linear_reference_backward(
    ops: Any,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    grad_logsumexp: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor | None,
    mask: Tensor | None,
    row_temperature: Tensor | None,
    entropy: Tensor | None,
    parts: Tensor,
    temperature: float,
    logit_scale: float,
    softcap: float,
    vocab_size: int,
    memory_budget: int,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, k = _Rows(hidden.shape[:-1], mask), _k_of(targets, hidden.shape[:-1])
    real_hidden = rows.take(hidden, (hidden.shape[-1],))
    assert real_hidden is not None
    per_row = [rows.take(x, w) for x, w in (
        (grad_logprobs, k), (grad_entropy, ()), (grad_logsumexp, ()), (targets, k), (row_temperature, ()),
        (entropy, ()), (parts, (2,)),
    )]  # fmt: skip
    accumulate = reference.accumulate_dtype(hidden.dtype)
    grad_hidden = torch.empty_like(real_hidden) if needs_hidden else hidden.new_empty(0)
    grad_weight = weight.new_zeros(weight.shape if needs_weight else (0,), dtype=accumulate)
    grad_bias = weight.new_zeros(weight.shape[:1] if needs_bias else (0,), dtype=accumulate)
    for chunk in _chunks(rows.real, hidden, weight, memory_budget):
        tile = _logits_tile(real_hidden[chunk], weight, bias)
        g_logprobs, g_entropy, g_logsumexp, chunk_targets, *saved = (None if x is None else x[chunk] for x in per_row)
        ops.token_stats_backward_(
            g_logprobs, g_entropy, g_logsumexp, tile, chunk_targets, None, *saved,
            temperature, logit_scale, softcap, vocab_size,
        )  # fmt: skip
        if needs_hidden:
            torch.mm(tile, weight, out=grad_hidden[chunk])
        if needs_weight:
            _add_product(grad_weight, tile, real_hidden[chunk])
        if needs_bias:
            grad_bias += tile.sum(0, dtype=accumulate)
    if needs_hidden:
        grad_hidden = rows.put(grad_hidden, (hidden.shape[-1],))
    return grad_hidden, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def _add_product(total: Tensor, tile: Tensor, hidden: Tensor) -> None:
    """total += tile.T @ hidden, kept in total's dtype."""
    if total.dtype == tile.dtype:
        total.addmm_(tile.t(), hidden)
    else:
        total += tile.t() @ hidden


# ----------------------------------------------------------------------------------------------- registration

HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor? targets, Tensor? mask, Tensor? row_temperature"


def _fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    outputs = rest[-2]
    return fake_stats(hidden, targets, hidden.shape[:-1], reference.accumulate_dtype(hidden.dtype), outputs)


def _fake_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, *_, needs_hidden, needs_weight, needs_bias = args[3:]
    return (
        torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs_hidden else hidden.new_empty(0),
        weight.new_empty(weight.shape if needs_weight else (0,)),
        weight.new_empty(weight.shape[:1] if needs_bias else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, temperature, logit_scale, softcap, vocab_size, outputs, memory_budget = inputs
    entropy, parts = output[1], output[-1]
    ctx.mark_non_differentiable(*not_differentiable(output, outputs))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, entropy if outputs & codes.ENTROPY else None, parts)
    ctx.options = (temperature, logit_scale, softcap, vocab_size, memory_budget)


def _backward(ops: Any, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    if all(g is None for g in grads[:3]):
        return (None,) * 12
    wanted = ctx.needs_input_grad[:3]
    results = ops.linear_token_stats_backward(*grads[:3], *ctx.saved_tensors, *ctx.options, *wanted)
    return (*(g if w else None for g, w in zip(results, wanted, strict=True)), *(None,) * 9)


define(
    "linear_token_stats",
    f"({HEAD}, {ROW_OPTIONS}, int outputs, int memory_budget) "
    "-> (Tensor logprobs, Tensor entropy, Tensor logsumexp, Tensor sum_sq_probs, Tensor argmax, Tensor parts)",
    reference=_linear_reference, fake=_fake, setup_context=_setup_context, backward=_backward,
)  # fmt: skip
define_backward(
    "linear_token_stats_backward",
    f"(Tensor? grad_logprobs, Tensor? grad_entropy, Tensor? grad_logsumexp, {HEAD}, Tensor? entropy, Tensor parts, "
    f"{ROW_OPTIONS}, int memory_budget, bool needs_hidden, bool needs_weight, bool needs_bias) "
    "-> (Tensor, Tensor, Tensor)",
    reference=_linear_reference_backward, fake=_fake_backward, of="linear_token_stats",
)  # fmt: skip
