# SPDX-License-Identifier: Apache-2.0
"""KL divergence per token: exact over the vocabulary from two logits tensors, or estimated from two log-probs.

Exact, with p = softmax(z) of the policy and q = softmax(y) of the reference:

    reverse  KL(p, q) = sum_j p_j (log p_j - log q_j)      forward  KL(q, p)
    jsd      beta KL(q, m) + (1 - beta) KL(p, m),  m = (1 - beta) p + beta q      (Agarwal et al. 2024, eq. 1)
    tv       1/2 sum_j |p_j - q_j|

Estimated from a token sampled from p, with d = log p - log q of that token (Schulman 2020, joschu.net/blog/kl-approx):

    k1 = d        k2 = d^2 / 2        k3 = exp(-d) - 1 + d        abs = |d|

The values of k1 and k3 are unbiased. As a loss on on-policy tokens, only k2 has the gradient of the reverse KL: k1's
has expectation 0, and k3's is right to first order only (Tang and Munos 2025). So `gradient="straight_through"` returns
any estimator's value with k2's gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fast import _dispatch, _triton
from rlhf_fast.ops import _check, codes, reference
from rlhf_fast.ops._register import CONSTANT, Derivative, any_batched, define, define_backward, save, saved
from rlhf_fast.ops.logprob import check_row_options


def token_kl(
    logits: Tensor,  # (..., V)
    ref_logits: Tensor,  # (..., V)
    *,
    kind: str = "reverse",
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    ref_temperature: float | Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,  # (...)
    vocab_size: int | None = None,
) -> Tensor:
    """Exact divergence of policy and reference at each token, in nats; formulas in the module's docstring.

    Args:
        logits, ref_logits: `(..., V)`, of one dtype: float32, bfloat16, float16 or float64; -inf is legal.
        kind: "reverse" = KL(policy, ref), "forward" = KL(ref, policy), "jsd" or "tv".
        beta: the reference's share in jsd, strictly between 0 and 1.
        temperature, ref_temperature: float, 0-dim tensor or tensor of the rows' shape; the reference's defaults
            to the policy's. Not differentiated.
        logit_scale, softcap, mask, vocab_size: as for `token_logprobs`; scale and softcap apply to both.

    Returns:
        `(...)` float32 (float64 for float64 logits); 0 at masked rows. Differentiable in `logits`, and in `ref_logits`
        if that requires grad. Where the value is +inf (a token that only one side forbids) the gradient is finite: the
        forbidden side's log-probability is taken as -104 nats, about the log of float32's smallest number.

    Raises:
        TypeError, ValueError: on a wrong dtype, shape, device or range, naming the argument.
    """
    op = "token_kl"
    tensors, options = _checked_pair(
        op, logits, ref_logits, kind, beta, temperature, ref_temperature, logit_scale, softcap, mask, vocab_size
    )
    kl, _ = _dispatch.call(_dispatch.select(op, logits).token_kl.default, *tensors, *options)
    return kl


def token_kl_and_grad(
    logits: Tensor,  # (..., V)
    ref_logits: Tensor,  # (..., V)
    grad_kl: Tensor,  # (...)
    *,
    kind: str = "reverse",
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    ref_temperature: float | Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,  # (...)
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`token_kl` and its gradient at once, for a loss whose gradient in each token's KL is known beforehand.

    This holds for every weighted sum of the KL, such as `kl_coef * (kl * mask).sum() / mask.sum()`. It is faster than a
    separate backward because the rows are still in cache. Nothing is recorded for autograd.

    Args:
        grad_kl: `(...)` float, the gradient of the loss in each token's KL, in this example `kl_coef / mask.sum()`.
        others: as for `token_kl`.

    Returns:
        `(kl, grad_logits)`: kl as from `token_kl`, and the gradient that its backward would give for `grad_kl`,
        `(..., V)` in the dtype of logits; 0 at masked rows.

    Raises:
        TypeError, ValueError: on a wrong dtype, shape, device or range, naming the argument.
    """
    op = "token_kl_and_grad"
    tensors, options = _checked_pair(
        op, logits, ref_logits, kind, beta, temperature, ref_temperature, logit_scale, softcap, mask, vocab_size
    )
    _check.is_float(op, "grad_kl", grad_kl)
    _check.shape_is(op, "grad_kl", grad_kl, logits.shape[:-1], "the rows")
    _check.on_device(op, "grad_kl", grad_kl, "logits", logits)
    weights = grad_kl.to(reference.accumulate_dtype(logits.dtype))
    return _dispatch.call(_dispatch.select(op, logits).token_kl_and_grad.default, weights, *tensors, *options)


