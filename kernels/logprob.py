# SPDX-License-Identifier: Apache-2.0
"""The family logprob in Triton: token_stats and its gradient; see rlhf_fast/ops/logprob.py for the mathematics.

The forward reads the logits once (kernels/logprob_fold.py). If there are too few rows to fill the device, rows are
split, and a second kernel merges the splits in a fixed order. The backward reads and writes once
(kernels/logprob_gradient.py). Exponents are in powers of two, and what is stored is in nats.
"""

from typing import Any

import torch
from torch import Tensor

from rlhf_fast.kernels.common import dense, launch
from rlhf_fast.kernels.logprob_fold import PARTIALS, token_stats_combine, token_stats_fold
from rlhf_fast.kernels.logprob_gradient import token_stats_gradient
from rlhf_fast.kernels.rows import rows_of, shaping, spans_for, splits_for
from rlhf_fast.ops.logprob import fake_stats

LANES, VECTORS_PER_THREAD = 512, 2  # 256 threads with 32 bytes in flight each


def token_stats(
    logits: Tensor,  # (..., V)
    targets: Tensor | None,  # (...) or (..., K)
    mask: Tensor | None,  # (...)
    row_temperature: Tensor | None,  # (...)
    temperature: float,
    logit_scale: float,
    softcap: float,
    vocab_size: int,
    outputs: int,
    inplace_backward: bool,
) -> tuple[Tensor, ...]:
    """logprobs, entropy, logsumexp, sum_sq_probs, argmax (empty if not requested) and parts (..., 2)."""
    results = fake_stats(logits, targets, logits.shape[:-1], torch.float32, outputs)
    if logits.numel() == 0:
        return tuple(x.zero_() for x in results)
    rows = rows_of(logits, vocab_size=vocab_size)
    tile, tiles = rows.tiles(LANES, VECTORS_PER_THREAD)
    splits, blocks = splits_for(tiles, rows.columns, tile.block, logits.device)
    shape = shaping(temperature, logit_scale, softcap)
    requested = [x if outputs & (1 << bit) else None for bit, x in enumerate(results[:5])]
    parts = results[5]
    partials = parts.new_empty((rows.count, splits, PARTIALS.value)) if splits > 1 else None
    pointers = (*rows.tensors, dense(targets), dense(mask), dense(row_temperature), *requested, parts, partials)
    layout = (rows.count, rows.inner, *rows.strides, rows.columns, _targets_per_row(targets, rows.count), splits)
    launch(
        token_stats_fold, tiles * splits, logits, *pointers, *layout, blocks, rows.readable, *shape[:3],
        SHAPE=shape.shape, PADDED=rows.columns < rows.readable, **tile.constants(),
    )  # fmt: skip
    if splits > 1:
        launch(
            token_stats_combine, rows.count, logits, *pointers, *layout, *shape[:3],
            SHAPE=shape.shape, VEC=tile.vec, num_warps=2,
        )  # fmt: skip
    return results


def _targets_per_row(targets: Tensor | None, n_rows: int) -> int:
    return 0 if targets is None else targets.numel() // n_rows


def token_stats_backward(
    grad_logprobs: Tensor | None,  # as targets
    grad_entropy: Tensor | None,  # (...)
    grad_logsumexp: Tensor | None,  # (...)
    logits: Tensor,  # (..., V)
    *saved_and_options: Any,
) -> Tensor:
    """The gradient (..., V); `saved_and_options` as in `_write_gradient`."""
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _write_gradient(grad, grad_logprobs, grad_entropy, grad_logsumexp, logits, *saved_and_options)
    return grad


def token_stats_backward_(
    grad_logprobs: Tensor | None,  # as targets
    grad_entropy: Tensor | None,  # (...)
    grad_logsumexp: Tensor | None,  # (...)
    logits: Tensor,  # (..., V), overwritten
    *saved_and_options: Any,
) -> None:
    """The same, overwriting the logits."""
    _write_gradient(logits, grad_logprobs, grad_entropy, grad_logsumexp, logits, *saved_and_options)


def _write_gradient(
    grad_logits: Tensor,  # (..., V), may be logits
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    grad_logsumexp: Tensor | None,
    logits: Tensor,
    targets: Tensor | None,  # (...) or (..., K)
    mask: Tensor | None,  # (...)
    row_temperature: Tensor | None,  # (...)
    entropy: Tensor | None,  # (...)
    parts: Tensor,  # (..., 2)
    temperature: float,
    logit_scale: float,
    softcap: float,
    vocab_size: int,
) -> None:
    if logits.numel() == 0:
        return
    rows = rows_of(logits, grad_logits, vocab_size=vocab_size)
    x, out = rows.tensors
    tile, tiles = rows.tiles(LANES, VECTORS_PER_THREAD)
    splits, blocks = spans_for(tiles, rows.width, tile.block, logits.device)
    shape = shaping(temperature, logit_scale, softcap)
    launch(
        token_stats_gradient, tiles * splits, logits,
        dense(grad_logprobs), dense(grad_entropy), dense(grad_logsumexp), x, out,
        dense(targets), dense(mask), dense(row_temperature), dense(entropy), dense(parts),
        rows.count, rows.inner, *rows.strides, rows.columns, rows.readable, rows.width,
        _targets_per_row(targets, rows.count), splits, blocks, *shape[:3],
        SHAPE=shape.shape, PADDED=rows.columns < rows.width, **tile.flat_constants(),
    )  # fmt: skip
    if out is not grad_logits:  # rows_of copied it because of its layout
        grad_logits.copy_(out)
