# SPDX-License-Identifier: Apache-2.0
"""linear_policy_loss: a policy-gradient loss straight from hidden states, its gradients made in the forward.

The loss is a sum over tokens, so as soon as a row's log-probability is known so is its gradient. Each block of rows is
therefore multiplied by the head, folded, turned into its gradient and multiplied back before the next one: three
matmuls and no logits kept. The backward only scales the gradients by the incoming one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast import _dispatch
from rlhf_fast.ops import _check, codes
from rlhf_fast.ops._register import define, define_backward
from rlhf_fast.ops.linear.inputs import HEAD, HEAD_GRADIENTS, NEEDS, HeadInputs, Lora, check_head, fake_gradients
from rlhf_fast.ops.linear.policy_loop import EXACT, policy_loop
from rlhf_fast.ops.logprob import ROW_OPTIONS, check_row_options, check_targets
from rlhf_fast.ops.reference import accumulate_dtype
from rlhf_fast.ops.token_losses import TOKEN_LOSSES

ESTIMATORS = {**codes.ESTIMATORS, "exact": EXACT}


class PolicyLoss(NamedTuple):
    """What `linear_policy_loss` returns. Only loss carries a gradient."""

    loss: Tensor  # ()
    logprobs: Tensor  # (...)
    entropy: Tensor  # (...), nats
    kl: Tensor | None  # (...), None without a reference
    clip_fraction: Tensor  # ()


def linear_policy_loss(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (...)
    old_logprobs: Tensor,  # (...)
    advantages: Tensor,  # (...)
    *,
    mask: Tensor,  # (...)
    ref_logprobs: Tensor | None = None,  # (...)
    ref_hidden: Tensor | None = None,  # (..., H')
    ref_weight: Tensor | None = None,  # (V, H')
    ref_bias: Tensor | None = None,  # (V,)
    objective: str = "ppo",
    clip: float | tuple[float, float] = 0.2,
    dual_clip: float = 3.0,
    kl_coef: float = 0.0,
    estimator: str = "k2",
    kl_gradient: str = "value",
    kl_importance: bool = False,
    entropy_coef: float = 0.0,
    normalizer: float | Tensor | None = None,
    bias: Tensor | None = None,  # (V,)
    lora: Lora | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    logits_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    process_group: Any = None,
) -> PolicyLoss:
    """sum over real tokens of (objective + kl_coef * kl - entropy_coef * entropy) / normalizer.

    Args:
        hidden, weight, bias, lora, temperature, logit_scale, softcap, vocab_size, logits_dtype, process_group: as for
            `linear_token_logprobs`; hidden may be (B, T, H) or (N, H), and all per-token tensors follow it.
        targets: the sampled tokens; old_logprobs, advantages: float, what they were sampled with and what they earned.
        mask: bool, True = response token. Masked rows are dropped before the matmul.
        objective: "ppo", "dual_clip", "grpo", "dapo", "dr_grpo" or "cispo", see `rlhf_fast.ops.token_losses`. GRPO,
            DAPO and Dr. GRPO have PPO's token loss and differ in `normalizer` and in how advantages are computed.
            The log-ratio is limited to +-rf.LOG_RATIO_LIMIT before its exp (in the ratio, in k3 and in kl_importance),
            so loss and gradients are finite for finite inputs; beyond the limit a ratio has no gradient.
        clip: the ratio is limited to [1 - clip, 1 + clip], or to [1 - low, 1 + high] given (low, high).
        dual_clip: the largest ratio that counts for negative advantages, over 1; read by "dual_clip" alone.
        kl_coef, estimator, kl_gradient: a KL in the loss: "k1", "k2", "k3", "abs" from ref_logprobs, with
            kl_gradient "value" or "straight_through" as for `approx_kl`; or "exact", the reverse KL over the vocabulary
            from ref_hidden and the reference's head (same options as the policy's). kl_importance multiplies the
            estimate by the ratio, and differentiates it too (DeepSeek-V3.2, arXiv 2512.02556).
        normalizer: number or tensor, broadcast to the tokens, that each token's loss is divided by: the real tokens of
            all ranks and accumulation steps, say. None = the real tokens of this call.
        memory_budget: bytes of logits at a time, None = 512 MiB on CPU (of which 48 MiB are used, or 256 rows where
            they are more), 2 GiB on CUDA. Nothing is kept.

    Returns:
        `PolicyLoss`; loss is differentiable, once, in hidden, weight, bias and lora. clip_fraction is the share of real
        tokens whose loss the clip decides. Sequence-level ratios (GSPO) do not fit, see `rlhf_fast.ops.token_losses`.
    """
    op = "linear_policy_loss"
    head = check_head(op, hidden, weight, bias, lora, logits_dtype, memory_budget, process_group)
    rows, first = head.hidden.shape[:-1], head.hidden
    if mask is None:
        raise TypeError(f"rlhf_fast.{op}: mask must be a bool tensor (True = response token), got None")
    row_temperature, scalar, cap, columns = check_row_options(
        op, rows, head.vocabulary, temperature, softcap, mask, vocab_size, first
    )
    check_targets(op, targets, rows, head.vocabulary if columns < 0 else columns, mask, first)
    _check.shape_is(op, "targets", targets, rows, "the rows")
    old, gains = (_per_token(op, n, x, rows, first) for n, x in (("old_logprobs", old_logprobs),
                                                                 ("advantages", advantages)))  # fmt: skip
    reference, ref = _reference_tensors(op, estimator, ref_logprobs, ref_hidden, ref_weight, ref_bias, kl_coef, head)
    low, high = clip if isinstance(clip, tuple) else (clip, clip)
    for value in (low, high):
        if not value >= 0:
            raise ValueError(f"rlhf_fast.{op}: clip must be at least 0, got {clip}")
    if not dual_clip > 1:
        raise ValueError(f"rlhf_fast.{op}: dual_clip must be greater than 1, got {dual_clip}")
    objective_code = _check.choice(op, "objective", objective, {name: i for i, name in enumerate(TOKEN_LOSSES)})
    gradient = _check.choice(op, "kl_gradient", kl_gradient, codes.GRADIENTS)
    share = _share(op, normalizer, mask, accumulate_dtype(first.dtype))
    grad = torch.is_grad_enabled()
    needs = [grad and x is not None and x.requires_grad for x in head.tensors]
    loss, logprobs, entropy, kl, clip_fraction, *_ = _dispatch.select(op, first).linear_policy_loss(
        *head.tensors, targets, mask, row_temperature, old, gains, share, reference, *ref, head.lora_scale, scalar,
        float(logit_scale), cap, columns, head.float_logits, head.group, objective_code, float(low), float(high),
        float(dual_clip), float(kl_coef), ESTIMATORS[estimator], gradient, kl_importance, float(entropy_coef),
        -1 if memory_budget is None else memory_budget, *needs,
    )  # fmt: skip
    return PolicyLoss(loss, logprobs, entropy, kl if reference is not None or ref[0] is not None else None,
                      clip_fraction)  # fmt: skip


def _per_token(op: str, name: str, x: Tensor, rows: torch.Size, first: Tensor) -> Tensor:
    _check.is_float(op, name, x)
    _check.shape_is(op, name, x, rows, "the rows of hidden")
    _check.on_device(op, name, x, "hidden", first)
    return x.detach().to(accumulate_dtype(first.dtype))


def _reference_tensors(
    op: str, estimator: str, ref_logprobs: Tensor | None, ref_hidden: Tensor | None, ref_weight: Tensor | None,
    ref_bias: Tensor | None, kl_coef: float, head: HeadInputs,
) -> tuple[Tensor | None, tuple[Tensor | None, Tensor | None, Tensor | None]]:  # fmt: skip
    """The reference as the estimator wants it: its log-probs, or its hidden states and head."""
    if _check.choice(op, "estimator", estimator, ESTIMATORS) != EXACT:
        if ref_logprobs is None:
            if kl_coef != 0:
                raise ValueError(f"rlhf_fast.{op}: ref_logprobs must be given when kl_coef is not 0, got None")
            return None, (None, None, None)
        return _per_token(op, "ref_logprobs", ref_logprobs, head.hidden.shape[:-1], head.hidden), (None, None, None)
    if ref_hidden is None or ref_weight is None:
        missing = "ref_hidden" if ref_hidden is None else "ref_weight"
        raise ValueError(f"rlhf_fast.{op}: {missing} must be given for the exact KL, got None")
    with torch.no_grad():
        ref = check_head(op, ref_hidden, ref_weight, ref_bias, side="ref_")
    _check.same_dtype(op, "ref_hidden", ref.hidden, "hidden", head.hidden)
    wanted = (*head.hidden.shape[:-1], ref.hidden.shape[-1])
    _check.shape_is(op, "ref_hidden", ref.hidden, wanted, "the rows of hidden and its own H")
    if ref.weight.shape[0] != head.weight.shape[0]:
        raise ValueError(
            f"rlhf_fast.{op}: ref_weight must have the vocabulary of weight, {head.weight.shape[0]} rows, "
            f"got {tuple(ref.weight.shape)}"
        )
    return None, (ref.hidden.detach(), ref.weight.detach(), None if ref.bias is None else ref.bias.detach())


def _share(op: str, normalizer: float | Tensor | None, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What each token's loss counts, 0 at masked ones."""
    if normalizer is None:
        normalizer = mask.sum().clamp(min=1)
    elif not isinstance(normalizer, Tensor):
        normalizer = torch.full((), _check.positive(op, "normalizer", normalizer), dtype=dtype, device=mask.device)
    sizes = zip(reversed(normalizer.shape), reversed(mask.shape), strict=False)
    if normalizer.dim() > mask.dim() or any(n not in (1, m) for n, m in sizes):
        raise ValueError(
            f"rlhf_fast.{op}: normalizer must broadcast to the rows {tuple(mask.shape)}, got {tuple(normalizer.shape)}"
        )
    return torch.where(mask, normalizer.detach().to(dtype).reciprocal(), 0.0)


