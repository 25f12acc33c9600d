# SPDX-License-Identifier: Apache-2.0
"""V-trace: value targets and advantages from samples of another policy than the one that learns.

Espeholt et al. 2018 (IMPALA, arXiv 1802.01561, section 4.1), with the lambda of its remark 2. Of token t, whose
log-ratio l_t is its log-probability under the learning policy minus that under the one that sampled it:

    rho_t   = min(rho_clip, exp(l_t))        c_t = lam min(c_clip, exp(l_t))
    delta_t = r_t + gamma V_{t+1} - V_t
    v_t     = V_t + rho_t delta_t + gamma c_t (v_{t+1} - V_{t+1})            returns
    A_t     = rho_t (r_t + gamma v_{t+1} - V_t)                              advantages

The recurrence is that of `gae` with a coefficient per token. Where every log-ratio is 0 and no limit below 1, the
returns are those of `gae(lam=lam)`, and so are the advantages with lam = 1. What follows the last token, a done, a
truncation or a masked token is as in `gae`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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
            the policy that sampled it. Limited before the exponential, so any value is legal, infinities too. What an
            infinite reward gives in front of a factor gamma c_t of exactly 0 (lam = 0, gamma = 0, a log-ratio of -inf)
            is undefined: NaN, since 0 times infinity has no value, or on a GPU perhaps an infinity.
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


def _fake_vtrace(rewards: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return gae.two_like(rewards)


define(
    "vtrace",
    "(Tensor rewards, Tensor values, Tensor log_ratios, Tensor? mask, Tensor? dones, Tensor? truncated, "
    "Tensor? bootstrap_values, Tensor? cu_seqlens, float gamma, float lam, float rho_clip, float c_clip, bool carry) "
    "-> (Tensor advantages, Tensor returns)",
    reference=reference.vtrace, fake=_fake_vtrace, derivative=CONSTANT,
)  # fmt: skip
_dispatch.served_by("vtrace", "vtrace")
_triton.launched_from("vtrace", "vtrace")
