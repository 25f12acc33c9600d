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

It has no kernel of its own. h_t = min(1, exp(l_t)) (delta_t + gamma lam h_{t+1}) is V-trace's v_t for the rewards
delta_t and values of 0, and Q'_t = r_t + gamma (V_{t+1} + lam h_{t+1}), without a token's own Q, V and log-ratio. To a
critic of state values it adds nothing: with V_t as Q_t and lam = 1 the targets are the r_t + gamma v_{t+1} that
V-trace's advantages contain; with r_t + gamma V_{t+1} as Q_t every delta_t is 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast import _dispatch, _triton
from rlhf_fast.ops import _check, gae, reference, sequences
from rlhf_fast.ops._register import CONSTANT, define

# Of the limits of ratios. An advantage has a product of two ratios, which must not overflow in float32. No limit may be
# below the least ratio, exp(codes.LEAST_LOG_RATIO).
SMALLEST_LIMIT, LARGEST_RATIO = 1e-29, 1e15


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
            only with lam = 0, gamma = 0 or a log-ratio of -inf (with a gamma lam below 1e-7 it may be rounded to 0).
            Times an infinite gain it is NaN, as in the formula.
        mask, dones, truncated, bootstrap_values, cu_seqlens: as in `gae`.
        gamma, lam: in [0, 1].
        rho_clip: limit of the ratio that weighs a token's own error, at least c_clip: decides which policy's value is
            learned; 1e15, the largest, for that of the learning policy. An advantage has a product of two ratios, so
            a larger limit would overflow.
        c_clip: limit of the ratio that weighs what follows, in [1e-29, 1]: decides how fast it is learned. Above 1 the
            product over a row's tokens would overflow.
        mask_mode: "carry" skips masked tokens; "zero" counts them with reward, value and log-ratio 0.

    Returns:
        `VTrace(advantages, returns)`, float32 (float64 for float64), of the shape of rewards; both 0 at masked tokens.

    Raises:
        TypeError, ValueError: on a wrong dtype, shape, device or range, naming the argument.
    """
    op = "vtrace"
    bounds = sequences.checked_layout(op, rewards, values, mask, cu_seqlens)
    sequences.check_like(op, "log_ratios", log_ratios, rewards)
    carry = bool(_check.choice(op, "mask_mode", mask_mode, gae.MASK_MODES))
    flags = sequences.token_flags(op, rewards, mask, bounds, dones, truncated, bootstrap_values)
    c_limit = _check.number(op, "c_clip", c_clip)
    if not SMALLEST_LIMIT <= c_limit <= 1:
        raise ValueError(f"rlhf_fast.{op}: c_clip must be between {SMALLEST_LIMIT:g} and 1, got {c_limit}")
    rho_limit = _check.number(op, "rho_clip", rho_clip)
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
        Targets, float32 (float64 for float64), of the shape of rewards; 0 at masked tokens. With gamma = 0 the rewards.

        An infinite reward makes its token's target infinite, and those before it in the episode; an infinite bootstrap
        value likewise. What is infinite in values and q_values, or NaN in log_ratios too, goes to the tokens before it
        alone (from q_values with the other sign), since a token's own V, Q and log-ratio have no part in its target.
        Infinities of both signs, and one times a factor of 0, give NaN.

    Raises:
        TypeError, ValueError: on a wrong dtype, shape, device or range, naming the argument.
    """
    op = "retrace"
    bounds = sequences.checked_layout(op, rewards, values, mask, cu_seqlens)
    for name, x in (("q_values", q_values), ("log_ratios", log_ratios)):
        sequences.check_like(op, name, x, rewards)
    carry = bool(_check.choice(op, "mask_mode", mask_mode, gae.MASK_MODES))
    flags = sequences.token_flags(op, rewards, mask, bounds, dones, truncated, bootstrap_values)
    gamma, lam = _check.in_unit_interval(op, "gamma", gamma), _check.in_unit_interval(op, "lam", lam)
    wide = reference.accumulate_dtype(rewards.dtype)  # no sum is rounded to half precision
    r, q, v, ratios = (x.to(wide) for x in (rewards, q_values, values, log_ratios))
    done, truncated, bootstrap = flags
    skipped = mask
    if mask is not None and not carry:  # masked tokens count: they have a gain, and are 0 in the result alone
        skipped = None
        r, q, v, ratios = (x.masked_fill(~mask, 0) for x in (r, q, v, ratios))
        done, truncated = (None if x is None else x & mask for x in (done, truncated))
    ends = truncated if done is None else done if truncated is None else done | truncated
    following = _following(rewards, skipped, ends, bounds)
    next_v = following.of(v)
    if truncated is not None and bootstrap is not None:
        next_v = torch.where(truncated if done is None else truncated & ~done, bootstrap.to(wide), next_v)
    delta = r + gamma * next_v - q
    _, gains = _dispatch.call(
        _dispatch.select(op, rewards).vtrace.default, delta, torch.zeros_like(delta), ratios, skipped,
        ends, None, None, bounds, gamma, lam, 1.0, 1.0, True,
    )  # fmt: skip
    targets = (r + gamma * (next_v + lam * following.of(gains))).detach()
    return targets if mask is None else targets.masked_fill(~mask, 0)


class _Following(NamedTuple):
    """Of each token: where the next one that counts is (None: one further), and whether its episode has one."""

    at: Tensor | None
    exists: Tensor

    def of(self, x: Tensor) -> Tensor:
        """x of the next token, 0 where there is none."""
        following = x.roll(-1, -1) if self.at is None else x.gather(-1, self.at)
        return following.masked_fill(~self.exists, 0)


def _following(rewards: Tensor, counts: Tensor | None, ends: Tensor | None, bounds: Tensor | None) -> _Following:
    """counts: None = every token does. ends: at which an episode ends."""
    length = rewards.shape[-1]
    place = torch.arange(length, device=rewards.device)
    at, exists = None, place + 1 < length
    if counts is not None:
        counted = torch.where(exists & counts.roll(-1, -1), place + 1, length)
        first = counted.flip(-1).cummin(-1).values.flip(-1)
        at, exists = first.clamp(max=length - 1), first < length
    if bounds is not None:
        sequence = sequences.sequence_of_token(rewards, bounds)
        exists = exists & (sequence == (sequence.roll(-1) if at is None else sequence[at]))
    return _Following(at, exists if ends is None else exists & ~ends)


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
