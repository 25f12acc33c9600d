# SPDX-License-Identifier: Apache-2.0
"""Plain PyTorch (`RLHF_FAST_BACKEND=torch`) against eager: what serves MPS, float64 and platforms without kernels.

Time by pytest as in the other files. `python benchmarks/bench_fallback.py` prints both ratios to eager, of time and of
peak extra memory (each from a process of its own, on Linux), and takes names of cases.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import (
    Call,
    Case,
    backward,
    eager_gae,
    eager_kl,
    eager_logprobs,
    eager_logprobs_entropy,
    eager_ppo_advantages,
    interleaved,
    on,
)
from torch import Tensor

import rlhf_fast as rf

WIDTH, TOKENS = 49152, 1024
PROVIDERS = ("torch", "eager")


def both(ours: Callable[..., Any], eager: Callable[..., Any], *args: Any) -> dict[str, Call]:
    return {"torch": on("torch", partial(ours, *args)), "eager": partial(eager, *args)}


def both_ways(ours: Callable[..., Any], eager: Callable[..., Any], leaf: Tensor, *args: Any) -> dict[str, Call]:
    """Forward and backward to the leaf."""
    leaf.requires_grad_()
    return {
        "torch": on("torch", backward(lambda: ours(leaf, *args), [leaf])),
        "eager": backward(lambda: eager(leaf, *args), [leaf]),
    }


def logits_of(rows: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tokens_of(rows: int, *seeds: int) -> list[Tensor]:
    return [torch.randn(rows, TOKENS, generator=torch.Generator().manual_seed(seed)) for seed in seeds]


def mask_of(rows: int) -> Tensor:
    return torch.rand(rows, TOKENS, generator=torch.Generator().manual_seed(9)) < 0.9


def stats_sum(logits: Tensor, targets: Tensor) -> Tensor:
    stats = rf.token_stats(logits, targets)
    assert stats.logprobs is not None and stats.entropy is not None
    return stats.logprobs + stats.entropy


def eager_stats_sum(logits: Tensor, targets: Tensor) -> Tensor:
    logprobs, entropy = eager_logprobs_entropy(logits, targets)
    return logprobs + entropy


def eager_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    d = ref_logprobs - logprobs
    return d.exp() - 1 - d


def eager_whiten(values: Tensor, mask: Tensor) -> Tensor:
    real = values[mask]
    return (values - real.mean()) * torch.rsqrt(real.var() + 1e-8) * mask


def row_calls(rows: int) -> dict[str, Callable[[], dict[str, Call]]]:
    """Builders by name of the ops on (rows, WIDTH) logits."""
    targets = torch.randint(WIDTH, (rows,), generator=torch.Generator().manual_seed(1))
    calls: dict[str, Callable[[], dict[str, Call]]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        name, logits = str(dtype).removeprefix("torch."), partial(logits_of, rows, dtype)
        for way, run in (("forward", both), ("forward + backward", both_ways)):
            calls[f"token_logprobs {way} {name}"] = lambda run=run, logits=logits: run(
                rf.token_logprobs, eager_logprobs, logits(), targets
            )
            calls[f"token_stats {way} {name}"] = lambda run=run, logits=logits: run(
                stats_sum, eager_stats_sum, logits(), targets
            )
            calls[f"token_kl {way} {name}"] = lambda run=run, logits=logits: run(
                rf.token_kl, eager_kl, logits(), logits(seed=2)
            )

    def and_grad() -> dict[str, Call]:
        leaf, ref, weights = logits_of(rows, torch.float32), logits_of(rows, torch.float32, 2), torch.ones(rows)
        calls = both_ways(rf.token_kl, eager_kl, leaf, ref)
        return {**calls, "torch": on("torch", lambda: rf.token_kl_and_grad(leaf.detach(), ref, weights))}

    return {**calls, "token_kl_and_grad float32": and_grad}


def token_calls(rows: int) -> dict[str, Callable[[], dict[str, Call]]]:
    """Builders by name of the ops on (rows, TOKENS)."""
    masked_gae: Callable[..., Any] = lambda rewards, values, mask: rf.gae(rewards, values, mask=mask)  # noqa: E731
    advantages = partial(rf.ppo_advantages, kl_coef=0.1)
    k3 = partial(rf.approx_kl, estimator="k3")
    scores = torch.ones(rows)
    return {
        "approx_kl k3 forward": lambda: both(k3, eager_k3, *tokens_of(rows, 0, 1)),
        "approx_kl k3 forward + backward": lambda: both_ways(k3, eager_k3, *tokens_of(rows, 0, 1)),
        "gae": lambda: both(masked_gae, eager_gae, *tokens_of(rows, 0, 1), mask_of(rows)),
        "ppo_advantages": lambda: both(
            advantages, eager_ppo_advantages, scores, *tokens_of(rows, 0, 1, 2), mask_of(rows)
        ),
        "masked_whiten": lambda: both(rf.masked_whiten, eager_whiten, *tokens_of(rows, 0), mask_of(rows)),
    }


def named_calls(rows: int, token_rows: int) -> dict[str, Callable[[], dict[str, Call]]]:
    return {**row_calls(rows), **token_calls(token_rows)}


CASES = [
    Case(f"on plain PyTorch: {name}", PROVIDERS, build, (256 * WIDTH if "token_" in name else 64 * TOKENS) * 4)
    for name, build in named_calls(256, 64).items()
]


def test_fallback(compare: Callable[[Case, str], None], case: Case, provider: str) -> None:
    compare(case, provider)


def extra_bytes(name: str, provider: str) -> int:
    """Rise of the peak resident memory in one call."""
    from memory import resident

    named_calls(2, 2)[name]()[provider]()  # threads, libraries and code are resident after this
    call = named_calls(256, 64)[name]()[provider]
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    call()
    return max(0, resident("VmHWM") - before)


def main(names: list[str]) -> None:
    if len(names) == 3 and names[0] == "--memory":
        return print(extra_bytes(*names[1:]))
    for name, build in named_calls(256, 64).items():
        if names and not any(x in name for x in names):
            continue
        seconds = {p: statistics.median(x) for p, x in interleaved(build(), budget=4.0).items()}
        line = f"{name}: time {seconds['torch'] / seconds['eager']:.2f} of eager's {seconds['eager'] * 1e3:.2f} ms"
        if Path("/proc/self/clear_refs").exists():
            command = [sys.executable, __file__, "--memory", name]
            extra = {p: int(subprocess.check_output([*command, p])) for p in PROVIDERS}
            line += f"; memory {extra['torch'] / 2**20:.1f} MiB, eager's {extra['eager'] / 2**20:.1f}"
        print(line, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
