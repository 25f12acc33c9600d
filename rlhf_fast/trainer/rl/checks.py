# SPDX-License-Identifier: Apache-2.0
"""Checks at every PPO step: each stops the run and says what is wrong, where, and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.errors import UserError
from rlhf_fast.rollout.rollout import Rollout, SamplingParams

# Old and new log-probabilities come from the same function on the same rows, once without and once with autograd. In
# float32 they differ by rounding only. Limits: (of one token, on average).
FLOAT32_TOLERANCE = (1e-3, 1e-4)
# In 16 bits hidden states carry 8 or 11 bits, autograd may pick another attention kernel, a GPU other tiles, and a
# mixture of experts then other experts for a token: single tokens move far, so that the mean alone is limited. Where
# one moves further than RATIO_NOTABLE the run says so once.
LOW_PRECISION_MEAN, RATIO_NOTABLE = 0.1, 0.3
# Surprise and entropy of this many tokens tell a wrong distribution from chance: both limits must be passed.
FEWEST_TOKENS, DEVIATIONS, NATS = 200, 6.0, 0.1


def check_rollout(rollout: Rollout, params: SamplingParams, count: int) -> None:
    """Stop unless a sampler gave `count` samples, and with top-k or top-p the tokens that these left."""
    if len(rollout.texts) != count or len(rollout.input_ids) != count:
        raise UserError(f"the sampler returned {len(rollout.texts)} completions, wanted {count}")
    empty = ~rollout.response_mask.any(1)
    if bool(empty.any()):
        raise UserError(f"the sampler returned no token for sample {int(empty.nonzero()[0])}")
    if params.truncated and rollout.support is None:
        raise UserError(
            f"the sampler returned no `support` though top_k is {params.top_k}, top_p {params.top_p}, "
            f"min_p {params.min_p}: log-probabilities must be taken over the tokens that could be sampled. "
            "Have it record them (`Rollout.support`), or set top_k 0, top_p 1 and min_p 0"
        )


def check_finite(name: str, values: Tensor, mask: Tensor | None = None) -> None:
    """Stop unless every entry (where `mask`) is finite; `values` (B,) or (B, T)."""
    bad = ~torch.isfinite(values)
    if mask is not None:
        bad &= mask
    if bool(bad.any()):
        raise UserError(
            f"{name} is {_at(values, bad)}, {int(bad.sum())} such entries in all. "
            "Lower the learning rate, or set dtype to float32"
        )


def check_figures(figures: Mapping[str, float], step: int, update: int) -> None:
    """Stop unless the losses and gradient norms of an optimizer step are finite: number `update`, from 0, of `step`."""
    for name, value in figures.items():
        if not math.isfinite(value):
            lr = "critic_lr" if name in ("loss/value_avg", "val/grad_norm") else "lr"
            advice = f"Lower {lr}, or set dtype to float32"
            if step == update == 0:
                advice = f"No weight has changed yet, so {lr} is not the cause: set dtype to float32"
            raise UserError(f"{name} is {value:.4g} in step {step + 1}, minibatch {update + 1}. {advice}")


def check_logprobs(name: str, logprobs: Tensor, mask: Tensor) -> None:
    """Stop if a log-probability is not finite or above 0 (beyond rounding)."""
    check_finite(name, logprobs, mask)
    bad = (logprobs > 1e-3) & mask
    if bool(bad.any()):
        raise UserError(
            f"{name} is {_at(logprobs, bad)}; a log-probability is at most 0. "
            "This is a defect of the backend: set RLHF_FAST_BACKEND=torch and report it"
        )


def check_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, model: nn.Module) -> float:
    """Stop unless the first minibatch of a step has the log-probabilities that the advantages were computed from.

    Returns the largest |logprobs - old_logprobs|. In 16 bits one token's may be rounding, and the mean alone decides.
    """
    dtype = next(model.parameters()).dtype
    largest, mean = FLOAT32_TOLERANCE if dtype in (torch.float32, torch.float64) else (torch.inf, LOW_PRECISION_MEAN)
    gap = (logprobs.detach() - old_logprobs).abs() * mask
    average = float(gap.sum() / mask.sum().clamp(min=1))
    bad = (gap > largest) | (~torch.isfinite(gap) & mask)
    if bool(bad.any()) or average > mean:
        worst = bad if bool(bad.any()) else gap == gap.max()
        raise UserError(
            "the probability ratio of the first minibatch is not 1: |logprobs - old_logprobs| is "
            f"{_at(gap, worst)}, {average:.2g} on average (at most {largest} and {mean} in {dtype} are rounding). "
            f"The model gave two answers to the same rows: {_dropout(model)}"
        )
    return float(gap.max()) if gap.numel() else 0.0


def _dropout(model: nn.Module) -> str:
    """The random parts of the model, for a message."""
    on = [
        f"{name or type(module).__name__} ({attribute} {getattr(module, attribute)})"
        for name, module in model.named_modules()
        for attribute in ("p", "attention_dropout", "dropout", "dropout_p")
        if module.training and isinstance(getattr(module, attribute, None), float) and getattr(module, attribute) > 0
    ]
    if on:
        more = " and more" if len(on) > 3 else ""
        return f"dropout is on in {', '.join(on[:3])}{more}; set it to 0 in the model's config"
    return "its forward pass is random though no dropout is on, or takes another path in training; try dtype float32"


def check_distribution(logprobs: Tensor, entropy: Tensor, mask: Tensor) -> None:
    """Stop if the sampled tokens were clearly not drawn from the distribution of `logprobs` (B, T).

    The expected -logprob of a token drawn from it is its entropy (B, T), whatever came before, so their difference has
    mean 0: a sampler at another temperature, of other weights or with a hidden top-k moves it.
    """
    surprise, expected = ranks().cat(torch.stack([-logprobs[mask], entropy[mask]], 1)).double().unbind(1)
    difference = surprise - expected
    if len(difference) < FEWEST_TOKENS:
        return
    mean, error = float(difference.mean()), float(difference.std()) / len(difference) ** 0.5
    if abs(mean) > max(NATS, DEVIATIONS * error):
        way, cause = ("less", "a higher temperature") if mean > 0 else ("more", "a lower temperature, top-k or top-p")
        raise UserError(
            f"the sampler draws from another distribution than softmax(logits / temperature) of the policy: its tokens "
            f"are {abs(mean):.2f} nats {way} likely than such draws ({float(surprise.mean()):.2f} nats of surprise, "
            f"entropy {float(expected.mean()):.2f}). Look for {cause}, or old weights, in the sampler"
        )


def _at(values: Tensor, bad: Tensor) -> str:
    """Value and index of the first bad entry."""
    place = bad.nonzero()[0].tolist()
    names = " ".join(f"{axis} {i}" for axis, i in zip(("sample", "token"), place, strict=False))
    return f"{float(values[tuple(place)]):.4g} at {names}"
