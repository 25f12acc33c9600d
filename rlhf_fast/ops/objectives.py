# SPDX-License-Identifier: Apache-2.0
"""Policy objectives, token by token: one function each, shared by `linear_policy_loss` and the trainer.

An objective gets logprobs, old_logprobs and advantages of the same shape, and its clip range. It returns the loss of
each token (to be minimised), that loss' derivative in logprobs, and whether the clip decided it. The derivative is
written out, not left to autograd, because the linear op needs it while its logits are still at hand.

With r = exp(logprobs - old_logprobs), A the advantage, r' = r clipped to [1 - low, 1 + high]:

    ppo        max(-A r, -A r')                         Schulman et al. 2017 (1707.06347), eq. 7
    dual_clip  for A < 0 limited to -A dual_clip        Ye et al. 2020 (1912.09729), eq. 5
    cispo      -A logprobs, weighed by a constant r'    MiniMax-M1 2025 (2506.13585), eq. 4

GRPO (2402.03300, eq. 3), DAPO (2503.14476, eq. 8) and Dr. GRPO (2503.20783) are PPO's function at the token. What sets
them apart is outside of it: how advantages are made, and what the sum of tokens is divided by. So they share `ppo`
here, and the caller's `normalizer` says the rest (B sequences in the batch, T tokens at most in each):

    grpo       mean over a sequence, then over sequences    normalizer = B * mask.sum(-1, keepdim=True)
    dapo       mean over all tokens; low < high clips       normalizer = mask.sum(), the default
    dr_grpo    a constant                                   normalizer = B * T

GSPO (2507.18071) has one ratio a sequence: no token's gradient is known before all logprobs of its sequence are, so it
cannot be made in one pass. Take `linear_token_logprobs` and a loss in plain PyTorch: four matmuls, or three where the
budget keeps the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Clip(NamedTuple):
    """The ratio's range is [1 - low, 1 + high]; dual limits it for negative advantages."""

    low: float
    high: float
    dual: float


class TokenLoss(NamedTuple):
    loss: Tensor
    slope: Tensor  # d loss / d logprobs
    clipped: Tensor  # bool


Objective = Callable[[Tensor, Tensor, Tensor, Clip], TokenLoss]


def ppo(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip: Clip) -> TokenLoss:
    """The clipped surrogate: no reward for moving the ratio further than the clip range."""
    ratio = (logprobs - old_logprobs).exp()
    plain = -advantages * ratio
    limited = -advantages * ratio.clamp(1 - clip.low, 1 + clip.high)
    clipped = limited > plain
    return TokenLoss(torch.maximum(plain, limited), torch.where(clipped, 0.0, plain), clipped)


def dual_clip(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip: Clip) -> TokenLoss:
    """PPO's, and for negative advantages no more loss than at ratio `clip.dual`, however large the ratio."""
    loss, slope, clipped = ppo(logprobs, old_logprobs, advantages, clip)
    ceiling = -advantages * clip.dual
    above = (advantages < 0) & (loss > ceiling)
    return TokenLoss(torch.where(above, ceiling, loss), torch.where(above, 0.0, slope), clipped | above)


def cispo(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip: Clip) -> TokenLoss:
    """REINFORCE with a clipped importance weight that carries no gradient: every token keeps its own."""
    ratio = (logprobs - old_logprobs).exp()
    weight = ratio.clamp(1 - clip.low, 1 + clip.high)
    slope = -advantages * weight
    return TokenLoss(slope * logprobs, slope, weight != ratio)


OBJECTIVES: dict[str, Objective] = {
    "ppo": ppo,
    "dual_clip": dual_clip,
    "grpo": ppo,
    "dapo": ppo,
    "dr_grpo": ppo,
    "cispo": cispo,
}
