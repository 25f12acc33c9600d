# SPDX-License-Identifier: Apache-2.0
"""The policy's loss on one micro-batch, by the fused op where it can, and its gradients."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

import rlhf_fast as rf
from rlhf_fast.models.batches import Batch
from rlhf_fast.models.heads import head_and_options, predicting_rows, row_logprobs, scatter, token_logprobs
from rlhf_fast.ops.token_losses import TOKEN_LOSSES, importance_ratio, sequence_log_ratio

from .experience import Experience
from .objectives.dpo import pair_loss
from .objectives.objective import Totals
from .settings import PolicyLossOptions

Reference = Callable[[], AbstractContextManager[Any]]


class PolicyResult(NamedTuple):
    """Of one micro-batch."""

    logprobs: Tensor  # (B, T)
    entropy: Tensor | None  # (B, T), None where it was not needed
    figures: dict[str, float]  # what it adds to the means over the minibatch


class Tokens(NamedTuple):
    """The micro-batch's sampled tokens (N,), flattened: what the loss of each is made of."""

    hidden: Tensor  # (N, H)
    targets: Tensor
    learned: Tensor  # bool
    old_logprobs: Tensor
    ref_logprobs: Tensor
    advantages: Tensor
    divisor: Tensor


class Loss(NamedTuple):
    """Of one micro-batch; per token (N,) as in `Tokens`."""

    loss: Tensor  # to differentiate
    shown: float  # its value
    logprobs: Tensor
    entropy: Tensor | None
    clipped: float  # tokens whose loss the clip decided


def policy_backward(
    policy: Any, reference: Reference, part: Experience, totals: Totals, options: PolicyLossOptions
) -> PolicyResult:
    """Add the policy's gradients of a micro-batch; `totals` are of the whole minibatch."""
    if options.objective.pairs:
        return _pairs_backward(policy, part, totals, options)
    batch, mask = part.batch, part.batch.mask
    hidden, places = predicting_rows(policy, batch)
    tokens = Tokens(
        hidden=hidden,
        targets=batch.input_ids.flatten()[places],
        learned=part.learned[mask],
        old_logprobs=part.old_logprobs[mask],
        ref_logprobs=part.ref_logprobs[mask],
        advantages=part.advantages[mask],
        divisor=options.objective.divisor(part.learned, totals).expand_as(mask)[mask],
    )
    one_pass = batch.support is None and (options.on_policy or options.ratio == "token")
    found = (_fused if one_pass else _two_passes)(policy, reference, batch, tokens, options)
    found.loss.backward()
    figures = {"loss/policy_avg": found.shown, "policy/clipfrac_avg": found.clipped / max(totals.tokens, 1.0)}
    entropy = None if found.entropy is None else scatter(found.entropy, places, mask)
    return PolicyResult(scatter(found.logprobs, places, mask), entropy, figures)


def _fused(policy: Any, reference: Reference, batch: Batch, tokens: Tokens, options: PolicyLossOptions) -> Loss:
    """One op, which has the gradients of a token while its logits are still in memory."""
    old, clip, name = tokens.old_logprobs, options.clip, options.token_loss
    if options.on_policy:
        # Every ratio is 1, but the old log-probabilities are those that the op is about to compute. The loss with the
        # same gradient that does not need them: REINFORCE, as CISPO with its weight clipped to 1.
        old, clip, name = torch.zeros_like(tokens.advantages), clip._replace(low=0.0, high=0.0), "cispo"
    weight, head = head_and_options(policy, options.temperature)
    result = rf.linear_policy_loss(
        tokens.hidden,
        weight,
        tokens.targets,
        old,
        tokens.advantages,
        mask=tokens.learned,
        objective=name,
        clip=(clip.low, clip.high),
        normalizer=tokens.divisor,
        entropy_coef=options.entropy_coef,
        dual_clip=min(clip.dual, 1e9),  # read by the loss of this name alone
        **_kl_arguments(reference, batch, tokens, options),
        **head,
    )
    loss, logprobs, entropy = float(result.loss.detach()), result.logprobs, result.entropy
    if not options.on_policy:
        return Loss(result.loss, loss, logprobs, entropy, float(result.clip_fraction) * float(tokens.learned.sum()))
    # -A * ratio is shown in place of -A * logprobs
    change = tokens.advantages * (logprobs - 1 / _lengths(batch.mask, options.ratio)) / tokens.divisor
    loss += float(torch.where(tokens.learned, change, 0.0).sum())
    others = ~tokens.learned  # which the op has passed over
    if bool(others.any()):
        with torch.no_grad():
            stats = rf.linear_token_stats(tokens.hidden[others], weight, tokens.targets[others], **head)
        assert stats.logprobs is not None and stats.entropy is not None  # the op gives both by default
        logprobs = logprobs.masked_scatter(others, stats.logprobs)
        entropy = entropy.masked_scatter(others, stats.entropy)
    return Loss(result.loss, loss, logprobs, entropy, 0.0)


