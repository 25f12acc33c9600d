# SPDX-License-Identifier: Apache-2.0
"""The policy's loss on one micro-batch, by the fused op where it can, and its gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import rlhf_fast as rf
from rlhf_fast.models.batches import Batch
from rlhf_fast.models.heads import head_and_options, predicting_rows, row_logprobs, token_logprobs
from rlhf_fast.ops.token_losses import TOKEN_LOSSES, Clip

from .agent import Agent
from .config import PPOConfig
from .metrics import Sampled
from .objectives import OBJECTIVES, Totals, dpo_loss


def policy_backward(
    agent: Agent, sampled: Sampled, part: Batch, rows: Tensor, totals: Totals, config: PPOConfig
) -> tuple[Tensor, dict[str, float]]:
    """Add the policy's gradients; returns its log-probabilities (B, T) and the loss."""
    objective, mask = OBJECTIVES[config.objective], part.mask
    width = mask.shape[1]
    if objective.token_loss is None:
        logprobs = token_logprobs(agent.policy, part, config.temperature)
        better = sampled.better[rows][0::2]
        loss, margins = dpo_loss(logprobs, sampled.ref_logprobs[rows, :width], better, config.kl_coef)
        loss = loss / (totals.sequences / 2)
        loss.backward()
        right = float((margins[better] > 0).sum()) / (totals.sequences / 2)
        return logprobs.detach(), {"loss/policy_avg": float(loss.detach()), "rewards/accuracies": right}

    hidden, tokens = predicting_rows(agent.policy, part)
    targets = part.input_ids.flatten()[tokens]
    old, advantages, ref = (
        x[rows, :width][mask] for x in (sampled.old_logprobs, sampled.made.advantages, sampled.ref_logprobs)
    )
    divisor = objective.divisor(mask, totals, config).expand_as(mask)[mask]
    high = config.cliprange_high or config.cliprange
    if part.support is None:
        weight, options = head_and_options(agent.policy, config.temperature)
        result = rf.linear_policy_loss(
            hidden, weight, targets, old, advantages, mask=torch.ones_like(targets, dtype=torch.bool),
            objective=objective.token_loss, clip=(config.cliprange, high), normalizer=divisor,
            **kl_options(agent, part, ref, config), **options,
        )  # fmt: skip
        loss, logprobs, clipped = result.loss, result.logprobs, result.clip_fraction * len(targets)
    else:  # the fused loss knows no support: its two halves, one after the other
        logprobs = row_logprobs(agent.policy, hidden, targets, part.support, config.temperature)
        found = TOKEN_LOSSES[objective.token_loss](
            logprobs.detach(), logprobs.detach() - old, advantages, Clip(config.cliprange, high, dual=torch.inf)
        )
        loss = ((found.differentiable(logprobs) + kl_loss(logprobs, ref, old, config)) / divisor).sum()
        logprobs, clipped = logprobs.detach(), found.clipped.sum()
    loss.backward()
    figures = {"loss/policy_avg": float(loss.detach()), "policy/clipfrac_avg": float(clipped) / totals.tokens}
    return logprobs.new_zeros(mask.shape).masked_scatter(mask, logprobs), figures


def kl_options(agent: Agent, part: Batch, ref_logprobs: Tensor, config: PPOConfig) -> dict[str, Any]:
    """What `rf.linear_policy_loss` needs for a KL in the loss."""
    if config.kl_in == "reward":
        return {}
    if config.kl_estimator == "exact":
        with torch.no_grad(), agent.reference() as reference:
            ref_hidden, _ = predicting_rows(reference, part)
            weight, options = head_and_options(reference, config.temperature)
        reference_head = {"ref_hidden": ref_hidden, "ref_weight": weight, "ref_bias": options["bias"]}
        return {"kl_coef": config.kl_coef, "estimator": "exact", **reference_head}
    return {
        "kl_coef": config.kl_coef,
        "estimator": config.kl_estimator,
        "ref_logprobs": ref_logprobs,
        "kl_gradient": "straight_through" if config.kl_in == "loss-straight-through" else "value",
        "kl_importance": config.kl_in == "loss-importance",
    }


def kl_loss(logprobs: Tensor, ref_logprobs: Tensor, old_logprobs: Tensor, config: PPOConfig) -> Tensor | float:
    """(N,) what each token pays for its KL where it is in the loss."""
    if config.kl_in == "reward":
        return 0.0
    gradient = "straight_through" if config.kl_in == "loss-straight-through" else "value"
    ratio = (logprobs - old_logprobs).exp() if config.kl_in == "loss-importance" else None
    kl = rf.approx_kl(logprobs, ref_logprobs, estimator=config.kl_estimator, gradient=gradient, importance_ratio=ratio)
    return config.kl_coef * kl
