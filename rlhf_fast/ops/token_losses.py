# SPDX-License-Identifier: Apache-2.0
"""Policy losses of one token: one function each, shared by `linear_policy_loss` and the trainer.

A function takes logprobs, log_ratio (of one token: logprobs - old_logprobs) and advantages, all of one shape, and the
clip range. It returns each token's loss (to be minimised), the derivative of that loss in logprobs, and whether the
token was clipped. The derivative is written out instead of left to autograd, because the linear op needs it while the
token's logits are still in memory.

With r = exp(log_ratio), A the advantage, r' = r clipped to [1 - low, 1 + high]:

    ppo        max(-A r, -A r')                         Schulman et al. 2017 (1707.06347), eq. 7
    dual_clip  for A < 0 limited to -A dual_clip        Ye et al. 2020 (1912.09729), eq. 5
    cispo      -A logprobs, weighted by a constant r'   MiniMax-M1 2025 (2506.13585), eq. 4

GRPO (2402.03300, eq. 3), DAPO (2503.14476, eq. 8) and Dr. GRPO (2503.20783) have PPO's token loss. They differ in how
advantages are computed and in what the sum over tokens is divided by, so all three are `ppo` here, with a different
`normalizer` (B sequences in the batch, at most T tokens each):

    grpo       mean over a sequence, then over sequences    normalizer = B * mask.sum(-1, keepdim=True)
    dapo       mean over all tokens; low < high clips       normalizer = mask.sum(), the default
    dr_grpo    a constant                                   normalizer = B * T

The log-ratio is limited to [-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT] before `exp`, so every loss and derivative is finite for
finite inputs, and an advantage of 0 gives exactly 0. Beyond the limit the loss is that at the limit and the derivative
is 0, as with `torch.clamp` and in verl: such a token is e^20 times more or less likely than when it was sampled. Its
gradient is meaningless, and would dominate the batch when the norm is clipped. cispo's weight has no derivative, so its
tokens keep their gradient.

GSPO (2507.18071, eq. 5 and 7) and RLOO (Ahmadian et al. 2024, 2402.14740) have one ratio per sequence, which needs all
logprobs of the sequence. `sequence_log_ratio` computes it for every token of the sequence, from differentiable logprobs
of `linear_token_logprobs`:

    log_ratio = sequence_log_ratio(logprobs, old_logprobs, mask)        mean=False for RLOO
    ratio = importance_ratio(log_ratio)
    loss = -torch.minimum(ratio * A, ratio.clamp(1 - low, 1 + high) * A)
    (loss * mask / (B * mask.sum(-1, keepdim=True))).sum().backward()
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.ops import codes
from rlhf_fast.ops.reference.logprob import times

# Limit of |log-ratio| before exp, as in verl. exp(20) = 4.9e8 is far beyond any ratio within a clip range, and small
# enough that its product with an advantage, a KL or another ratio is finite in float32 and bfloat16.
LOG_RATIO_LIMIT = 20.0


class Clip(NamedTuple):
    """The ratio's range is [1 - low, 1 + high]; dual limits it for negative advantages."""

    low: float
    high: float
    dual: float


class TokenLoss(NamedTuple):
    loss: Tensor
    slope: Tensor  # d loss / d logprobs
    clipped: Tensor  # bool

    def differentiable(self, logprobs: Tensor) -> Tensor:
        """The loss with `slope` as its gradient in `logprobs`, the tensor that this was computed from."""
        return self.loss + self.slope * (logprobs - logprobs.detach())


TokenLossFunction = Callable[[Tensor, Tensor, Tensor, Clip], TokenLoss]


def importance_ratio(log_ratio: Tensor) -> Tensor:
    """exp(log_ratio), limited to +-LOG_RATIO_LIMIT before exp; differentiable, with gradient 0 beyond the limit."""
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def zero_beyond_limit(slope: Tensor, log_ratio: Tensor) -> Tensor:
    """`slope`, or 0 where `importance_ratio` limits log_ratio; NaN stays NaN."""
    return torch.where(log_ratio.abs() > LOG_RATIO_LIMIT, 0.0, slope)


def sequence_log_ratio(
    logprobs: Tensor,  # (B, T)
    old_logprobs: Tensor,  # (B, T)
    mask: Tensor,  # (B, T) bool
    *,
    mean: bool = True,
) -> Tensor:
    """(B, T) the log-ratio of a whole sequence at each of its real tokens, 0 elsewhere; differentiable in logprobs.

    mean: over the sequence's real tokens (GSPO); False: their sum, log p(sequence) - log p_old(sequence) (RLOO).
    """
    total = torch.where(mask, logprobs - old_logprobs, 0.0).sum(-1, keepdim=True)
    return torch.where(mask, total / mask.sum(-1, keepdim=True).clamp(min=1) if mean else total, 0.0)


def ppo(logprobs: Tensor, log_ratio: Tensor, advantages: Tensor, clip: Clip) -> TokenLoss:
    """The clipped surrogate: no reward for moving the ratio further than the clip range."""
    ratio = importance_ratio(log_ratio)
    plain = -advantages * ratio
    limited = -advantages * ratio.clamp(1 - clip.low, 1 + clip.high)
    clipped = limited > plain
    slope = zero_beyond_limit(torch.where(clipped, 0.0, plain), log_ratio)
    return TokenLoss(torch.maximum(plain, limited), slope, clipped)


def dual_clip(logprobs: Tensor, log_ratio: Tensor, advantages: Tensor, clip: Clip) -> TokenLoss:
    """PPO's loss; for negative advantages at most the loss at ratio `clip.dual`, however large the ratio."""
    loss, slope, clipped = ppo(logprobs, log_ratio, advantages, clip)
    ceiling = -advantages * clip.dual
    above = (advantages < 0) & (loss > ceiling)
    return TokenLoss(torch.where(above, ceiling, loss), torch.where(above, 0.0, slope), clipped | above)


def cispo(logprobs: Tensor, log_ratio: Tensor, advantages: Tensor, clip: Clip) -> TokenLoss:
    """REINFORCE with a clipped importance weight that has no gradient, so clipped tokens keep theirs."""
    ratio = importance_ratio(log_ratio)
    weight = ratio.clamp(1 - clip.low, 1 + clip.high)
    slope = -advantages * weight
    return TokenLoss(times(slope, logprobs), slope, weight != ratio)


TOKEN_LOSSES: dict[str, TokenLossFunction] = {
    "ppo": ppo,
    "dual_clip": dual_clip,
    "grpo": ppo,
    "dapo": ppo,
    "dr_grpo": ppo,
    "cispo": cispo,
}


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: int, gradient: int) -> tuple[Tensor, Tensor]:
    """A KL estimate for the loss and its derivative in logprobs; `codes` has the numbers of estimators and gradients.

    As `approx_kl`, except that the argument of k3's exp is limited to LOG_RATIO_LIMIT; beyond it the derivative is that
    at the limit, so tokens far from the reference are still pulled back.
    """
    d = logprobs - ref_logprobs
    if estimator == codes.K1:
        value, slope = d, torch.ones_like(d)
    elif estimator == codes.K2:
        value, slope = 0.5 * d * d, d
    elif estimator == codes.K3:
        excess = (-d).clamp(max=LOG_RATIO_LIMIT).expm1()
        value, slope = excess + d, -excess
    else:
        value, slope = d.abs(), torch.sign(d)
    return value, d if gradient == codes.STRAIGHT_THROUGH else slope
