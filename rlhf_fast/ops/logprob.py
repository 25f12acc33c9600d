# SPDX-License-Identifier: Apache-2.0
"""Token log-probabilities and the other row statistics of a softmax, from logits.

With z = softcap * tanh(logit_scale * x / softcap) / temperature for logits x (softcap None: no tanh), per row

    logsumexp    = log sum_j exp(z_j)                       logprob[t]   = z_t - logsumexp
    entropy      = -sum_j p_j log p_j,  p = softmax(z)      sum_sq_probs = sum_j p_j^2

are computed in one pass over the logits by the online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867,
algorithm 3). The gradients, with g the incoming ones,

    dz_j = g_logprob (delta_jt - p_j) + g_logsumexp p_j - g_entropy p_j (log p_j + entropy)

read the logits once and write once. The row's max and its log-sum are saved separately, since their sum would lose the
digits that p needs when all logits share a large offset.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast import _dispatch, _triton
from rlhf_fast.ops import _check, codes, reference
from rlhf_fast.ops._register import Derivative, any_batched, define, define_backward, save, saved


class TokenStats(NamedTuple):
    """Result of `token_stats`; outputs that were not requested are None. All float32 except argmax (int64)."""

    logprobs: Tensor | None = None  # as targets
    entropy: Tensor | None = None  # (...), nats
    logsumexp: Tensor | None = None  # (...)
    sum_sq_probs: Tensor | None = None  # (...)
    argmax: Tensor | None = None  # (...), lowest index among ties; in a row with a NaN any column


def token_logprobs(
    logits: Tensor,  # (..., V)
    targets: Tensor,  # (...) or (..., K)
    *,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,  # (...)
    vocab_size: int | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    """Log-probabilities of given tokens, `log_softmax(z)[targets]` with z as in the module's docstring.

    Args:
        logits: `(..., V)` float32, bfloat16, float16 or float64; leading dimensions may be strided. -inf is legal.
        targets: `(...)` or `(..., K)` int64 or int32, aligned with logits (the caller shifts).
        temperature: a float, a 0-dim tensor, or a tensor with the rows' shape; not differentiated.
        logit_scale: multiplies the logits first.
        softcap: then `softcap * tanh(. / softcap)`, before the temperature.
        mask: `(...)` bool, True = real token. Masked rows are not read, return 0 and get no gradient.
        vocab_size: number of columns in the vocabulary, if V is padded.
        inplace_backward: allow the backward to overwrite `logits` with its gradient; saves a logits-sized tensor. Only
            one backward, and no other op may need the logits: views of one tensor (`logits.split(n)`) share its
            version, so the second view's backward raises. Call the op once on the whole tensor instead.

    Returns:
        `targets.shape`, float32 (float64 for float64 logits), in nats, never above 0. A target out of range in a
        real row raises on CPU; on other devices it gives NaN, because a check would have to wait for the device.

    Raises:
        TypeError, ValueError: on a wrong dtype, shape, device or range, naming the argument.
    """
    stats = _token_stats(
        "token_logprobs", logits, targets, temperature, logit_scale, softcap, mask, vocab_size,
        inplace_backward, codes.LOGPROBS,
    )  # fmt: skip
    return stats[0]


def token_stats(
    logits: Tensor,  # (..., V)
    targets: Tensor | None = None,  # (...) or (..., K)
    *,
    outputs: tuple[str, ...] = ("logprobs", "entropy"),
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,  # (...)
    vocab_size: int | None = None,
    inplace_backward: bool = False,
) -> TokenStats:
    """Log-probabilities, entropy, logsumexp, sum of squared probabilities and argmax in one pass over the logits.

    Args:
        outputs: any of "logprobs", "entropy", "logsumexp", "sum_sq_probs", "argmax"; the first three are
            differentiable. Outputs not listed are None in the result.
        targets: may be None when "logprobs" is not in `outputs`.
        others: as for `token_logprobs`.

    Returns:
        `TokenStats`, all float32 (float64 for float64 logits) except argmax (int64). A row that is all -inf has
        logprobs and logsumexp -inf, entropy and sum_sq_probs 0, argmax 0, gradient 0.

    Raises:
        TypeError, ValueError: on a wrong dtype, shape, device or range, naming the argument.
    """
    requested = output_bits("token_stats", outputs, targets)
    results = _token_stats(
        "token_stats", logits, targets, temperature, logit_scale, softcap, mask, vocab_size, inplace_backward, requested
    )
    return as_token_stats(results, requested)


def output_bits(op: str, outputs: tuple[str, ...], targets: Tensor | None) -> int:
    """The requested outputs as one integer, one bit for each."""
    if not isinstance(outputs, (tuple, list)):
        raise TypeError(f"rlhf_fast.{op}: outputs must be a tuple of names, got {outputs!r}")
    requested = 0
    for name in outputs:
        requested |= _check.choice(op, "outputs", name, codes.OUTPUTS)
    if requested & codes.LOGPROBS and targets is None:
        raise ValueError(f"rlhf_fast.{op}: targets must be given when outputs holds 'logprobs', got None")
    return requested


def as_token_stats(results: tuple[Tensor, ...], requested: int) -> TokenStats:
    return TokenStats(*(x if requested & (1 << bit) else None for bit, x in enumerate(results[:5])))


def _token_stats(
    op: str,
    logits: Tensor,
    targets: Tensor | None,
    temperature: float | Tensor,
    logit_scale: float,
    softcap: float | None,
    mask: Tensor | None,
    vocab_size: int | None,
    inplace_backward: bool,
    requested: int,
) -> tuple[Tensor, ...]:
    _check.is_float(op, "logits", logits)
    if logits.dim() == 0:
        raise ValueError(f"rlhf_fast.{op}: logits must be (..., V), got a tensor without dimensions")
    rows = logits.shape[:-1]
    row_temperature, temperature, cap, columns = check_row_options(
        op, rows, logits.shape[-1], temperature, softcap, mask, vocab_size, logits
    )
    if requested & codes.LOGPROBS:
        check_targets(op, targets, rows, logits.shape[-1] if columns < 0 else columns, mask, logits)
    else:
        targets = None
    return _dispatch.call(
        _dispatch.select(op, logits).token_stats.default,
        logits, targets, mask, row_temperature, temperature, _check.factor(op, "logit_scale", logit_scale), cap,
        columns, requested, _check.flag(op, "inplace_backward", inplace_backward),
    )  # fmt: skip


def check_targets(
    op: str, targets: Tensor | None, rows: torch.Size, columns: int, mask: Tensor | None, first: Tensor
) -> None:
    """Check that targets are integers of the rows' shape, or of that and K, and in range if `can_look`."""
    if not isinstance(targets, Tensor) or targets.dtype not in (torch.int64, torch.int32):
        came = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise TypeError(f"rlhf_fast.{op}: targets must be an int64 or int32 tensor, got {came}")
    _check.is_dense(op, "targets", targets)
    k_per_row = targets.dim() == len(rows) + 1
    if targets.shape[: len(rows)] != rows or targets.dim() > len(rows) + 1:
        raise ValueError(
            f"rlhf_fast.{op}: targets must have the rows' shape {tuple(rows)}, or that and K, "
            f"got {tuple(targets.shape)}"
        )
    _check.on_device(op, "targets", targets, "logits", first)
    _check.targets_in_range(op, targets, columns, mask, k_per_row)


