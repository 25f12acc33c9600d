# SPDX-License-Identifier: Apache-2.0
"""linear_policy_loss: a policy-gradient loss straight from hidden states, its gradients computed in the forward.

The loss is a sum over tokens, so a row's gradient is known as soon as its log-probability is. Each block of rows is
therefore multiplied by the head, reduced, overwritten with its gradient and multiplied back before the next one: three
matmuls, and no logits are kept. The backward only scales the gradients by the incoming one; until then they are kept in
float32 (the weight's in bfloat16 for bfloat16 operands), so that small gradients do not underflow before the scaling.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast import _dispatch
from rlhf_fast.ops import _check, codes
from rlhf_fast.ops._register import Derivative, define, define_backward
from rlhf_fast.ops.linear.bundles import fake_on_bundles, flatten, gradients_of, on_bundles, schema, unflatten
from rlhf_fast.ops.linear.divergence import check_reference
from rlhf_fast.ops.linear.head import held_dtypes
from rlhf_fast.ops.linear.inputs import (
    CheckedHead,
    HeadGradientTensors,
    LogitOptions,
    Lora,
    Needs,
    check_head,
    fake_gradients,
    needs_of,
)
from rlhf_fast.ops.linear.policy_loop import EXACT, Inputs, LossOptions, Options, Outputs, RefTensors, policy_loop
from rlhf_fast.ops.linear.row_selection import select_rows
from rlhf_fast.ops.logprob import check_row_options, check_targets
from rlhf_fast.ops.reference import accumulate_dtype
from rlhf_fast.ops.token_losses import TOKEN_LOSSES, Clip

ESTIMATORS = {**codes.ESTIMATORS, "exact": EXACT}


class PolicyLoss(NamedTuple):
    """Result of `linear_policy_loss`. Only loss has a gradient."""

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
    mask: Tensor | None = None,  # (...)
    rows: Tensor | None = None,  # (R,)
    log_ratio: Tensor | None = None,  # (...)
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
        hidden, weight, bias, lora, temperature, logit_scale, softcap, vocab_size, logits_dtype, process_group, rows: as
            for `linear_token_logprobs`; hidden may be (B, T, H) or (N, H), and all per-token tensors follow it.
        targets: int64 or int32, the sampled tokens.
        old_logprobs, advantages: float, the log-probabilities they were sampled with, and their advantages.
        mask: bool, True = response token. Masked rows are dropped before the matmul. Either mask or rows must be given.
        log_ratio: float, used instead of logprobs - old_logprobs as the log of each token's ratio, with the same
            derivative in logprobs. For ratios of whole sequences (GSPO, RLOO), from log-probabilities computed
            before: `log_ratio=sequence_log_ratio(logprobs, old_logprobs, mask)`, see `rlhf_fast.ops.token_losses`, with
            `normalizer=B * mask.sum(-1, keepdim=True)` for the mean over sequences of GSPO's loss. RLOO's gradient is
            that of mean=False with `normalizer=B`; its value then counts a sequence's loss once for each token.
        objective: "ppo", "dual_clip", "grpo", "dapo", "dr_grpo" or "cispo", see `rlhf_fast.ops.token_losses`. GRPO,
            DAPO and Dr. GRPO have PPO's token loss and differ in `normalizer` and in how advantages are computed.
            The log-ratio is limited to +-rf.LOG_RATIO_LIMIT before its exp (in the ratio, in k3 and in kl_importance),
            so loss and gradients are finite for finite inputs; beyond the limit a ratio has no gradient.
        clip: the ratio is limited to [1 - clip, 1 + clip], or to [1 - low, 1 + high] given (low, high).
        dual_clip: limit of the ratio for negative advantages, above 1; used only by "dual_clip".
        kl_coef, estimator, kl_gradient: a KL in the loss: "k1", "k2", "k3", "abs" from ref_logprobs, with
            kl_gradient "value" or "straight_through" as for `approx_kl`; or "exact", the reverse KL over the vocabulary
            from ref_hidden and the reference's head (same options as the policy's). kl_importance multiplies the
            estimate by the ratio, and differentiates it too (DeepSeek-V3.2, arXiv 2512.02556).
        normalizer: number or tensor, broadcast to the tokens, that each token's loss is divided by, such as the number
            of real tokens over all ranks and accumulation steps. None = the real tokens of this call.
        memory_budget: bytes of logits at a time, None = 512 MiB on CPU (of which 48 MiB are used, or 1024 rows where
            they are more), 2 GiB on CUDA. Nothing is kept.

    Returns:
        `PolicyLoss`; loss is differentiable, once, in hidden, weight, bias and lora. clip_fraction is the share of real
        tokens whose loss the clip decides.

    Raises:
        TypeError, ValueError: on a wrong dtype, shape, device or range, naming the argument.
    """
    op = "linear_policy_loss"
    head = check_head(op, hidden, weight, bias, lora, logits_dtype, memory_budget, process_group)
    first = head.tensors.hidden
    if mask is None and rows is None:
        raise TypeError(f"rlhf_fast.{op}: mask must be a bool tensor (True = response token), or rows given, got None")
    row_inputs, checked, padded = select_rows(op, mask, rows, first)
    row_temperature, scalar, cap, columns = check_row_options(
        op, head.shape, head.vocabulary, temperature, softcap, checked, vocab_size, first
    )
    check_targets(op, targets, head.shape, head.vocabulary if columns < 0 else columns, checked, first)
    _check.shape_is(op, "targets", targets, head.shape, "the rows")
    per_token = {"old_logprobs": old_logprobs, "advantages": advantages, "log_ratio": log_ratio}
    old, gains, ratios = (
        None if x is None and name == "log_ratio" else _per_token(op, name, x, head) for name, x in per_token.items()
    )
    assert old is not None and gains is not None
    ref_tokens, ref = _reference(op, estimator, ref_logprobs, ref_hidden, ref_weight, ref_bias, kl_coef, head)
    loss = LossOptions(
        _check.choice(op, "objective", objective, {name: i for i, name in enumerate(TOKEN_LOSSES)}),
        _clip(op, clip, dual_clip), _check.finite(op, "kl_coef", kl_coef), ESTIMATORS[estimator],
        _check.choice(op, "kl_gradient", kl_gradient, codes.GRADIENTS),
        _check.flag(op, "kl_importance", kl_importance), _check.finite(op, "entropy_coef", entropy_coef),
    )  # fmt: skip
    share = _share(op, normalizer, mask, rows, head.shape, accumulate_dtype(first.dtype))
    inputs = Inputs(head.tensors, targets, old, gains, share, ratios, ref_tokens, ref, row_inputs, row_temperature)
    scale = _check.factor(op, "logit_scale", logit_scale)
    loop_options = head.options._replace(vocab_size=columns, rows_padded=padded)
    options = Options(loop_options, LogitOptions(scalar, scale, cap), loss)
    results = _dispatch.select(op, first).linear_policy_loss(*flatten(inputs, options, needs_of(head.tensors)))
    outputs = Outputs(*results[: len(Outputs._fields)])
    has_reference = ref_tokens is not None or ref.ref_hidden is not None
    return PolicyLoss(
        outputs.loss, outputs.logprobs, outputs.entropy, outputs.kl if has_reference else None, outputs.clip_fraction
    )


