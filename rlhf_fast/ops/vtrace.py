# SPDX-License-Identifier: Apache-2.0
"""V-trace and Retrace: targets and advantages from samples of another policy than the one that learns.

V-trace: Espeholt et al. 2018 (IMPALA, arXiv 1802.01561, section 4.1), with the lambda of its remark 2. Of token t,
whose log-ratio l_t is its log-probability under the learning policy minus that under the one that sampled it:

    rho_t   = min(rho_clip, exp(l_t))        c_t = lam min(c_clip, exp(l_t))
    delta_t = r_t + gamma V_{t+1} - V_t
    v_t     = V_t + rho_t delta_t + gamma c_t (v_{t+1} - V_{t+1})            returns
    A_t     = rho_t (r_t + gamma v_{t+1} - V_t)                              advantages

The recurrence is that of `gae` with a coefficient per token. Where every log-ratio is 0 and no limit below 1, the
returns are those of `gae(lam=lam)`, and so are the advantages with lam = 1. What follows the last token, a done, a
truncation or a masked token is as in `gae`.

Retrace: Munos et al. 2016 (arXiv 1606.02647, eq. 3 and 4), for a critic of action values. Q_t is the sampled token's,
V_t the mean of Q over all tokens under the learning policy:

    delta_t = r_t + gamma V_{t+1} - Q_t              c_t = lam min(1, exp(l_t))
    Q'_t    = Q_t + sum over s >= t of gamma^(s - t) c_{t+1} ... c_s delta_s        targets

It is no recurrence of its own. h_t = min(1, exp(l_t)) (delta_t + gamma lam h_{t+1}) is V-trace's v_t - V_t for the
rewards r_t - Q_t + V_t, and Q'_t = r_t + gamma (V_{t+1} + lam h_{t+1}) is the return of `gae` for the values V + lam h,
with its own lam = 0. To a critic of state values it adds nothing: with V_t as Q_t and lam = 1 the targets are the
r_t + gamma v_{t+1} that V-trace's advantages contain; with r_t + gamma V_{t+1} as Q_t every delta_t is 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast import _dispatch, _triton
from rlhf_fast.ops import _check, gae, reference
from rlhf_fast.ops._register import CONSTANT, define

LARGEST_RATIO = 1e15  # of rho_clip: an advantage has a product of two, which must not overflow in float32


class VTrace(NamedTuple):
    """Result of `vtrace`: both of the shape of rewards, float32 (float64 for float64), 0 at masked tokens."""

    advantages: Tensor
    returns: Tensor


def vtrace(
    rewards: Tensor,  # (B, T) or (total,)
    values: Tensor,
    log_ratios: Tensor,
    *,
    mask: Tensor | None = None,
    dones: Tensor | None = None,
    truncated: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
    cu_seqlens: Tensor | None = None,  # (S + 1,)
    gamma: float = 1.0,
    lam: float = 1.0,
    rho_clip: float = 1.0,
    c_clip: float = 1.0,
    mask_mode: str = "carry",
) -> VTrace:
    """Advantages for the policy and targets for the values; formulas in the module's docstring. No gradient.

    Args:
        rewards, values: `(B, T)`, or `(total,)` with `cu_seqlens`; of one float dtype.
        log_ratios: same shape and dtype, in nats: log-probability of the token under the learning policy minus under
            the policy that sampled it. Limited before the exponential, so any value is legal, infinities too: to
            log(rho_clip), and where it is not -inf to at least -69, the log-ratio of 1e-30. So a factor gamma c_t is 0
            only with lam = 0, gamma = 0 or a log-ratio of -inf. Times an infinite gain it is NaN, as in the formula.
        mask, dones, truncated, bootstrap_values, cu_seqlens: as in `gae`.
        gamma, lam: in [0, 1].
        rho_clip: limit of the ratio that weighs a token's own error, at least c_clip: decides which policy's value is
            learned; 1e15, the largest, for that of the learning policy. An advantage has a product of two ratios, so
            a larger limit would overflow.
        c_clip: limit of the ratio that weighs what follows, in (0, 1]: decides how fast it is learned. Above 1 the
            product over a row's tokens would overflow.
        mask_mode: "carry" skips masked tokens; "zero" counts them with reward, value and log-ratio 0.

    Returns:
        `VTrace(advantages, returns)`, float32 (float64 for float64), of the shape of rewards; both 0 at masked tokens.

    Raises:
        TypeError, ValueError: on a wrong dtype, shape, device or range, naming the argument.
    """
    op = "vtrace"
    bounds = gae.checked_layout(op, rewards, values, mask, cu_seqlens)
    gae.check_like(op, "log_ratios", log_ratios, rewards)
    carry = bool(_check.choice(op, "mask_mode", mask_mode, gae.MASK_MODES))
    flags = gae.token_flags(op, rewards, mask, bounds, dones, truncated, bootstrap_values)
    c_limit = _check.in_unit_interval(op, "c_clip", _check.positive(op, "c_clip", c_clip))
    rho_limit = _check.positive(op, "rho_clip", rho_clip)
    if not c_limit <= rho_limit <= LARGEST_RATIO:
        wanted = f"at least c_clip = {c_limit} and at most {LARGEST_RATIO:g}"
        raise ValueError(f"rlhf_fast.{op}: rho_clip must be {wanted}, got {rho_limit}")
    advantages, returns = _dispatch.call(
        _dispatch.select(op, rewards).vtrace.default, rewards, values, log_ratios, mask, *flags, bounds,
        _check.in_unit_interval(op, "gamma", gamma), _check.in_unit_interval(op, "lam", lam), rho_limit, c_limit, carry,
    )  # fmt: skip
    return VTrace(advantages, returns)


def retrace(
    rewards: Tensor,  # (B, T) or (total,)
    q_values: Tensor,
    values: Tensor,
    log_ratios: Tensor,
    *,
    mask: Tensor | None = None,
    dones: Tensor | None = None,
    truncated: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
    cu_seqlens: Tensor | None = None,  # (S + 1,)
    gamma: float = 1.0,
    lam: float = 1.0,
    mask_mode: str = "carry",
) -> Tensor:
    """Targets for the action values of the sampled tokens; formulas in the module's docstring. No gradient.

    Args:
        rewards, q_values, values: `(B, T)`, or `(total,)` with `cu_seqlens`; of one float dtype. q_values: of the
            sampled tokens; values: of the states before them, the action values' mean under the learning policy.
        log_ratios: same shape and dtype, in nats, as in `vtrace`.
        mask, dones, truncated, bootstrap_values, cu_seqlens: as in `gae`.
        gamma, lam: in [0, 1].
        mask_mode: "carry" skips masked tokens; "zero" counts them with 0 in all four tensors.

    Returns:
        Targets, float32 (float64 for float64), of the shape of rewards; 0 at masked tokens. Infinite
        rewards and values, and log-ratios that are NaN, give NaN to their token and to those before it in the episode.

    Raises:
        TypeError, ValueError: on a wrong dtype, shape, device or range, naming the argument.
    """
    op = "retrace"
    bounds = gae.checked_layout(op, rewards, values, mask, cu_seqlens)
    for name, x in (("q_values", q_values), ("log_ratios", log_ratios)):
        gae.check_like(op, name, x, rewards)
    carry = bool(_check.choice(op, "mask_mode", mask_mode, gae.MASK_MODES))
    flags = gae.token_flags(op, rewards, mask, bounds, dones, truncated, bootstrap_values)
    gamma, lam = _check.in_unit_interval(op, "gamma", gamma), _check.in_unit_interval(op, "lam", lam)
    ops = _dispatch.select(op, rewards)
    wide = reference.accumulate_dtype(rewards.dtype)  # no sum is rounded to half precision
    tokens = [x.to(wide) for x in (rewards, q_values, values, log_ratios)]
    flags[2] = None if flags[2] is None else flags[2].to(wide)
    skipped = mask
    if mask is not None and not carry:  # masked tokens count: they have a gain, and are 0 in the result alone
        skipped, tokens = None, [x.masked_fill(~mask, 0) for x in tokens]
        flags[:2] = [None if x is None else x & mask for x in flags[:2]]
    r, q, v, ratios = tokens
    rest = skipped, *flags, bounds
    _, along = _dispatch.call(ops.vtrace.default, r - q + v, v, ratios, *rest, gamma, lam, 1.0, 1.0, True)  # V + h
    beyond = torch.lerp(v, along, lam)
    _, targets = _dispatch.call(ops.gae.default, r, beyond, *rest, None, None, gamma, 0.0, 0.0, True)
    return targets if mask is None or skipped is mask else targets.masked_fill(~mask, 0)


def _fake_vtrace(rewards: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return gae.two_like(rewards)


define(
    "vtrace",
    "(Tensor rewards, Tensor values, Tensor log_ratios, Tensor? mask, Tensor? dones, Tensor? truncated, "
    "Tensor? bootstrap_values, Tensor? cu_seqlens, float gamma, float lam, float rho_clip, float c_clip, bool carry) "
    "-> (Tensor advantages, Tensor returns)",
    reference=reference.vtrace, fake=_fake_vtrace, derivative=CONSTANT, public=("vtrace", "retrace"),
)  # fmt: skip
_dispatch.served_by("vtrace", "vtrace", "retrace")
_triton.launched_from("vtrace", "vtrace")
