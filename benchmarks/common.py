# SPDX-License-Identifier: Apache-2.0
"""What every benchmark shares: timing side by side, and the PyTorch code that our ops replace.

Baselines are written as a careful user would: rows flattened and contiguous, masked rows left out where that is part of
the comparison. A baseline that loses by a blunder proves nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import rlhf_fast as rf

Call = Callable[[], Any]
PROVIDERS = ("native", "eager", "compile", "torch")

# ------------------------------------------------------------------------------------------- timing side by side


def interleaved(providers: dict[str, Call], rounds: int = 15, budget: float = 6.0) -> dict[str, list[float]]:
    """Seconds of one call, by provider and round: all providers run in every round, so a slow minute slows them all.

    Each is called twice to warm up; calls under 2 ms are repeated within a round. Stops early (never under 3 rounds)
    when `budget` seconds are spent.
    """
    repeats = {}
    for name, call in providers.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, min(200, int(2e-3 / max(time.perf_counter() - start, 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in providers}
    begin = time.perf_counter()
    for round_ in range(rounds):
        if round_ >= 3 and time.perf_counter() - begin > budget:
            break
        for name, call in providers.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return times


class Case(NamedTuple):
    """One row of the tables: several providers of the same result on the same inputs.

    build() makes the inputs and returns a call for each of `providers` that can run here.
    """

    name: str
    providers: tuple[str, ...]
    build: Callable[[], dict[str, Call]]
    moved: int  # bytes that any implementation must at least move
    elements: int | None = None
    flops: int | None = None


def versus(
    ours: Callable[..., Any], eager: Callable[..., Any], *args: Any, peers: dict[str, Callable[..., Any]] | None = None
) -> dict[str, Call]:
    """Ours on both backends, eager PyTorch, torch.compile of the same eager code, and peers, all called with `args`."""
    function = compiled(eager)
    providers: dict[str, Call] = {
        "native": on("native", lambda: ours(*args)),
        "torch": on("torch", lambda: ours(*args)),
        "eager": lambda: eager(*args),
        "compile": lambda: function(*args),
    }
    if torch.cuda.is_available():
        providers["triton"] = on("triton", lambda: ours(*args))
    for name, peer in (peers or {}).items():
        providers[name] = partial(peer, *args)
    return providers


def on(backend: str, call: Call) -> Call:
    """The call, run on one of our backends."""

    def run() -> Any:
        with rf.use_backend(backend):
            return call()

    return run


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile as a user would ask for it, for fixed shapes."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


def backward(loss: Callable[[], Tensor], leaves: list[Tensor]) -> Call:
    """Forward, and backward to the leaves."""

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        loss().sum().backward()

    return run


# ------------------------------------------------------------------------------------------- what users write today


def eager_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """logits (N, V), targets (N,) -> (N,) float32."""
    return torch.log_softmax(logits.float(), dim=-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def eager_logprobs_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logp = torch.log_softmax(logits.float(), dim=-1)
    return logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(-1)


def eager_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """Reverse KL of (N, V) and (N, V) -> (N,)."""
    logp, logq = (torch.log_softmax(x.float(), dim=-1) for x in (logits, ref_logits))
    return (logp.exp() * (logp - logq)).sum(-1)


def eager_gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """The loop over tokens of every PPO trainer, (B, T) each; masked tokens are carried over."""
    last = torch.zeros_like(rewards[:, 0])
    next_values = torch.zeros_like(last)
    reversed_advantages = []
    real = mask.to(rewards.dtype)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_values - values[:, t]
        advantage = delta + gamma * lam * last
        next_values = values[:, t] * real[:, t] + (1 - real[:, t]) * next_values
        last = advantage * real[:, t] + (1 - real[:, t]) * last
        reversed_advantages.append(last)
    advantages = torch.stack(reversed_advantages[::-1], dim=1)
    return advantages, advantages + values


def eager_vtrace(rewards: Tensor, values: Tensor, log_ratios: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """IMPALA's loop with both limits and lambda 1, (B, T) each; masked tokens are carried over."""
    gain = next_values = torch.zeros_like(rewards[:, 0])
    ratios, real = log_ratios.exp().clamp(max=1), mask.to(rewards.dtype)
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for t in reversed(range(rewards.shape[1])):
        now = ratios[:, t] * (rewards[:, t] + next_values - values[:, t] + gain)
        advantages[:, t], returns[:, t] = now * real[:, t], (now + values[:, t]) * real[:, t]
        next_values = values[:, t] * real[:, t] + (1 - real[:, t]) * next_values
        gain = now * real[:, t] + (1 - real[:, t]) * gain
    return advantages, returns


def eager_ppo_advantages(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, mask: Tensor, kl_coef: float = 0.1
) -> tuple[Tensor, Tensor]:
    """KL penalty, score on the last token, GAE loop, whitening."""
    rewards = -kl_coef * (logprobs - ref_logprobs) * mask
    last = (mask * torch.arange(mask.shape[1])).argmax(-1)
    rewards[torch.arange(len(last)), last] += scores
    advantages, returns = eager_gae(rewards, values, mask)
    real = advantages[mask]
    return (advantages - real.mean()) * torch.rsqrt(real.var() + 1e-8) * mask, returns


def eager_linear_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """hidden (N, H), weight (V, H): the whole logits at once."""
    return eager_logprobs(torch.nn.functional.linear(hidden, weight), targets)