def _per_token(op: str, name: str, x: Tensor | None, head: CheckedHead) -> Tensor:
    _check.is_float(op, name, x)
    assert x is not None
    _check.shape_is(op, name, x, head.shape, "the rows of hidden")
    _check.on_device(op, name, x, "hidden", head.tensors.hidden)
    return x.detach().to(accumulate_dtype(head.tensors.hidden.dtype))


def _clip(op: str, clip: float | tuple[float, float], dual_clip: float) -> Clip:
    pair = tuple(clip) if isinstance(clip, (tuple, list)) else (clip, clip)
    if len(pair) != 2:
        raise ValueError(f"rlhf_fast.{op}: clip must be a number or (low, high), got {clip}")
    low, high = (_check.number(op, "clip", value) for value in pair)
    if not (low >= 0 and high >= 0):
        raise ValueError(f"rlhf_fast.{op}: clip must be at least 0, got {clip}")
    dual_clip = _check.number(op, "dual_clip", dual_clip)
    if not dual_clip > 1:
        raise ValueError(f"rlhf_fast.{op}: dual_clip must be greater than 1, got {dual_clip}")
    return Clip(low, high, dual_clip)


def _reference(
    op: str, estimator: str, ref_logprobs: Tensor | None, ref_hidden: Tensor | None, ref_weight: Tensor | None,
    ref_bias: Tensor | None, kl_coef: float, head: CheckedHead,
) -> tuple[Tensor | None, RefTensors]:  # fmt: skip
    """The inputs of the reference that the estimator needs: log-probs, or hidden states and head. Checks all that are
    given."""
    exact = _check.choice(op, "estimator", estimator, ESTIMATORS) == EXACT
    tokens = None if ref_logprobs is None else _per_token(op, "ref_logprobs", ref_logprobs, head)
    states, nothing = {"ref_hidden": ref_hidden, "ref_weight": ref_weight}, RefTensors(None, None, None)
    missing = [name for name, x in states.items() if x is None]
    if missing and (exact or len(missing) == 1 or ref_bias is not None):
        why = "for the exact KL" if exact else "with the rest of the reference's head"
        raise ValueError(f"rlhf_fast.{op}: {missing[0]} must be given {why}, got None")
    if not exact and tokens is None and kl_coef != 0:
        raise ValueError(f"rlhf_fast.{op}: ref_logprobs must be given when kl_coef is not 0, got None")
    if ref_hidden is None or ref_weight is None:
        return tokens, nothing
    with torch.no_grad():
        ref = check_reference(op, head, ref_hidden, ref_weight, ref_bias).tensors
    if not exact:
        return tokens, nothing
    return None, RefTensors(*(None if x is None else x.detach() for x in (ref.hidden, ref.weight, ref.bias)))


