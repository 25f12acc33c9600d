# SPDX-License-Identifier: Apache-2.0
"""Generalized advantage estimation, and the PPO advantages built on it.

GAE (Schulman et al. 2016, arXiv 1506.02438, eq. 16) is a first-order recurrence from the last token back:

    delta_t = r_t + gamma V_{t+1} (1 - done_t) - V_t
    A_t     = delta_t + gamma lam (1 - done_t) A_{t+1}            returns_t = A_t + V_t

The value after the last token is 0. Where an episode was cut off (truncated) instead of finished, V_{t+1} is the given
bootstrap value and A_{t+1} is 0. Tokens inside a row are masked if a tool or the environment wrote them. Trainers treat
them differently, so this is an argument:

    carry   they are skipped: t + 1 is the next real token (verl, NeMo-RL)
    zero    they have reward and value 0, and the recurrence decays across them (OpenRLHF, TRL)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor

from rlhf_fast import _dispatch, _triton
from rlhf_fast.ops import _check, codes, reference
from rlhf_fast.ops._register import CONSTANT, define
from rlhf_fast.ops.sequences import check_like, checked_layout, rows_of, token_flags

MASK_MODES = {"zero": 0, "carry": 1}


class GAE(NamedTuple):
    """Result of `gae`: both of the shape of rewards, float32 (float64 for float64), 0 at masked tokens."""

    advantages: Tensor
    returns: Tensor


class Advantages(NamedTuple):
    """Result of `ppo_advantages`: all `(B, T)` float32 and 0 at masked tokens."""

    kl: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor


def gae(
    rewards: Tensor,  # (B, T) or (total,)
    values: Tensor,
    *,
    mask: Tensor | None = None,
    dones: Tensor | None = None,
    truncated: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
    cu_seqlens: Tensor | None = None,  # (S + 1,)
    gamma: float = 1.0,
    lam: float | Tensor = 0.95,
    value_lam: float | Tensor | None = None,
    mask_mode: str = "carry",
) -> GAE:
    """Advantages and returns; formulas in the module's docstring. No gradient.

    Args:
        rewards, values: `(B, T)`, or `(total,)` with `cu_seqlens`; of one float dtype.
        mask: same shape, bool, True = real token; masked slots are not read and return 0.
        dones: bool, same shape: the episode ends with this token. Or `(B,)`: with the row's last real token.
        truncated, bootstrap_values: same shape, or both `(B,)` for the row's last real token: where truncated, the
            episode was cut off after this token, and `bootstrap_values` is the value of the next state. Both or neither
            must be given; done wins over truncated; flags at masked tokens are ignored.
        cu_seqlens: `(S + 1,)` int32 or int64, from 0 to total: sequence s is `[cu_seqlens[s], cu_seqlens[s + 1])`.
        gamma, lam: in [0, 1]; lam a float or one per row, `(B,)` or `(S,)`.
        value_lam: another lam for the returns (decoupled GAE, VAPO, arXiv 2504.05118); None = lam.
        mask_mode: "carry" or "zero".

    Returns:
        `GAE(advantages, returns)`, float32 (float64 for float64), of the shape of rewards; both 0 at masked tokens.

    Raises:
        TypeError, ValueError: on a wrong dtype, shape, device or range, naming the argument.
    """
    op = "gae"
    cu_seqlens = checked_layout(op, rewards, values, mask, cu_seqlens)
    carry = bool(_check.choice(op, "mask_mode", mask_mode, MASK_MODES))
    rows = rows_of(rewards, cu_seqlens)
    row_lam, lam_float = _row_lam(op, "lam", lam, rows, rewards)
    row_value_lam, value_lam_float = (
        (row_lam, lam_float) if value_lam is None else _row_lam(op, "value_lam", value_lam, rows, rewards)
    )
    flags = token_flags(op, rewards, mask, cu_seqlens, dones, truncated, bootstrap_values)
    advantages, returns = _dispatch.call(
        _dispatch.select(op, rewards).gae.default, rewards, values, mask, *flags, cu_seqlens, row_lam, row_value_lam,
        _check.in_unit_interval(op, "gamma", gamma), lam_float, value_lam_float, carry,
    )  # fmt: skip
    return GAE(advantages, returns)


def ppo_advantages(
    scores: Tensor,  # (B,)
    logprobs: Tensor,  # (B, T)
    ref_logprobs: Tensor,  # (B, T)
    values: Tensor,  # (B, T)
    mask: Tensor,  # (B, T)
    *,
    kl_coef: float,
    estimator: str = "k1",
    gamma: float = 1.0,
    lam: float = 0.95,
    score_clip: float | None = None,
    whiten: bool = True,
    process_group: Any = None,
) -> Advantages:
    """The KL-penalised rewards of RLHF, their GAE, returns and whitened advantages in one pass. No gradient.

    rewards = -kl_coef * kl, plus the score at the row's last real token (Ziegler et al. 2019, arXiv 1909.08593, eq. 2);
    then `gae(..., mask_mode="carry")`; returns come from the advantages before whitening.

    Args:
        scores: `(B,)`, the reward model's score of each sequence; ignored in a row without real tokens.
        logprobs, ref_logprobs: `(B, T)`, of the sampled tokens under policy and frozen reference, at the sampling
            temperature.
        values: `(B, T)`, from the critic.
        mask: `(B, T)` bool, True = response token.
        kl_coef: coefficient of the KL penalty, reward per nat.
        estimator: of the KL, as in `approx_kl`.
        score_clip: limits scores to [-score_clip, score_clip].
        whiten: whiten the advantages, as `masked_whiten`.
        process_group: whiten with the statistics over all of its ranks.

    Returns:
        `Advantages(kl, rewards, advantages, returns)`, all `(B, T)` float32 (float64 for float64), 0 at masked tokens.

    Raises:
        TypeError, ValueError: on a wrong dtype, shape, device or range, naming the argument.
    """
    op = "ppo_advantages"
    _check.is_float(op, "logprobs", logprobs)
    if logprobs.dim() != 2:
        raise ValueError(f"rlhf_fast.{op}: logprobs must be (B, T), got shape {tuple(logprobs.shape)}")
    check_like(op, "ref_logprobs", ref_logprobs, logprobs, "logprobs")
    check_like(op, "values", values, logprobs, "logprobs")
    _check.same_dtype(op, "scores", scores, "logprobs", logprobs)
    _check.shape_is(op, "scores", scores, logprobs.shape[:1], "the batch")
    _check.on_device(op, "scores", scores, "logprobs", logprobs)
    if mask is None:
        raise TypeError(f"rlhf_fast.{op}: mask must be a bool tensor (True = response token), got None")
    _check.is_mask(op, "mask", mask, logprobs.shape, "logprobs", logprobs)
    _check.is_group(op, process_group)
    clip = None if score_clip is None else _check.positive(op, "score_clip", score_clip)
    ops = _dispatch.select(op, logprobs)
    kl, rewards, advantages, returns, moments = _dispatch.call(
        ops.ppo_advantages.default, scores, logprobs, ref_logprobs, values, mask,
        _check.finite(op, "kl_coef", kl_coef), _check.choice(op, "estimator", estimator, codes.ESTIMATORS),
        _check.in_unit_interval(op, "gamma", gamma),
        _check.in_unit_interval(op, "lam", lam), clip,
    )  # fmt: skip
    if _check.flag(op, "whiten", whiten):
        advantages = _whiten(ops, advantages, mask, moments, True, process_group)
    return Advantages(kl, rewards, advantages, returns)


def masked_whiten(
    values: Tensor,  # (B, T)
    mask: Tensor,  # (B, T)
    *,
    shift_mean: bool = True,
    process_group: Any = None,
) -> Tensor:
    """(x - mean) * rsqrt(var + 1e-8) over the real tokens, of all ranks if a process group is given. No gradient.

    The variance is unbiased (divides by n - 1), and 0 with fewer than two real tokens. shift_mean=False adds the mean
    back. Masked tokens are not read and return 0. float32 (float64 for float64 values).

    Raises:
        TypeError, ValueError: on a wrong dtype, shape, device or range, naming the argument.
    """
    op = "masked_whiten"
    _check.is_float(op, "values", values)
    if mask is None:
        raise TypeError(f"rlhf_fast.{op}: mask must be a bool tensor (True = real token), got None")
    _check.is_mask(op, "mask", mask, values.shape, "values", values)
    _check.flag(op, "shift_mean", shift_mean)
    _check.is_group(op, process_group)
    ops = _dispatch.select(op, values)
    moments = _dispatch.call(ops.whiten_moments.default, values, mask)
    return _whiten(ops, values, mask, moments, shift_mean, process_group)


def _whiten(ops: Any, values: Tensor, mask: Tensor, moments: Tensor, shift_mean: bool, process_group: Any) -> Tensor:
    """`values` whitened; `moments` are those of this rank."""
    moments = _over_ranks(moments, process_group)
    dtype = reference.accumulate_dtype(values.dtype)
    if moments.dtype != dtype:  # they are wider
        return _dispatch.call(ops.whiten.default, values, mask, moments, shift_mean)
    # The sum of squares has no more digits than the values: a mean far from 0 would leave none to the variance. So the
    # values are centred first.
    mean = moments[1] / moments[0].clamp(min=1)
    centred = values.to(dtype) - mean
    moments = _over_ranks(_dispatch.call(ops.whiten_moments.default, centred, mask), process_group)
    whitened = _dispatch.call(ops.whiten.default, centred, mask, moments, shift_mean)
    return whitened if shift_mean else torch.where(mask, whitened + mean, 0.0)


def _over_ranks(moments: Tensor, process_group: Any) -> Tensor:
    if process_group is not None:
        torch.distributed.all_reduce(moments, group=process_group)
    return moments


def _row_lam(op: str, name: str, lam: float | Tensor, rows: int, first: Tensor) -> tuple[Tensor | None, float]:
    if not isinstance(lam, Tensor):
        return None, _check.in_unit_interval(op, name, lam)
    if lam.dtype == torch.bool or lam.is_complex():
        raise TypeError(f"rlhf_fast.{op}: {name} must hold numbers, got {lam.dtype}")
    _check.is_dense(op, name, lam)
    if lam.device.type == "meta":
        _check.on_device(op, name, lam, "rewards", first)
    if lam.dim() != 0:
        _check.shape_is(op, name, lam, (rows,), "the rows")
    if _check.can_look(lam) and not bool(((lam >= 0) & (lam <= 1)).all()):
        raise ValueError(f"rlhf_fast.{op}: {name} must be between 0 and 1 everywhere, got {lam.tolist()}")
    dtype = reference.accumulate_dtype(first.dtype)
    return lam.to(device=first.device, dtype=dtype).expand(rows).contiguous(), 0.0


# ----------------------------------------------------------------------------------------------- registration


def two_like(rewards: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Empty advantages and returns."""
    dtype = reference.accumulate_dtype(rewards.dtype)
    return rewards.new_empty(rewards.shape, dtype=dtype), rewards.new_empty(rewards.shape, dtype=dtype)


