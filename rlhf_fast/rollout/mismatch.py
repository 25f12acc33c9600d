# SPDX-License-Identifier: Apache-2.0
"""How far an engine's log-probabilities are from the trainer's, and weights that correct for it.

Both have the same weights but different kernels and rounding, so samples come from a slightly different distribution
than the policy's. With r = p_trainer / p_engine of a token or a sequence:

    truncate        min(r, cap) of each token. Truncated importance sampling (Yao et al. 2025, "Your efficient RL
                    framework secretly brings you off-policy RL training"), cap 2
    mask            r of each token within [low, high], else 0. IcePop (Ling team 2025, Ring-1T report), [0.5, 5]
    sequence-mask   r of the sequence if it is at most `cap`, else 0 for all its tokens. TRL's default, cap 3

The weights multiply the policy's advantages and have no gradient. Limits are applied to log r, before any exp.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.errors import UserError

Kind = Literal["none", "truncate", "mask", "sequence-mask"]
# Mean |difference| in nats above which an engine must have different weights: rounding gives less. Measured: 6e-6 in
# float32 and 0.04 in bfloat16 with the same weights, at least 0.2 with the head of the step before.
OTHER_WEIGHTS = {torch.float32: 1e-3}
OTHER_WEIGHTS_16 = 0.15
MOST_A_STEP = 1.0  # with samples of the weights one update ago: then a weight of 2 is no correction any more


CAPS = {"truncate": 2.0, "sequence-mask": 3.0}  # the defaults of the kinds that have a cap


class Correction(NamedTuple):
    """How samples of an engine are weighted."""

    kind: Kind = "none"
    cap: float = 2.0  # of truncate and sequence-mask
    low: float = 0.5  # of mask, as `high`
    high: float = 5.0


def weights(logprobs: Tensor, engine_logprobs: Tensor, mask: Tensor, correction: Correction) -> Tensor:
    """(B, T) float32 weight of each token's advantage; 1 where `mask` is False.

    `logprobs` (B, T) are the trainer's, under the policy that sampled; `engine_logprobs` (B, T) the engine's.
    """
    if correction.kind == "none":
        return torch.ones_like(logprobs)
    gap = torch.where(mask, logprobs - engine_logprobs, 0.0).detach().float()  # log r; no NaN outside the mask
    if correction.kind == "truncate":
        return gap.clamp(max=math.log(correction.cap)).exp()
    if correction.kind == "mask":
        inside = (gap >= math.log(correction.low)) & (gap <= math.log(correction.high))
        return torch.where(mask & ~inside, 0.0, torch.where(inside, gap, 0.0).exp())
    total = gap.sum(1, keepdim=True)
    below_cap = total <= math.log(correction.cap)
    return torch.where(mask, torch.where(below_cap, total, -torch.inf).exp(), 1.0)


def mismatch_metrics(
    logprobs: Tensor, engine_logprobs: Tensor, mask: Tensor, correction: Correction
) -> dict[str, float]:
    """Statistics over all ranks, with d = logprobs - engine_logprobs in nats and r = exp(d) (d clamped to 20 before):

    mean, p99 and max of |d|; k3 = mean(r - 1 - d), an estimate of KL(engine || trainer); the share of tokens whose
    weight is not r; the effective sample size (sum w)^2 / (n sum w^2) as a share of the tokens.
    """
    weighted = weights(logprobs, engine_logprobs, mask, correction)
    gap, weight = (ranks().cat(x[mask].double()) for x in (logprobs.detach() - engine_logprobs, weighted))
    size, ratio = gap.abs(), gap.clamp(-20, 20).exp()
    return {
        "engine/logprob_diff_mean": float(size.mean()),
        "engine/logprob_diff_p99": float(size.quantile(0.99)) if len(size) < 2**24 else float(size.max()),
        "engine/logprob_diff_max": float(size.max()),
        "engine/k3": float((ratio - 1 - gap.clamp(-20, 20)).mean()),
        "engine/corrected": float(((weight - ratio).abs() > 1e-6 * ratio).double().mean()),
        "engine/effective_samples": float(weight.sum() ** 2 / (len(weight) * weight.square().sum()).clamp(min=1e-30)),
    }


def check_engine(
    logprobs: Tensor, engine_logprobs: Tensor, mask: Tensor, dtype: torch.dtype, steps_behind: int = 0
) -> None:
    """Stop if the engine's log-probabilities differ from the trainer's by more than rounding in `dtype`.

    If they are of the weights `steps_behind` updates ago, they may differ by as much as a policy can change.

    Raises:
        UserError: the engine samples from a different model than the policy.
    """
    total, count = ranks().total([float(((logprobs - engine_logprobs).abs() * mask).sum()), float(mask.sum())])
    mean, most = total / max(count, 1), OTHER_WEIGHTS.get(dtype, OTHER_WEIGHTS_16)
    if steps_behind:
        if not mean <= MOST_A_STEP:
            raise UserError(
                f"the policy is {mean:.3g} nats a token from the weights that sampled, one update ago (at most "
                f"{MOST_A_STEP}): lower lr, or leave one_step_ahead out"
            )
    elif not mean <= most:
        raise UserError(
            f"the engine's log-probabilities are {mean:.3g} nats a token from the policy's (at most {most} is rounding "
            f"in {dtype}): it has other weights, another temperature, or gives raw log-probabilities. Restart it as "
            "docs/engine.md shows, then --resume"
        )