def _share(
    op: str, normalizer: float | Tensor | None, mask: Tensor | None, rows: Tensor | None, shape: torch.Size,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """1 / normalizer of each token, 0 at masked ones."""
    real = mask if rows is None else rows >= 0
    assert real is not None
    if normalizer is None:
        normalizer = real.sum().clamp(min=1)
    elif isinstance(normalizer, Tensor):
        _check.on_device(op, "normalizer", normalizer, "mask", real)
        if normalizer.dtype == torch.bool or normalizer.is_complex():
            raise TypeError(f"rlhf_fast.{op}: normalizer must hold numbers, got {normalizer.dtype}")
    else:
        normalizer = torch.full((), _check.positive(op, "normalizer", normalizer), dtype=dtype, device=real.device)
    sizes = zip(reversed(normalizer.shape), reversed(shape), strict=False)
    if normalizer.dim() > len(shape) or any(n not in (1, m) for n, m in sizes):
        raise ValueError(
            f"rlhf_fast.{op}: normalizer must broadcast to the rows {tuple(shape)}, got {tuple(normalizer.shape)}"
        )
    if _check.can_look(normalizer) and _check.can_look(real):
        of_tokens = normalizer.expand(shape).reshape(-1)
        of_tokens = of_tokens[real.reshape(-1) if rows is None else rows[real]]
        if not bool((of_tokens > 0).all()):
            came = of_tokens[~(of_tokens > 0)][0].item()
            raise ValueError(f"rlhf_fast.{op}: normalizer must be greater than 0 at real tokens, got {came}")
    share = normalizer.detach().to(dtype).reciprocal()
    return share.expand(shape) if mask is None else torch.where(mask, share, 0.0)


# ----------------------------------------------------------------------------------------------- registration


def _fake(inputs: Inputs, options: Options, needs: Needs) -> tuple[Tensor, ...]:
    hidden = inputs.head.hidden
    dtype, shape = accumulate_dtype(hidden.dtype), hidden.shape[:-1]
    logprobs, entropy, kl = (hidden.new_empty(shape, dtype=dtype) for _ in range(3))
    loss, clip_fraction = (hidden.new_empty((), dtype=dtype) for _ in range(2))
    gradients = zip(fake_gradients(inputs.head, needs), held_dtypes(hidden.dtype), strict=True)
    return (*Outputs(loss, logprobs, entropy, kl, clip_fraction), *(x.to(held) for x, held in gradients))


ARGUMENTS = (Inputs, Options, Needs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    outputs, gradients = unflatten(output, Outputs, HeadGradientTensors)
    loss, *others = outputs
    ctx.mark_non_differentiable(*others, *gradients)
    ctx.set_materialize_grads(False)
    ctx.gradients, ctx.dtype = gradients, unflatten(inputs, *ARGUMENTS)[0].head.hidden.dtype


def _backward(ops: Any, ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_loss is None:
        return gradients_of([], [], *ARGUMENTS)
    needed = unflatten(ctx.needs_input_grad, *ARGUMENTS)[0].head
    if torch.is_grad_enabled() and type(grad_loss) is Tensor and not torch.compiler.is_compiling():
        raise RuntimeError(  # the gradients are constants by now, and a graph through them would end here in silence
            "rlhf_fast.linear_policy_loss: double backward is not supported; take the second derivative of a plain "
            "PyTorch expression instead, or drop create_graph=True"
        )
    gradients = ctx.gradients
    if gradients is None:
        raise RuntimeError(
            "rlhf_fast.linear_policy_loss: a second backward is not supported: the first one scaled the gradients that "
            "the forward had computed, and handed them on; call the op again"
        )
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or type(gradients.grad_hidden) is not Tensor:
        gradients = ops.linear_policy_loss_backward(grad_loss, *gradients)
    else:
        ctx.gradients = None
        # loss.backward() passes 1; reading it would wait for a GPU
        if grad_loss.device.type != "cpu" or float(grad_loss) != 1:
            for gradient in gradients:
                gradient.mul_(grad_loss)
    return gradients_of([x.to(ctx.dtype) for x in gradients], needed, *ARGUMENTS)


def _scale(grad_loss: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
    return tuple(gradient * grad_loss.to(gradient.dtype) for gradient in gradients)


define(
    "linear_policy_loss",
    f"({schema(Inputs, Options)}, {schema(Needs, prefix='needs_')}) -> ({schema(Outputs, HeadGradientTensors)})",
    reference=on_bundles(policy_loop, Inputs, Options, Needs), fake=fake_on_bundles(_fake, Inputs, Options, Needs),
    derivative=Derivative(_setup_context, _backward),
)  # fmt: skip
define_backward(
    "linear_policy_loss_backward",
    f"(Tensor grad_loss, {schema(HeadGradientTensors)}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_scale, fake=_scale, of=("linear_policy_loss",),
)  # fmt: skip
_dispatch.served_by("token_stats", "linear_policy_loss")
