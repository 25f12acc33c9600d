# SPDX-License-Identifier: Apache-2.0
"""token_stats and its gradient, a block of rows at a time. The mathematics is in `rlhf_fast/ops/logprob.py`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.ops import codes
from rlhf_fast.ops.reference.blocks import Buffers, row_blocks
from rlhf_fast.ops.reference.common import accumulate_dtype

LOWEST = -1e4  # replaces a log-probability of -inf in p log p: its exp is 0, and 0 times it is 0


class ShapedLogits(NamedTuple):
    """The softmax's input z = u * factor for logits x, and its derivative dz/dx.

    Without a softcap u is x, or -x for a negative logit_scale. In every backend the row's maximum is over u:
    subtracting it before multiplying by `factor` keeps the digits of logits that share a large offset.
    """

    u: Tensor  # (..., V)
    factor: float | Tensor  # > 0; (..., 1) where temperatures are per row
    slope: Tensor  # dz/dx, broadcasts to (..., V)

    @property
    def z(self) -> Tensor:
        return self.u * self.factor


def shape_logits(
    logits: Tensor,  # (..., V)
    row_temperature: Tensor | None,  # (...)
    temperature: float,
    logit_scale: float,
    softcap: float,
    vocab_size: int,
) -> ShapedLogits:
    """z = softcap * tanh(logit_scale * x / softcap) / temperature; softcap 0 leaves the tanh out."""
    x = (logits[..., :vocab_size] if vocab_size >= 0 else logits).to(accumulate_dtype(logits.dtype))
    slope = torch.full((), logit_scale, dtype=x.dtype, device=x.device)
    scale = abs(logit_scale)
    if softcap > 0:
        capped = torch.tanh(x * (logit_scale / softcap))
        u, slope, scale = softcap * capped, slope * (1 - capped * capped), 1.0
    else:
        u = -x if logit_scale < 0 else x
    divisor = temperature if row_temperature is None else row_temperature.to(x.dtype).unsqueeze(-1)
    return ShapedLogits(u, scale / divisor, slope / divisor)


def shaped_block(
    block: Tensor,  # (..., V), a block of rows
    temperature: float | Tensor,  # (n,) where given per row
    logit_scale: float,
    softcap: float,
    buffers: Buffers,
    name: str,
) -> ShapedLogits:
    """`shape_logits` of a block, its rows in one dimension: (n, V)."""
    dtype = accumulate_dtype(block.dtype)
    x = block if block.dtype == dtype else buffers.like(block, f"{name}, wide", dtype).copy_(block)
    per_row, scalar = (temperature, 1.0) if isinstance(temperature, Tensor) else (None, temperature)
    return shape_logits(x.reshape(-1, x.shape[-1]), per_row, scalar, logit_scale, softcap, -1)


def flat_temperature(per_row: Tensor | None, scalar: float) -> float | Tensor:
    """(N,) where given per row, else the scalar."""
    return scalar if per_row is None else per_row.reshape(-1)


def below_max(shaped: ShapedLogits, row_max: Tensor, out: Tensor) -> Tensor:
    """(u - max) * factor, in `out`; a row that is all -inf stays all -inf."""
    torch.sub(shaped.u, torch.where(row_max == -torch.inf, 0.0, row_max).unsqueeze(-1), out=out)
    return out if isinstance(shaped.factor, float) and shaped.factor == 1.0 else out.mul_(shaped.factor)


def sum_and_log(exps: Tensor, row_max: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the rows of exp((u - max) * factor), and their logs: 1 and 0 for a row of all -inf."""
    total = torch.where(row_max == -torch.inf, 1.0, exps.sum(-1))
    return total, total.log()


def log_softmax_again(shaped: ShapedLogits, row_max: Tensor, log_sum: Tensor) -> Tensor:
    """Log-probabilities from each row's saved max and log-sum."""
    safe_max = torch.where(row_max == -torch.inf, 0.0, row_max)
    return (shaped.u - safe_max.unsqueeze(-1)) * shaped.factor - log_sum.unsqueeze(-1)


def logsumexp_of(row_max: Tensor, log_sum: Tensor, factor: float | Tensor) -> Tensor:
    """The logsumexp of z from a row's max of u and its log-sum; factor as in ShapedLogits."""
    return row_max * (factor.squeeze(-1) if isinstance(factor, Tensor) else factor) + log_sum


def times(weight: Tensor, log_value: Tensor) -> Tensor:
    """weight * log_value, with 0 * (-inf) = 0."""
    return torch.where(weight == 0, 0.0, weight * log_value)


