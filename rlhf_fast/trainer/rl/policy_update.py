# SPDX-License-Identifier: Apache-2.0
"""The policy's loss and gradients on one micro-batch, by the fused op if that supports the options."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import rlhf_fast as rf
from rlhf_fast.models.batches import Batch
from rlhf_fast.models.heads import head_and_options, predicting_rows, row_logprobs, scatter, token_logprobs
from rlhf_fast.ops.token_losses import TOKEN_LOSSES, Clip, importance_ratio, sequence_log_ratio

from .experience import Experience
from .objectives.dpo import PairOptions, pair_loss
from .objectives.objective import KLOptions, Objective, RatioLevel, Totals

Reference = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class PolicyLossOptions:
    """Options of the policy's loss on tokens or pairs of samples."""

    objective: Objective
    clip: Clip
    kl: KLOptions
    ratio: RatioLevel
    entropy_coef: float
    temperature: float
    pairs: PairOptions
    single_update: bool

    @property
    def token_loss(self) -> str:
        """Its name in `rlhf_fast.ops.token_losses`."""
        return "dual_clip" if self.clip.dual < torch.inf else self.objective.token_loss


class PolicyResult(NamedTuple):
    """Log-probabilities, entropy and figures of one micro-batch."""

    logprobs: Tensor  # (B, T)
    entropy: Tensor | None  # (B, T), None if not needed
    figures: dict[str, Tensor]  # its terms of the minibatch's means; numbers of which nothing waits here


class Tokens(NamedTuple):
    """The micro-batch's sampled tokens (N,), flattened, with the inputs of their losses."""

    hidden: Tensor  # (N, H)
    targets: Tensor
    learned: Tensor  # bool
    learned_rows: Tensor  # int64, the indices of the learned ones
    others: Tensor  # int64, those of the rest
    old_logprobs: Tensor
    ref_logprobs: Tensor
    advantages: Tensor
    divisor: Tensor
    lengths: Tensor  # of the token's sequence if a sequence is one action, whose loss its tokens share; else 1
    places: Tensor  # int64, where the token is in the flattened batch


class Loss(NamedTuple):
    """The loss of one micro-batch; per token (N,) as in `Tokens`."""

    loss: Tensor  # differentiable
    shown: Tensor  # its value
    logprobs: Tensor
    entropy: Tensor | None
    clipped: Tensor  # number of clipped tokens


def policy_backward(
    policy: Any, reference: Reference, part: Experience, totals: Totals, options: PolicyLossOptions
) -> PolicyResult:
    """Add the policy's gradients of a micro-batch; `totals` are of its minibatch."""
    if options.objective.pairs:
        return _pairs_backward(policy, part, totals, options)
    batch, mask = part.batch, part.batch.mask
    hidden, places = predicting_rows(policy, batch)
    wanted = part.learned_tokens()
    divisor = options.objective.divisor(part.learned, totals).expand_as(mask)
    per_token = (part.learned, part.old_logprobs, part.ref_logprobs, part.advantages, divisor)
    learned, old_logprobs, ref_logprobs, advantages, divisor = (x.flatten()[places] for x in per_token)
    tokens = Tokens(
        hidden=hidden,
        targets=batch.input_ids.flatten()[places],
        learned=learned,
        learned_rows=wanted.nonzero().squeeze(1).to(hidden.device, non_blocking=True),
        others=(~wanted).nonzero().squeeze(1).to(hidden.device, non_blocking=True),
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        advantages=advantages,
        divisor=divisor,
        lengths=_lengths(mask, options.ratio).expand_as(mask).flatten()[places],
        places=places,
    )
    one_pass = batch.support is None and (options.single_update or options.ratio == "token")
    result = (_fused if one_pass else _two_passes)(policy, reference, batch, tokens, options)
    result.loss.backward()
    figures = {"loss/policy_avg": result.shown, "policy/clipfrac_avg": result.clipped / max(totals.tokens, 1.0)}
    entropy = None if result.entropy is None else scatter(result.entropy, places, mask)
    return PolicyResult(scatter(result.logprobs, places, mask), entropy, figures)


def _fused(policy: Any, reference: Reference, batch: Batch, tokens: Tokens, options: PolicyLossOptions) -> Loss:
    """One fused op, which computes a token's gradients while its logits are in memory."""
    old, clip, name = tokens.old_logprobs, options.clip, options.token_loss
    if options.single_update:
        # Every ratio is 1, but the op itself computes the old log-probabilities. REINFORCE has the same gradient and
        # does not need them: CISPO with its weight clipped to 1.
        old, clip, name = torch.zeros_like(tokens.advantages), clip._replace(low=0.0, high=0.0), "cispo"
    weight, head = head_and_options(policy, options.temperature)
    result = rf.linear_policy_loss(
        tokens.hidden,
        weight,
        tokens.targets,
        old,
        tokens.advantages,
        rows=tokens.learned_rows,
        objective=name,
        clip=(clip.low, clip.high),
        normalizer=tokens.divisor,
        entropy_coef=options.entropy_coef,
        dual_clip=min(clip.dual, 1e9),  # read by the loss of this name alone
        **_kl_arguments(reference, batch, tokens, options),
        **head,
    )
    loss, logprobs, entropy = result.loss.detach(), result.logprobs, result.entropy
    if not options.single_update:
        return Loss(result.loss, loss, logprobs, entropy, result.clip_fraction * len(tokens.learned_rows))
    # report -A * ratio instead of -A * logprobs
    change = tokens.advantages * (logprobs - 1 / tokens.lengths) / tokens.divisor
    loss = loss + torch.where(tokens.learned, change, 0.0).sum()
    if len(tokens.others):  # skipped by the op
        with torch.no_grad():
            stats = rf.linear_token_stats(tokens.hidden[tokens.others], weight, tokens.targets[tokens.others], **head)
        assert stats.logprobs is not None and stats.entropy is not None  # both are default outputs
        logprobs = logprobs.index_copy(0, tokens.others, stats.logprobs)
        entropy = entropy.index_copy(0, tokens.others, stats.entropy)
    return Loss(result.loss, loss, logprobs, entropy, torch.zeros_like(loss))