def _fake_ppo_advantages(scores: Tensor, logprobs: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return (*two_like(logprobs), *two_like(logprobs), _fake_moments(logprobs, logprobs))


def _fake_moments(values: Tensor, mask: Tensor) -> Tensor:
    return values.new_empty(3, dtype=reference.wide_dtype(values.device))


def _fake_whiten(values: Tensor, *_: Any) -> Tensor:
    return values.new_empty(values.shape, dtype=reference.accumulate_dtype(values.dtype))


define(
    "gae",
    "(Tensor rewards, Tensor values, Tensor? mask, Tensor? dones, Tensor? truncated, Tensor? bootstrap_values, "
    "Tensor? cu_seqlens, Tensor? row_lam, Tensor? row_value_lam, float gamma, float lam, float value_lam, bool carry) "
    "-> (Tensor advantages, Tensor returns)",
    reference=reference.gae, fake=two_like, derivative=CONSTANT,
)  # fmt: skip
define(
    "ppo_advantages",
    "(Tensor scores, Tensor logprobs, Tensor ref_logprobs, Tensor values, Tensor mask, float kl_coef, int estimator, "
    "float gamma, float lam, float? score_clip) "
    "-> (Tensor kl, Tensor rewards, Tensor advantages, Tensor returns, Tensor moments)",
    reference=reference.ppo_advantages, fake=_fake_ppo_advantages, derivative=CONSTANT,
)  # fmt: skip
WHITENING = ("masked_whiten", "ppo_advantages")
define(
    "whiten_moments", "(Tensor values, Tensor mask) -> Tensor",
    reference=reference.whiten_moments, fake=_fake_moments, derivative=CONSTANT, public=WHITENING,
)  # fmt: skip
define(
    "whiten", "(Tensor values, Tensor mask, Tensor moments, bool shift_mean) -> Tensor",
    reference=reference.whiten, fake=_fake_whiten, derivative=CONSTANT, public=WHITENING,
)  # fmt: skip
_dispatch.served_by("gae", "gae")
_dispatch.served_by("ppo_advantages", "ppo_advantages")
_dispatch.served_by("whiten", "masked_whiten")
_triton.launched_from("gae", "gae")
_triton.launched_from("ppo", "ppo_advantages")
_triton.launched_from("whiten", "whiten_moments", "whiten")