def check_row_options(
    op: str,
    rows: torch.Size,
    width: int,
    temperature: float | Tensor,
    softcap: float | None,
    mask: Tensor | None,
    vocab_size: int | None,
    first: Tensor,
) -> tuple[Tensor | None, float, float, int]:
    """Check the options that all row ops share, and return them as the operators take them."""
    _check.is_mask(op, "mask", mask, rows, "the rows", first)
    if vocab_size is not None and not 0 < _check.whole_number(op, "vocab_size", vocab_size) <= width:
        raise ValueError(f"rlhf_fast.{op}: vocab_size must be between 1 and V = {width}, got {vocab_size}")
    row_temperature, scalar = _check.temperature(op, "temperature", temperature, rows, first, mask)
    cap = 0.0 if softcap is None else _check.positive_factor(op, "softcap", softcap)
    return row_temperature, scalar, cap, -1 if vocab_size is None else vocab_size


# ----------------------------------------------------------------------------------------------- registration

ROW_OPTIONS = "float temperature, float logit_scale, float softcap, int vocab_size"
SCHEMA = (
    "(Tensor logits, Tensor? targets, Tensor? mask, Tensor? row_temperature, "
    f"{ROW_OPTIONS}, int outputs, bool inplace_backward) "
    "-> (Tensor logprobs, Tensor entropy, Tensor logsumexp, Tensor sum_sq_probs, Tensor argmax, Tensor parts)"
)
GRADIENTS = "Tensor? grad_logprobs, Tensor? grad_entropy, Tensor? grad_logsumexp"
SAVED = "Tensor? targets, Tensor? mask, Tensor? row_temperature, Tensor? entropy, Tensor parts"
BACKWARD_SCHEMA = f"({GRADIENTS}, Tensor logits, {SAVED}, {ROW_OPTIONS}) -> Tensor"
INPLACE_SCHEMA = f"({GRADIENTS}, Tensor(a!) logits, {SAVED}, {ROW_OPTIONS}) -> ()"