# ----------------------------------------------------------------------------------------------- registration

POLICY = (
    "Tensor old_logprobs, Tensor advantages, Tensor share, Tensor? ref_logprobs, Tensor? ref_hidden, "
    "Tensor? ref_weight, Tensor? ref_bias"
)
POLICY_OPTIONS = (
    "int objective, float clip_low, float clip_high, float dual_clip, float kl_coef, int estimator, int gradient, "
    "bool importance, float entropy_coef, int budget"
)


def _fake(hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    dtype, rows = accumulate_dtype(hidden.dtype), hidden.shape[:-1]
    per_token = [hidden.new_empty(rows, dtype=dtype) for _ in range(3)]
    scalars = [hidden.new_empty((), dtype=dtype) for _ in range(2)]
    return (scalars[0], *per_token, scalars[1], *fake_gradients((hidden, *args[:4]), args[-5:]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.gradients, ctx.inputs = output[5:], len(inputs)


def _backward(ops: Any, ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_loss is None:
        return (None,) * ctx.inputs
    wanted = ctx.needs_input_grad[:5]
    gradients = ctx.gradients
    if gradients is None:
        raise RuntimeError(
            "rlhf_fast.linear_policy_loss: a second backward is not supported: the first one scaled the gradients that "
            "the forward had made, and handed them on; call the op again"
        )
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or type(gradients[0]) is not Tensor:
        gradients = ops.linear_policy_loss_backward(grad_loss, *gradients)
    else:
        ctx.gradients = None
        if grad_loss.is_cuda or float(grad_loss) != 1:  # 1 is what loss.backward() brings; a GPU would be waited for
            for gradient in gradients:
                gradient.mul_(grad_loss)
    return (*(g if w else None for g, w in zip(gradients, wanted, strict=True)), *(None,) * (ctx.inputs - 5))


def _scale(grad_loss: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
    return tuple(gradient * grad_loss.to(gradient.dtype) for gradient in gradients)


define(
    "linear_policy_loss",
    f"(Tensor hidden, {HEAD}, Tensor targets, Tensor? mask, Tensor? row_temperature, {POLICY}, float lora_scale, "
    f"{ROW_OPTIONS}, bool float_logits, int group, {POLICY_OPTIONS}, {NEEDS}) -> (Tensor loss, Tensor logprobs, "
    f"Tensor entropy, Tensor kl, Tensor clip_fraction, {HEAD_GRADIENTS.replace('Tensor ', 'Tensor grad_')})",
    reference=policy_loop, fake=_fake, setup_context=_setup_context, backward=_backward,
)  # fmt: skip
define_backward(
    "linear_policy_loss_backward", f"(Tensor grad_loss, {HEAD_GRADIENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_scale, fake=_scale, of="linear_policy_loss",
)  # fmt: skip
