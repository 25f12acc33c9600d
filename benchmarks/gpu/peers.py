# SPDX-License-Identifier: Apache-2.0
"""Other projects' kernels on a GPU, each where it can be imported: the function (number of the round) -> result."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from gpu.timing import Call

Inputs = Callable[[int], tuple[torch.Tensor, ...]]


def peer(module: str, function: str) -> Callable[..., Any] | None:
    try:
        return getattr(importlib.import_module(module), function)
    except Exception:  # not installed, or not importable beside this PyTorch
        return None


def of_logprobs(inputs: Inputs) -> dict[str, Call]:
    """inputs: logits (N, V), targets (N,). Liger's leaves out the last row, as one row has no next token."""
    found: dict[str, Call] = {}
    if (trl := peer("trl.trainer.utils", "selective_log_softmax")) is not None:
        found["TRL"] = lambda i: trl(*inputs(i))
    if (quack := peer("quack.cross_entropy", "cross_entropy_fwd")) is not None:
        found["quack"] = lambda i: quack(*inputs(i))
    if (liger := peer("liger_kernel.ops.grpo_loss", "fused_selective_log_softmax")) is not None:
        found["Liger"] = lambda i: liger(*(x.unsqueeze(0) for x in inputs(i)), 1.0)
    return found


def of_reverse_kl(inputs: Inputs) -> dict[str, Call]:
    """inputs: logits and the reference's, (N, V). Liger's takes log-probs, so the softmaxes are part of the call."""
    if (liger := peer("liger_kernel.transformers.functional", "liger_kl_div")) is None:
        return {}

    def call(i: int) -> object:
        logp, logq = (torch.log_softmax(x, dim=-1) for x in inputs(i))
        return liger(logq, logp, reduction="sum", log_target=True)

    return {"Liger": call}


def of_gae(inputs: Inputs) -> dict[str, Call]:
    """inputs: rewards and values (B, T). No returns, and an array of flags more."""
    if (gae := peer("rl_triton", "compute_gae")) is None:
        return {}
    never = torch.zeros_like(inputs(0)[0])
    return {"rl-triton": lambda i: gae(*inputs(i), never, gamma=1.0, lambda_=0.95)}


def of_vtrace(inputs: Inputs) -> dict[str, Call]:
    """inputs: rewards, values, log-ratios (B, T). The ratio comes as two log-probs, and the next values are read."""
    if (vtrace := peer("rl_triton", "compute_vtrace")) is None:
        return {}
    never = torch.zeros_like(inputs(0)[0])
    following = [torch.cat([v[:, 1:], torch.zeros_like(v[:, :1])], dim=1) for v in (inputs(0)[1], inputs(1)[1])]

    def call(i: int) -> object:
        rewards, values, log_ratios = inputs(i)
        return vtrace(log_ratios, never, values, following[i % 2], rewards, never, gamma=1.0)

    return {"rl-triton": call}


def of_retrace(inputs: Inputs) -> dict[str, Call]:
    """inputs: rewards, action values, values, log-ratios (B, T). All actions' probabilities and values: of two."""
    if (retrace := peer("rl_triton", "compute_retrace")) is None:
        return {}
    rewards = inputs(0)[0]
    never, always, actions = torch.zeros_like(rewards), torch.ones_like(rewards), torch.zeros_like(rewards).long()
    behind, following = (torch.rand(*rewards.shape, 2, device=rewards.device) for _ in range(2))

    def call(i: int) -> object:
        rewards, q_values, _, _ = inputs(i)
        return retrace(behind, always, q_values, following, actions, rewards, never, gamma=1.0, lambda_=0.95)

    return {"rl-triton, 2 actions": call}


def of_linear_logprobs(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> dict[str, Call]:
    """hidden (N, H), weight (V, H), targets (N,)."""
    found: dict[str, Call] = {}
    if (cce := peer("cut_cross_entropy", "linear_cross_entropy")) is not None:
        found["CCE"] = lambda i: -cce(hidden, weight, targets, reduction="none")
    module = "liger_kernel.ops.fused_linear_scaled_cross_entropy"
    if (liger := peer(module, "LigerFusedLinearScaledCrossEntropyFunction")) is not None:
        found["Liger"] = lambda i: -liger.apply(hidden, weight, targets)  # type: ignore[attr-defined]
    return found