def _fake(
    logits: Tensor,
    targets: Tensor | None,
    mask: Tensor | None,
    row_temperature: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float,
    vocab_size: int,
    outputs: int,
    inplace_backward: bool,
) -> tuple[Tensor, ...]:
    rows = logits.shape[:-1]
    return fake_stats(logits, targets, rows, reference.accumulate_dtype(logits.dtype), outputs)


def fake_stats(
    like: Tensor, targets: Tensor | None, rows: torch.Size, dtype: torch.dtype, outputs: int
) -> tuple[Tensor, ...]:
    shapes = [targets.shape if targets is not None else rows, rows, rows, rows, rows]
    dtypes = [dtype] * 4 + [torch.int64]
    results = [
        like.new_empty(shape if outputs & (1 << bit) else (0,), dtype=dt)
        for bit, (shape, dt) in enumerate(zip(shapes, dtypes, strict=True))
    ]
    return (*results, like.new_empty((*rows, 2), dtype=dtype))


def _fake_backward(
    grad_logprobs: Tensor | None, grad_entropy: Tensor | None, grad_logsumexp: Tensor | None, logits: Tensor, *_: Any
) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _reference_inplace(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    grad_logsumexp: Tensor | None,
    logits: Tensor,
    *rest: Any,
) -> None:
    reference.token_stats_backward_into(logits, grad_logprobs, grad_entropy, grad_logsumexp, logits, *rest)


def not_differentiable(output: tuple[Tensor, ...], requested: int) -> list[Tensor]:
    """All outputs except the requested ones of logprobs, entropy and logsumexp."""
    return [x for bit, x in enumerate(output) if bit > 2 or not requested & (1 << bit)]


def rows_share_memory(x: Tensor) -> bool:
    """Whether entries may share memory (expanded tensors): such logits cannot be overwritten with their gradient."""
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, mask, row_temperature, *options, requested, inplace = inputs
    entropy, parts = output[1], output[-1]
    ctx.mark_non_differentiable(*not_differentiable(output, requested))
    ctx.set_materialize_grads(False)
    save(ctx, logits, targets, mask, row_temperature, entropy if requested & codes.ENTROPY else None, parts)
    ctx.options, ctx.inplace, ctx.overwritten = options, inplace, False


def _backward(ops: Any, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    grad_logprobs, grad_entropy, grad_logsumexp = grads[:3]
    nothing = (None,) * 9
    if grad_logprobs is None and grad_entropy is None and grad_logsumexp is None:
        return None, *nothing
    if ctx.overwritten:  # autograd's version counter notices this too, unless saved-tensor hooks are in use
        raise RuntimeError(
            f"rlhf_fast.{ctx.public}: a second backward after one with inplace_backward=True, which has overwritten "
            "the logits; drop inplace_backward, or do not backward twice"
        )
    logits, *others = saved(ctx)
    assert logits is not None
    # With create_graph the gradient must be a new tensor, whose node refuses double backward; while tracing,
    # functionalisation would copy the logits anyway.
    free = ctx.inplace and not (torch.is_grad_enabled() or torch.compiler.is_compiling() or any_batched(grads))
    if free and not rows_share_memory(logits):
        ctx.overwritten = True
        inplace = ops.token_stats_backward_.default
        _dispatch.call(inplace, grad_logprobs, grad_entropy, grad_logsumexp, logits, *others, *ctx.options)
        torch.autograd.graph.increment_version(logits)
        return logits.detach(), *nothing
    backward = ops.token_stats_backward.default
    grad = _dispatch.call(backward, grad_logprobs, grad_entropy, grad_logsumexp, logits, *others, *ctx.options)
    return grad, *nothing


PUBLIC = ("token_stats", "token_logprobs")
define(
    "token_stats", SCHEMA,
    reference=reference.token_stats, fake=_fake, derivative=Derivative(_setup_context, _backward), public=PUBLIC,
)  # fmt: skip
define_backward(
    "token_stats_backward", BACKWARD_SCHEMA,
    reference=reference.token_stats_backward, fake=_fake_backward, of=PUBLIC,
)  # fmt: skip
define("token_stats_backward_", INPLACE_SCHEMA, reference=_reference_inplace, fake=lambda *_: None)
_dispatch.served_by("token_stats", "token_logprobs", "token_stats")
_triton.launched_from("logprob", "token_stats", "token_stats_backward", "token_stats_backward_")