def _checked_pair(
    op: str,
    logits: Tensor,
    ref_logits: Tensor,
    kind: str,
    beta: float,
    temperature: float | Tensor,
    ref_temperature: float | Tensor | None,
    logit_scale: float,
    softcap: float | None,
    mask: Tensor | None,
    vocab_size: int | None,
) -> tuple[tuple[Tensor | None, ...], tuple[float, ...]]:
    """Checks the arguments that both ops share; returns the operators' tensors and options."""
    _check.is_float(op, "logits", logits)
    _check.same_dtype(op, "ref_logits", ref_logits, "logits", logits)
    if logits.dim() == 0:
        raise ValueError(f"rlhf_fast.{op}: logits must be (..., V), got a tensor without dimensions")
    _check.shape_is(op, "ref_logits", ref_logits, logits.shape, "logits")
    _check.on_device(op, "ref_logits", ref_logits, "logits", logits)
    kind_code = _check.choice(op, "kind", kind, codes.KL_KINDS)
    if not 0 < _check.number(op, "beta", beta) < 1:
        raise ValueError(f"rlhf_fast.{op}: beta must be strictly between 0 and 1, got {beta}")
    rows = logits.shape[:-1]
    row_temperature, scalar, cap, columns = check_row_options(
        op, rows, logits.shape[-1], temperature, softcap, mask, vocab_size, logits
    )
    ref_row_temperature, ref_scalar = row_temperature, scalar
    if ref_temperature is not None:
        ref_row_temperature, ref_scalar = _check.temperature(op, "ref_temperature", ref_temperature, rows, logits, mask)
    options = (scalar, ref_scalar, _check.factor(op, "logit_scale", logit_scale), cap, columns, kind_code, float(beta))
    return (logits, ref_logits, mask, row_temperature, ref_row_temperature), options


def approx_kl(
    logprobs: Tensor,  # (B, T)
    ref_logprobs: Tensor,  # (B, T)
    *,
    estimator: str = "k1",
    gradient: str = "value",
    importance_ratio: Tensor | None = None,  # (B, T)
    clamp: float | None = None,
    log_ratio_limit: float | None = None,
    mask: Tensor | None = None,  # (B, T)
) -> Tensor:
    """Estimate of KL(policy, ref) at each token from the log-probs of the sampled token, in nats.

    Args:
        logprobs, ref_logprobs: `(B, T)` (any equal shapes), of one float dtype.
        estimator: "k1", "k2", "k3" or "abs"; formulas in the module's docstring.
        gradient: "value" = the estimator's own gradient, "straight_through" = k2's gradient.
        importance_ratio: policy / sampling policy, `(B, T)`; multiplies value and gradient, and is differentiated
            too unless the caller detaches it. Needed off policy (DeepSeek-V3.2, arXiv 2512.02556).
        clamp: limits the estimate to [-clamp, clamp]. The gradient is that without the clamp, so the tokens farthest
            from the reference still have one.
        log_ratio_limit: limits d to [-log_ratio_limit, log_ratio_limit] before the estimate, as `rf.LOG_RATIO_LIMIT`
            does in every policy loss; beyond it d is a constant. None = no limit: k3 and its gradient are then infinite
            below d = -88.7, where exp(-d) overflows float32. k1, k2 and abs are always finite.
        mask: `(B, T)` bool, True = real token.

    Returns:
        `(B, T)` float32 (float64 for float64 inputs); 0 at masked tokens.

    Raises:
        TypeError, ValueError: on a wrong dtype, shape, device or range, naming the argument.
    """
    op = "approx_kl"
    _check.is_float(op, "logprobs", logprobs)
    others = {"ref_logprobs": ref_logprobs}
    if importance_ratio is not None:
        others["importance_ratio"] = importance_ratio
    for name, x in others.items():
        _check.same_dtype(op, name, x, "logprobs", logprobs)
        _check.shape_is(op, name, x, logprobs.shape, "logprobs")
        _check.on_device(op, name, x, "logprobs", logprobs)
    _check.is_mask(op, "mask", mask, logprobs.shape, "logprobs", logprobs)
    limit = None if clamp is None else _check.positive(op, "clamp", clamp)
    if log_ratio_limit is not None:
        bound = _check.positive(op, "log_ratio_limit", log_ratio_limit)
        dtype = reference.accumulate_dtype(logprobs.dtype)
        logprobs = (logprobs.to(dtype) - ref_logprobs.to(dtype)).clamp(-bound, bound)
        ref_logprobs = torch.zeros_like(logprobs)
        importance_ratio = None if importance_ratio is None else importance_ratio.to(dtype)
    ops = _dispatch.select(op, logprobs)
    tensors = (logprobs, ref_logprobs, importance_ratio, mask)
    options = (
        _check.choice(op, "estimator", estimator, codes.ESTIMATORS),
        _check.choice(op, "gradient", gradient, codes.GRADIENTS), limit,
    )  # fmt: skip
    if ops is getattr(torch.ops, _dispatch.NAMESPACES["torch"]) and _dispatch.is_unobserved(*tensors):
        return _PlainApproxKl.apply(ops, *tensors, *options)  # type: ignore[no-any-return, no-untyped-call]
    return _dispatch.call(ops.approx_kl.default, *tensors, *options)