def _valid_targets(targets: Tensor, columns: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Targets (..., K) that can be gathered, and which of them are in range; masked rows may hold any value."""
    if mask is not None:
        targets = torch.where(mask.unsqueeze(-1), targets, 0)
    valid = (targets >= 0) & (targets < columns)
    return torch.where(valid, targets, 0).long(), valid


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
    x = logits[..., :vocab_size] if vocab_size >= 0 else logits
    results = _empty_stats(x, targets, outputs)
    if x.numel() == 0:
        return results
    index = valid = None
    if outputs & codes.LOGPROBS:
        assert targets is not None
        index, valid = (_flat(y) for y in _valid_targets(_with_k(targets, x.shape[:-1]), x.shape[-1], mask))
    temperatures = flat_temperature(row_temperature, temperature)
    buffers, lead = Buffers(), x.shape[:-1].numel()
    for rows, block in row_blocks(x):
        t = temperatures[rows] if isinstance(temperatures, Tensor) else temperatures
        shaped = shaped_block(block, t, logit_scale, softcap, buffers, "x")
        stats = _stats_of_block(shaped, None if index is None else index[rows], outputs, buffers)
        for result, values in zip(results, stats, strict=True):
            if values is not None:
                result.view(lead, *values.shape[1:])[rows] = values
    if valid is not None:
        results[0].masked_fill_(~valid.view(results[0].shape), torch.nan)
    if mask is not None:
        for result in results:
            if result.numel() > 0:
                result.masked_fill_(~mask.reshape((*mask.shape, *(1,) * (result.dim() - mask.dim()))), 0)
    return results


def _stats_of_block(
    shaped: ShapedLogits, index: Tensor | None, outputs: int, buffers: Buffers
) -> tuple[Tensor | None, ...]:
    """The results of token_stats for rows (n, V); None for outputs not requested."""
    u = shaped.u
    row_max = u.amax(-1)
    below = below_max(shaped, row_max, buffers.like(u, "below"))
    picked = None if index is None else below.gather(-1, index)
    wants_entropy = bool(outputs & codes.ENTROPY)
    exps = torch.exp(below, out=buffers.like(u, "exps") if wants_entropy else below)
    total, log_sum = sum_and_log(exps, row_max)
    logprobs = None if picked is None else picked.sub_(log_sum.unsqueeze(-1))
    entropy = logsumexp = sum_sq_probs = argmax = None
    if wants_entropy:  # both terms are at least 0, so nothing cancels
        entropy = log_sum - below.clamp_(min=LOWEST).mul_(exps).sum(-1) / total
    if outputs & codes.LOGSUMEXP:
        logsumexp = logsumexp_of(row_max, log_sum, shaped.factor)
    if outputs & codes.SUM_SQ_PROBS:
        sum_sq_probs = exps.div_(total.unsqueeze(-1)).square_().sum(-1)
    if outputs & codes.ARGMAX:
        argmax = u.argmax(-1)
    return logprobs, entropy, logsumexp, sum_sq_probs, argmax, torch.stack([row_max, log_sum], -1)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _with_k(targets: Tensor, rows: torch.Size) -> Tensor:
    return targets.unsqueeze(-1) if targets.shape == rows else targets


def _empty_stats(x: Tensor, targets: Tensor | None, outputs: int) -> tuple[Tensor, ...]:
    """The results of token_stats, all zeros; (0,) for outputs not requested."""
    rows, dtype = x.shape[:-1], accumulate_dtype(x.dtype)
    shapes = [targets.shape if targets is not None else rows, rows, rows, rows, rows]
    dtypes = [dtype] * 4 + [torch.int64]
    results = [
        torch.zeros(shape if outputs & (1 << bit) else (0,), dtype=dt, device=x.device)
        for bit, (shape, dt) in enumerate(zip(shapes, dtypes, strict=True))
    ]
    return (*results, torch.zeros((*rows, 2), dtype=dtype, device=x.device))


def token_stats_backward(
    grad_logprobs: Tensor | None,  # as targets
    grad_entropy: Tensor | None,  # (...)
    grad_logsumexp: Tensor | None,  # (...)
    logits: Tensor,  # (..., V)
    targets: Tensor | None,  # (...) or (..., K)
    mask: Tensor | None,  # (...)
    row_temperature: Tensor | None,  # (...)
    entropy: Tensor | None,  # (...)
    parts: Tensor,  # (..., 2): row max of u, log-sum
    temperature: float,
    logit_scale: float,
    softcap: float,
    vocab_size: int,
) -> Tensor:
    result = torch.empty_like(logits, memory_format=torch.contiguous_format)
    token_stats_backward_into(
        result, grad_logprobs, grad_entropy, grad_logsumexp, logits, targets, mask, row_temperature, entropy, parts,
        temperature, logit_scale, softcap, vocab_size,
    )  # fmt: skip
    return result


class _RowGradients(NamedTuple):
    """Of each row: dz = p (slope_p + slope_log_p (log p + entropy)), plus picked at the targets."""

    slope_p: Tensor  # (N, 1)
    slope_log_p: Tensor | None  # (N, 1)
    entropy: Tensor | None  # (N, 1)
    picked: Tensor | None  # (N, K)
    targets: Tensor | None  # (N, K)

    def of(self, rows: slice) -> _RowGradients:
        return _RowGradients(self.slope_p[rows], *(x if x is None else x[rows] for x in self[1:]))


def _row_gradients(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    grad_logsumexp: Tensor | None,
    targets: Tensor | None,
    mask: Tensor | None,
    entropy: Tensor | None,
    parts: Tensor,
    columns: int,
) -> _RowGradients:
    row_max = parts[..., 0]
    alive = (row_max != -torch.inf).reshape(-1, 1)

    def of_rows(x: Tensor) -> Tensor:
        return torch.where(alive, x, 0.0)

    slope_p = parts.new_zeros(alive.shape)
    picked = index = None
    if grad_logsumexp is not None:
        slope_p += of_rows(grad_logsumexp.to(parts.dtype).reshape(-1, 1))
    if grad_logprobs is not None:
        assert targets is not None
        index, valid = (_flat(x) for x in _valid_targets(_with_k(targets, row_max.shape), columns, mask))
        picked = of_rows(torch.where(valid, grad_logprobs.to(parts.dtype).reshape(index.shape), torch.nan))
        slope_p -= picked.sum(-1, keepdim=True)
    if grad_entropy is None:
        return _RowGradients(slope_p, None, None, picked, index)
    assert entropy is not None
    return _RowGradients(
        slope_p, -of_rows(grad_entropy.to(parts.dtype).reshape(-1, 1)), entropy.reshape(-1, 1), picked, index
    )


def token_stats_backward_into(
    result: Tensor,  # (..., V); may be logits
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    grad_logsumexp: Tensor | None,
    logits: Tensor,
    targets: Tensor | None,
    mask: Tensor | None,
    row_temperature: Tensor | None,
    entropy: Tensor | None,
    parts: Tensor,
    temperature: float,
    logit_scale: float,
    softcap: float,
    vocab_size: int,
) -> None:
    """token_stats_backward, written over `result`."""
    x, out = (y[..., :vocab_size] if vocab_size >= 0 else y for y in (logits, result))
    result[..., x.shape[-1] :] = 0
    if x.numel() == 0:
        return
    given = _row_gradients(grad_logprobs, grad_entropy, grad_logsumexp, targets, mask, entropy, parts, x.shape[-1])
    flat_parts = parts.reshape(-1, 2)
    dropped = None if mask is None else ~mask.reshape(-1, 1)
    temperatures = flat_temperature(row_temperature, temperature)
    buffers = Buffers()
    for (rows, block), (_, target) in zip(row_blocks(x), row_blocks(out), strict=True):
        t = temperatures[rows] if isinstance(temperatures, Tensor) else temperatures
        shaped = shaped_block(block, t, logit_scale, softcap, buffers, "x")
        row_max, log_sum = flat_parts[rows].unbind(-1)
        direct = target.dtype == shaped.u.dtype and target.is_contiguous() and softcap == 0
        grad = target.view(shaped.u.shape) if direct else buffers.like(shaped.u, "grad")
        below_max(shaped, row_max, grad).sub_(log_sum.unsqueeze(-1))
        _finish_gradient(grad, given.of(rows), shaped.slope, buffers)
        if dropped is not None:
            grad.masked_fill_(dropped[rows], 0)
        if not direct:
            target.copy_(grad.view(target.shape))


def _finish_gradient(logp: Tensor, given: _RowGradients, slope: Tensor, buffers: Buffers) -> None:
    """Log-probabilities (n, V) -> the gradient in the logits, in place."""
    by_entry = slope.dim() == 2 and slope.shape[-1] > 1
    if not by_entry:
        slope_p, slope_log_p, picked = (
            None if y is None else y * slope for y in (given.slope_p, given.slope_log_p, given.picked)
        )
        assert slope_p is not None
        given = given._replace(slope_p=slope_p, slope_log_p=slope_log_p, picked=picked)
    if given.slope_log_p is None or given.entropy is None:
        grad = logp.exp_().mul_(given.slope_p)
    else:
        factor = torch.clamp(logp, min=LOWEST, out=buffers.like(logp, "factor")).add_(given.entropy)
        torch.addcmul(given.slope_p, factor, given.slope_log_p, out=factor)
        grad = logp.exp_().mul_(factor)
    if given.picked is not None and given.targets is not None:
        grad.scatter_add_(-1, given.targets, given.picked)
    if by_entry:
        grad.mul_(slope)
