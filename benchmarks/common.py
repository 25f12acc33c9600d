# SPDX-License-Identifier: Apache-2.0
"""What every benchmark shares: the machine, its measured limits, and the PyTorch code that our ops replace.

Baselines are written as a careful user would: rows flattened and contiguous, masked rows left out where that is part of
the comparison. A baseline that loses by a blunder proves nothing.
"""

from __future__ import annotations

import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rlhf_fast as rf

Call = Callable[[], Any]
PROVIDERS = ("eager", "compile", "torch", "native")

# ------------------------------------------------------------------------------------------- the machine


def machine() -> dict[str, str | int]:
    """Processor, threads and versions: what a figure means nothing without."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"model name\s*:\s*(.+)", info.read_text())
        cpu = found.group(1).strip() if found else cpu
    return {
        "cpu": cpu,
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rlhf_fast": rf.__version__,
        "served_by": rf.backends()[0].backend,
        "python": platform.python_version(),
    }


def machine_slug() -> str:
    """The machine as a file name, such as amd-epyc-2-threads."""
    facts = machine()
    return re.sub(r"[^a-z0-9]+", "-", f"{facts['cpu']} {facts['threads']} threads".lower()).strip("-")


def seconds(call: Call, rounds: int = 7) -> float:
    """Median wall time of one call, after a warm-up."""
    call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def bandwidth(mebibytes: int = 256) -> dict[str, float]:
    """Bytes per second that this machine reads (best of three reductions) and copies (reads + writes), right now."""
    x = torch.ones(mebibytes * 2**18)
    y = torch.empty_like(x)
    size = x.numel() * 4
    reads = (lambda: x.sum(), lambda: x.amax(), lambda: torch.dot(x, x))
    return {
        "read": size / min(seconds(read) for read in reads),
        "copy": 2 * size / seconds(lambda: y.copy_(x)),
    }


# ------------------------------------------------------------------------------------------- timing side by side


def interleaved(providers: dict[str, Call], rounds: int = 15, budget: float = 20.0) -> dict[str, float]:
    """Median seconds of each provider, one call of each per round, so that a slow minute slows them all.

    Calls under 2 ms are repeated within a round. Stops early (never under 3 rounds) when `budget` seconds are spent.
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
    return {name: statistics.median(values) for name, values in times.items()}


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