class _PlainApproxKl(torch.autograd.Function):
    """approx_kl on plain PyTorch without the operator's Python layers, which take as long as 64 x 1024 tokens.

    It saves the slope for the backward, since its exp is most of the work.
    """

    @staticmethod
    def forward(ctx: Any, ops: Any, *arguments: Any) -> Tensor:
        """Takes the operator's namespace and then its arguments."""
        if not any(ctx.needs_input_grad):
            return reference.approx_kl(*arguments)
        kl, value, slope = reference.approx_kl_and_slope(*arguments)
        save(ctx, *arguments[:4], value if ctx.needs_input_grad[3] else None, slope)
        ctx.ops, ctx.options, ctx.public = ops, arguments[4:], "approx_kl"
        return kl

    @staticmethod
    def backward(ctx: Any, grad_kl: Tensor) -> tuple[Any, ...]:
        """Calls the operator for create_graph, which it refuses, and for a batch of gradients, over which vmap
        loops."""
        logprobs, ref_logprobs, ratio, mask, value, slope = saved(ctx)
        tensors = (logprobs, ref_logprobs, ratio, mask)
        if torch.is_grad_enabled() or any_batched([grad_kl]):
            _dispatch.name_call(ctx.public)
            grads = ctx.ops.approx_kl_backward(grad_kl, *tensors, *ctx.options)
        else:
            grads = reference.approx_kl_gradients(grad_kl, value, slope, ratio, mask)
        return None, *_input_gradients(grads, tensors, ctx.needs_input_grad[1:4])


# ----------------------------------------------------------------------------------------------- registration

PAIR = "Tensor logits, Tensor ref_logits, Tensor? mask, Tensor? row_temperature, Tensor? ref_row_temperature"
PAIR_OPTIONS = (
    "float temperature, float ref_temperature, float logit_scale, float softcap, int vocab_size, int kind, float beta"
)
ESTIMATE = (
    "Tensor logprobs, Tensor ref_logprobs, Tensor? importance_ratio, Tensor? mask, "
    "int estimator, int gradient, float? clamp"
)