def _two_passes(policy: Any, reference: Reference, batch: Batch, tokens: Tokens, options: PolicyLossOptions) -> Loss:
    """First all log-probabilities, then the losses: for a ratio of whole sequences, and for sampling that was cut."""
    mask = batch.mask
    entropy = None
    if batch.support is None:
        weight, head = head_and_options(policy, options.temperature)
        stats = rf.linear_token_stats(tokens.hidden, weight, tokens.targets, **head)
        assert stats.logprobs is not None and stats.entropy is not None
        logprobs, entropy = stats.logprobs, stats.entropy
    else:
        logprobs = row_logprobs(policy, tokens.hidden, tokens.targets, batch.support, options.temperature)
    old = logprobs.detach() if options.on_policy else tokens.old_logprobs
    if options.ratio == "token":
        log_ratio = logprobs - old
    else:
        rows, old_rows = (torch.zeros_like(mask, dtype=x.dtype).masked_scatter(mask, x) for x in (logprobs, old))
        log_ratio = sequence_log_ratio(rows, old_rows, mask, mean=options.ratio == "sequence-mean")[mask]
    losses, clipped = _token_losses(logprobs, log_ratio, tokens.advantages, options)
    losses = losses / _lengths(mask, options.ratio) + _kl_loss(logprobs, tokens.ref_logprobs, old, options)
    if entropy is not None and options.entropy_coef:
        losses = losses - options.entropy_coef * entropy
    loss = torch.where(tokens.learned, losses / tokens.divisor, 0.0).sum()
    count = float((clipped & tokens.learned).sum())
    return Loss(loss, float(loss.detach()), logprobs.detach(), None if entropy is None else entropy.detach(), count)


def _lengths(mask: Tensor, level: str) -> Tensor:
    """(N,) the tokens of each token's sequence where that is one action, whose loss they share; else 1."""
    lengths = mask.sum(1, keepdim=True).expand_as(mask)[mask]
    return lengths if level == "sequence" else torch.ones_like(lengths)


def _token_losses(
    logprobs: Tensor, log_ratio: Tensor, advantages: Tensor, options: PolicyLossOptions
) -> tuple[Tensor, Tensor]:
    """Losses (N,), differentiable in logprobs by way of log_ratio, and which of them the clip decided."""
    found = TOKEN_LOSSES[options.token_loss](logprobs.detach(), log_ratio.detach(), advantages, options.clip)
    if options.token_loss == "cispo":  # its weight is a constant: the gradient is that of the token's log-probability
        return found.loss + found.slope * (logprobs - logprobs.detach()), found.clipped
    return found.loss + found.slope * (log_ratio - log_ratio.detach()), found.clipped


def _kl_arguments(reference: Reference, batch: Batch, tokens: Tokens, options: PolicyLossOptions) -> dict[str, Any]:
    """What `rf.linear_policy_loss` needs for a KL in the loss."""
    kl = options.kl
    if not kl.loss_coef:
        return {}
    if kl.estimator == "exact":
        with torch.no_grad(), reference() as model:
            ref_hidden, _ = predicting_rows(model, batch)
            weight, head = head_and_options(model, options.temperature)
        reference_head = {"ref_hidden": ref_hidden, "ref_weight": weight, "ref_bias": head["bias"]}
        return {"kl_coef": kl.loss_coef, "estimator": "exact", **reference_head}
    return {
        "kl_coef": kl.loss_coef,
        "estimator": kl.estimator,
        "ref_logprobs": tokens.ref_logprobs,
        "kl_gradient": "straight_through" if kl.place == "loss-straight-through" else "value",
        "kl_importance": kl.place == "loss-importance",
    }


def _kl_loss(
    logprobs: Tensor, ref_logprobs: Tensor, old_logprobs: Tensor, options: PolicyLossOptions
) -> Tensor | float:
    """(N,) each token's KL in the loss."""
    kl = options.kl
    if not kl.loss_coef:
        return 0.0
    gradient = "straight_through" if kl.place == "loss-straight-through" else "value"
    ratio = importance_ratio(logprobs - old_logprobs) if kl.place == "loss-importance" else None
    found = rf.approx_kl(logprobs, ref_logprobs, estimator=kl.estimator, gradient=gradient, importance_ratio=ratio)
    return kl.loss_coef * found


def _pairs_backward(policy: Any, part: Experience, totals: Totals, options: PolicyLossOptions) -> PolicyResult:
    """DPO and IPO: the samples of a prompt are next to each other, and all in one micro-batch."""
    logprobs = token_logprobs(policy, part.batch, options.temperature)
    samples = options.pairs.samples
    log_ratios = (logprobs - part.ref_logprobs).sum(1).view(-1, samples)
    loss, right = pair_loss(log_ratios, part.rewards.view(-1, samples), options.pairs)
    prompts = totals.sequences / samples
    (loss / prompts).backward()
    figures = {"loss/policy_avg": float(loss.detach()) / prompts, "rewards/accuracies": float(right) / prompts}
    return PolicyResult(logprobs.detach(), None, figures)
