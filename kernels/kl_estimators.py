# SPDX-License-Identifier: Apache-2.0
"""approx_kl and its gradient in Triton, element by element: see rlhf_fast/ops/kl.py for the estimators."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels.common import LOG2E, dense, launch, limit_of, widen
from rlhf_fast.ops import codes

K1, K2, K3 = tl.constexpr(codes.K1), tl.constexpr(codes.K2), tl.constexpr(codes.K3)
STRAIGHT_THROUGH = tl.constexpr(codes.STRAIGHT_THROUGH)
BLOCK = 1024


@triton.jit
def _exp_terms(x):
    """exp(x) - 1 and exp(x) - 1 - x, each to float32's precision also near 0.

    exp(x) = 2^n exp(r) with |r| <= ln(2) / 2; the polynomial (Cephes expf) is that of (exp(r) - 1 - r) / r^2.
    """
    x = tl.where(x > 150.0, 150.0, tl.where(x < -150.0, -150.0, x))
    n = tl.floor(x * LOG2E + 0.5)
    r = x - n * 0.693359375 + n * 2.12194440e-4
    series = 1.3981999507e-3 + r * 1.9875691500e-4
    series = 4.1665795894e-2 + r * (8.3334519073e-3 + r * series)
    beyond_linear = r * r * (5.0000001201e-1 + r * (1.6666665459e-1 + r * series))
    minus_1 = tl.exp2(n - 1) * (2 * (1 + r + beyond_linear)) - 1  # 2^128 alone would overflow
    near_0 = n == 0
    return tl.where(near_0, r + beyond_linear, minus_1), tl.where(near_0, beyond_linear, minus_1 - x)


@triton.jit
def _estimate(d, ESTIMATOR: tl.constexpr):
    """Value and derivative in d = logprobs - ref_logprobs."""
    if ESTIMATOR == K1:
        return d, tl.full(d.shape, 1.0, tl.float32)
    elif ESTIMATOR == K2:
        return 0.5 * d * d, d
    elif ESTIMATOR == K3:
        minus_1, value = _exp_terms(-d)
        return value, -minus_1
    else:
        return tl.abs(d), tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0 * d))  # NaN stays NaN


@triton.jit
def _load_tokens(
    logprobs_ptr, ref_logprobs_ptr, ratio_ptr, mask_ptr, size, clamp, ESTIMATOR: tl.constexpr, BLOCK: tl.constexpr
):
    """A program's tokens: positions, which exist and which are real; d, clamped value, slope, importance ratio."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = place < size
    real = exists
    if mask_ptr is not None:
        real = exists & (tl.load(mask_ptr + place, mask=exists, other=0) != 0)
    logprobs = widen(tl.load(logprobs_ptr + place, mask=exists, other=0.0))
    d = logprobs - widen(tl.load(ref_logprobs_ptr + place, mask=exists, other=0.0))
    value, slope = _estimate(d, ESTIMATOR)
    value = tl.where(value > clamp, clamp, tl.where(value < -clamp, -clamp, value))  # NaN passes
    ratio = tl.full(d.shape, 1.0, tl.float32)
    if ratio_ptr is not None:
        ratio = widen(tl.load(ratio_ptr + place, mask=exists, other=0.0))
    return place, exists, real, d, value, slope, ratio


@triton.jit
def approx_kl_value(
    kl_ptr, logprobs_ptr, ref_logprobs_ptr, ratio_ptr, mask_ptr, size, clamp,
    ESTIMATOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place, exists, real, d, value, slope, ratio = _load_tokens(
        logprobs_ptr, ref_logprobs_ptr, ratio_ptr, mask_ptr, size, clamp, ESTIMATOR, BLOCK
    )
    tl.store(kl_ptr + place, tl.where(real, value * ratio, 0.0), mask=exists)


@triton.jit
def approx_kl_gradient(
    grad_ptr, grad_ratio_ptr, grad_kl_ptr, logprobs_ptr, ref_logprobs_ptr, ratio_ptr, mask_ptr, size, clamp,
    ESTIMATOR: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place, exists, real, d, value, slope, ratio = _load_tokens(
        logprobs_ptr, ref_logprobs_ptr, ratio_ptr, mask_ptr, size, clamp, ESTIMATOR, BLOCK
    )
    if GRADIENT == STRAIGHT_THROUGH:
        slope = d
    grad_kl = tl.load(grad_kl_ptr + place, mask=exists, other=0.0)
    tl.store(grad_ptr + place, tl.where(real, grad_kl * (slope * ratio), 0.0), mask=exists)
    if ratio_ptr is not None:
        tl.store(grad_ratio_ptr + place, tl.where(real, grad_kl * value, 0.0), mask=exists)


def approx_kl(
    logprobs: Tensor,  # (B, T)
    ref_logprobs: Tensor,  # (B, T)
    importance_ratio: Tensor | None,  # (B, T)
    mask: Tensor | None,  # (B, T)
    estimator: int,
    gradient: int,
    clamp: float | None,
) -> Tensor:
    """Value of the estimator, (B, T) float32."""
    kl = torch.empty(logprobs.shape, dtype=torch.float32, device=logprobs.device)
    tokens = [dense(x) for x in (logprobs, ref_logprobs, importance_ratio, mask)]
    _launch(approx_kl_value, logprobs, kl, *tokens, logprobs.numel(), limit_of(clamp), ESTIMATOR=estimator)
    return kl


def approx_kl_backward(
    grad_kl: Tensor,  # (B, T)
    logprobs: Tensor,  # (B, T)
    ref_logprobs: Tensor,  # (B, T)
    importance_ratio: Tensor | None,  # (B, T)
    mask: Tensor | None,  # (B, T)
    estimator: int,
    gradient: int,
    clamp: float | None,
) -> tuple[Tensor, Tensor]:
    """Gradients in logprobs (that in ref_logprobs is its negative) and in the importance ratio, (B, T) float32."""
    grad = torch.empty(logprobs.shape, dtype=torch.float32, device=logprobs.device)
    grad_ratio = grad.new_empty((0,) if importance_ratio is None else grad.shape)
    tokens = [dense(x) for x in (grad_kl, logprobs, ref_logprobs, importance_ratio, mask)]
    _launch(
        approx_kl_gradient,
        logprobs,
        grad,
        grad_ratio,
        *tokens,
        logprobs.numel(),
        limit_of(clamp),
        ESTIMATOR=estimator,
        GRADIENT=gradient,
    )
    return grad, grad_ratio


def _launch(kernel: Any, near: Tensor, *args: Any, **constants: int) -> None:
    if near.numel() > 0:
        launch(kernel, triton.cdiv(near.numel(), BLOCK), near, *args, **constants, BLOCK=BLOCK, num_warps=4)