def _fake_token_kl(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype, rows = reference.accumulate_dtype(logits.dtype), logits.shape[:-1]
    return logits.new_empty(rows, dtype=dtype), logits.new_empty((*rows, 6), dtype=dtype)


def _fake_token_kl_backward(grad_kl: Tensor, logits: Tensor, ref_logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    needs_grad, needs_ref_grad = rest[-2:]
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if needed else x.new_empty(0)
        for x, needed in ((logits, needs_grad), (ref_logits, needs_ref_grad))
    )  # type: ignore[return-value]


def _setup_token_kl(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    save(ctx, *inputs[:5], output[1])
    ctx.options = inputs[5:]


def _token_kl_backward(ops: Any, ctx: Any, grad_kl: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if grad_kl is None:
        return (None,) * 12
    wanted = ctx.needs_input_grad[:2]
    grads = _dispatch.call(ops.token_kl_backward.default, grad_kl, *saved(ctx), *ctx.options, *wanted)
    return (*(g if w else None for g, w in zip(grads, wanted, strict=True)), *(None,) * 10)


def _fake_token_kl_and_grad(grad_kl: Tensor, logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    kl = logits.new_empty(logits.shape[:-1], dtype=reference.accumulate_dtype(logits.dtype))
    return kl, torch.empty_like(logits, memory_format=torch.contiguous_format)


def _fake_approx_kl(logprobs: Tensor, *_: Any) -> Tensor:
    return logprobs.new_empty(logprobs.shape, dtype=reference.accumulate_dtype(logprobs.dtype))


def _fake_approx_kl_backward(
    grad_kl: Tensor, logprobs: Tensor, ref_logprobs: Tensor, importance_ratio: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor]:
    dtype = reference.accumulate_dtype(logprobs.dtype)
    ratio_shape = (0,) if importance_ratio is None else logprobs.shape
    return logprobs.new_empty(logprobs.shape, dtype=dtype), logprobs.new_empty(ratio_shape, dtype=dtype)


def _setup_approx_kl(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    save(ctx, *inputs[:4])
    ctx.options = inputs[4:]


def _approx_kl_backward(ops: Any, ctx: Any, grad_kl: Tensor) -> tuple[Any, ...]:
    tensors = saved(ctx)
    grads = _dispatch.call(ops.approx_kl_backward.default, grad_kl, *tensors, *ctx.options)
    return _input_gradients(grads, tensors, ctx.needs_input_grad[:3])


def _input_gradients(grads: Any, tensors: Any, wanted: tuple[bool, ...]) -> tuple[Any, ...]:
    """Of the operator's inputs, from those in logprobs and importance_ratio."""
    (grad, grad_ratio), (logprobs, ref_logprobs, ratio, _) = grads, tensors
    return (
        grad.to(logprobs.dtype) if wanted[0] else None,
        grad.neg().to(ref_logprobs.dtype) if wanted[1] else None,
        grad_ratio.to(ratio.dtype) if ratio is not None and wanted[2] else None,
        *(None,) * 4,
    )


define(
    "token_kl", f"({PAIR}, {PAIR_OPTIONS}) -> (Tensor kl, Tensor parts)",
    reference=reference.token_kl, fake=_fake_token_kl, derivative=Derivative(_setup_token_kl, _token_kl_backward),
)  # fmt: skip
define_backward(
    "token_kl_backward",
    f"(Tensor grad_kl, {PAIR}, Tensor parts, {PAIR_OPTIONS}, bool needs_grad, bool needs_ref_grad) -> (Tensor, Tensor)",
    reference=reference.token_kl_backward, fake=_fake_token_kl_backward, of=("token_kl",),
)  # fmt: skip
define(
    "token_kl_and_grad", f"(Tensor grad_kl, {PAIR}, {PAIR_OPTIONS}) -> (Tensor kl, Tensor grad_logits)",
    reference=reference.token_kl_and_grad, fake=_fake_token_kl_and_grad, derivative=CONSTANT,
)  # fmt: skip
define(
    "approx_kl", f"({ESTIMATE}) -> Tensor",
    reference=reference.approx_kl, fake=_fake_approx_kl, derivative=Derivative(_setup_approx_kl, _approx_kl_backward),
)  # fmt: skip
define_backward(
    "approx_kl_backward", f"(Tensor grad_kl, {ESTIMATE}) -> (Tensor, Tensor)",
    reference=reference.approx_kl_backward, fake=_fake_approx_kl_backward, of=("approx_kl",),
)  # fmt: skip
_dispatch.served_by("token_kl", "token_kl")
_dispatch.served_by("token_kl_and_grad", "token_kl_and_grad")
_dispatch.served_by("approx_kl", "approx_kl")
_triton.launched_from("kl", "token_kl", "token_kl_backward", "token_kl_and_grad", "approx_kl", "approx_kl_backward")