def _two_passes(policy: Any, reference: Reference, batch: Batch, tokens: Tokens, options: PolicyLossOptions) -> Loss:
    """First all log-probabilities, then the losses: for sequence ratios, and for top-k, top-p and min-p sampling."""
    mask = batch.mask
    entropy = None
    weight, head = head_and_options(policy, options.temperature)
    if batch.support is None:
        stats = rf.linear_token_stats(tokens.hidden, weight, tokens.targets, **head)
        assert stats.logprobs is not None and stats.entropy is not None
        logprobs, entropy = stats.logprobs, stats.entropy
    else:
        logprobs = row_logprobs(policy, tokens.hidden, tokens.targets, batch.support, options.temperature)
        if options.single_update:  # no pass before the update has computed it
            with torch.no_grad():
                entropy = rf.linear_token_stats(tokens.hidden, weight, outputs=("entropy",), **head).entropy
    old = logprobs.detach() if options.single_update else tokens.old_logprobs
    if options.ratio == "token":
        log_ratio = logprobs - old
    else:
        rows, old_rows = (scatter(x, tokens.places, mask) for x in (logprobs, old))
        of_rows = sequence_log_ratio(rows, old_rows, mask, mean=options.ratio == "sequence-mean")
        log_ratio = of_rows.flatten()[tokens.places]
    losses, clipped = _token_losses(logprobs, log_ratio, tokens, options)
    losses = losses + _kl_loss(logprobs, tokens.ref_logprobs, old, options)
    if entropy is not None and options.entropy_coef:
        losses = losses - options.entropy_coef * entropy
    loss = torch.where(tokens.learned, losses / tokens.divisor, 0.0).sum()
    count = (clipped & tokens.learned).sum()
    return Loss(loss, loss.detach(), logprobs.detach(), None if entropy is None else entropy.detach(), count)


def _lengths(mask: Tensor, level: str) -> Tensor:
    """(B, 1) for `Tokens.lengths`."""
    lengths = mask.sum(1, keepdim=True)
    return lengths if level == "sequence" else torch.ones_like(lengths)


def _token_losses(
    logprobs: Tensor, log_ratio: Tensor, tokens: Tokens, options: PolicyLossOptions
) -> tuple[Tensor, Tensor]:
    """Losses (N,), differentiable in logprobs, and which of them are clipped.

    A token's own log-probability has the gradient, whatever the ratio: for CISPO because its weight is constant, and
    for a sequence's ratio because its gradient is the sum of its tokens'. Where the advantages of a sequence differ,
    each token has its own, as in GSPO-token (Zheng et al. 2025, eq. 13) and as in `_fused`. The value of a loss that is
    one number a sequence is shared by its tokens; CISPO's is a number a token.
    """
    own, name = logprobs.detach(), options.token_loss
    result = TOKEN_LOSSES[name](own, log_ratio.detach(), tokens.advantages, options.clip)
    value = result.loss if name == "cispo" else result.loss / tokens.lengths
    return value + result.slope * (logprobs - own), result.clipped


def _kl_arguments(reference: Reference, batch: Batch, tokens: Tokens, options: PolicyLossOptions) -> dict[str, Any]:
    """Arguments of `rf.linear_policy_loss` for a KL in the loss."""
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
    token_kl = rf.approx_kl(logprobs, ref_logprobs, estimator=kl.estimator, gradient=gradient, importance_ratio=ratio)
    return kl.loss_coef * token_kl


def _pairs_backward(policy: Any, part: Experience, totals: Totals, options: PolicyLossOptions) -> PolicyResult:
    """DPO and IPO: the samples of a prompt are next to each other, and all in one micro-batch."""
    logprobs = token_logprobs(policy, part.batch, options.temperature)
    samples = options.pairs.samples
    log_ratios = (logprobs - part.ref_logprobs).sum(1).view(-1, samples)
    rounding = None if part.rounding is None else part.rounding.view(-1, samples)
    loss = pair_loss(log_ratios, part.rewards.view(-1, samples), options.pairs, rounding)
    prompts = totals.sequences / samples
    (loss / prompts).backward()
    return PolicyResult(logprobs.detach(), None, {"loss/policy_avg": loss.detach() / prompts})
