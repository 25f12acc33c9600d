# SPDX-License-Identifier: Apache-2.0
"""Plain PyTorch (`RLHF_FAST_BACKEND=torch`) against eager: what serves MPS, float64 and platforms without kernels.

Time by pytest as in the other files. `python benchmarks/bench_fallback.py [PART_OF_A_NAME ...]` prints a table of both
ratios to eager, of time and (on Linux, each call in a process of its own) of peak extra memory; all of it takes under
four minutes on two cores.
"""

from __future__ import annotations

import multiprocessing
import statistics
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
from memory import resident
from torch import Tensor

import rlhf_fast as rf

WIDTH, TOKENS = 49152, 1024
PROVIDERS = ("torch", "eager")
CLEAR_REFS = Path("/proc/self/clear_refs")
Build = Callable[[], dict[str, Call]]


def both(ours: Callable[..., Any], eager: Callable[..., Any], *args: Any) -> dict[str, Call]:
    return {"torch": on("torch", partial(ours, *args)), "eager": partial(eager, *args)}


def both_ways(ours: Callable[..., Any], eager: Callable[..., Any], leaf: Tensor, *args: Any) -> dict[str, Call]:
    """Forward and backward to the leaf."""
    leaf.requires_grad_()
    return {
        "torch": on("torch", backward(lambda: ours(leaf, *args), [leaf])),
        "eager": backward(lambda: eager(leaf, *args), [leaf]),
    }


WAYS = {"forward": both, "forward + backward": both_ways}


def logits_of(rows: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tokens_of(rows: int, *seeds: int) -> list[Tensor]:
    return [torch.randn(rows, TOKENS, generator=torch.Generator().manual_seed(seed)) for seed in seeds]


def mask_of(rows: int) -> Tensor:
    return torch.rand(rows, TOKENS, generator=torch.Generator().manual_seed(9)) < 0.9


# ------------------------------------------------------------------------------------------- ours, and what users write


def stats_sum(logits: Tensor, targets: Tensor) -> Tensor:
    stats = rf.token_stats(logits, targets)
    assert stats.logprobs is not None and stats.entropy is not None
    return stats.logprobs + stats.entropy


def eager_stats_sum(logits: Tensor, targets: Tensor) -> Tensor:
    logprobs, entropy = eager_logprobs_entropy(logits, targets)
    return logprobs + entropy


def all_stats(logits: Tensor, targets: Tensor) -> Any:
    return rf.token_stats(logits, targets, outputs=("logprobs", "entropy", "logsumexp", "sum_sq_probs", "argmax"))


def eager_all_stats(logits: Tensor, targets: Tensor) -> Any:
    logp = torch.log_softmax(logits.float(), dim=-1)
    p = logp.exp()
    entropy, squares = -(p * logp).sum(-1), p.square().sum(-1)
    return logp.gather(-1, targets.unsqueeze(-1)), entropy, logits.float().logsumexp(-1), squares, logits.argmax(-1)


def eager_forward_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    logp, logq = (torch.log_softmax(x.float(), dim=-1) for x in (logits, ref_logits))
    return (logq.exp() * (logq - logp)).sum(-1)


def eager_jsd(logits: Tensor, ref_logits: Tensor) -> Tensor:
    logp, logq = (torch.log_softmax(x.float(), dim=-1) for x in (logits, ref_logits))
    p, q = logp.exp(), logq.exp()
    logm = (0.5 * (p + q)).log()
    return 0.5 * (q * (logq - logm)).sum(-1) + 0.5 * (p * (logp - logm)).sum(-1)


def eager_tv(logits: Tensor, ref_logits: Tensor) -> Tensor:
    p, q = (torch.softmax(x.float(), dim=-1) for x in (logits, ref_logits))
    return 0.5 * (p - q).abs().sum(-1)


EAGER_KL = {"reverse": eager_kl, "forward": eager_forward_kl, "jsd": eager_jsd, "tv": eager_tv}


def eager_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    d = ref_logprobs - logprobs
    return d.exp() - 1 - d


EAGER_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "k1": lambda logprobs, ref: logprobs - ref,
    "k2": lambda logprobs, ref: 0.5 * (logprobs - ref).square(),
    "k3": eager_k3,
    "abs": lambda logprobs, ref: (logprobs - ref).abs(),
}


def eager_importance_k3(logprobs: Tensor, ref_logprobs: Tensor, ratio: Tensor, mask: Tensor) -> Tensor:
    return ratio * eager_k3(logprobs, ref_logprobs) * mask


def eager_straight_through_k3(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    k2 = 0.5 * (logprobs - ref_logprobs).square()
    return (k2 + (eager_k3(logprobs, ref_logprobs) - k2).detach()) * mask


def eager_whiten(values: Tensor, mask: Tensor) -> Tensor:
    real = values[mask]
    return (values - real.mean()) * torch.rsqrt(real.var() + 1e-8) * mask


# ------------------------------------------------------------------------------------------- the calls by name


def logits_calls(rows: int) -> dict[str, Build]:
    """The ops on (rows, WIDTH) logits."""
    targets = torch.randint(WIDTH, (rows,), generator=torch.Generator().manual_seed(1))
    calls: dict[str, Build] = {}
    for dtype in (torch.float32, torch.bfloat16):
        name, logits = str(dtype).removeprefix("torch."), partial(logits_of, rows, dtype)
        for way, run in WAYS.items():
            calls[f"token_logprobs {way} {name}"] = lambda run=run, logits=logits: run(
                rf.token_logprobs, eager_logprobs, logits(), targets
            )
            calls[f"token_stats {way} {name}"] = lambda run=run, logits=logits: run(
                stats_sum, eager_stats_sum, logits(), targets
            )
            for kind, eager in EAGER_KL.items():
                ours = partial(rf.token_kl, kind=kind)
                calls[f"token_kl {kind} {way} {name}"] = lambda run=run, logits=logits, ours=ours, eager=eager: run(
                    ours, eager, logits(), logits(seed=2)
                )

    def and_grad() -> dict[str, Call]:
        leaf, ref, weights = logits_of(rows, torch.float32), logits_of(rows, torch.float32, 2), torch.ones(rows)
        calls = both_ways(rf.token_kl, eager_kl, leaf, ref)
        return {**calls, "torch": on("torch", lambda: rf.token_kl_and_grad(leaf.detach(), ref, weights))}

    every_output = lambda: both(all_stats, eager_all_stats, logits_of(rows, torch.float32), targets)  # noqa: E731
    return {**calls, "token_kl_and_grad float32": and_grad, "token_stats all outputs forward float32": every_output}


def token_calls(rows: int) -> dict[str, Build]:
    """The ops on (rows, TOKENS)."""
    masked_gae: Callable[..., Any] = lambda rewards, values, mask: rf.gae(rewards, values, mask=mask)  # noqa: E731
    calls: dict[str, Build] = {
        "gae": lambda: both(masked_gae, eager_gae, *tokens_of(rows, 0, 1), mask_of(rows)),
        "ppo_advantages": lambda: both(
            partial(rf.ppo_advantages, kl_coef=0.1), eager_ppo_advantages,
            torch.ones(rows), *tokens_of(rows, 0, 1, 2), mask_of(rows),
        ),
        "masked_whiten": lambda: both(rf.masked_whiten, eager_whiten, *tokens_of(rows, 0), mask_of(rows)),
    }  # fmt: skip
    for way, run in WAYS.items():
        for name, eager in EAGER_ESTIMATORS.items():
            ours = partial(rf.approx_kl, estimator=name)
            calls[f"approx_kl {name} {way}"] = lambda run=run, ours=ours, eager=eager: run(
                ours, eager, *tokens_of(rows, 0, 1)
            )
        calls[f"approx_kl k3 with ratio and mask {way}"] = lambda run=run: run(
            lambda x, y, ratio, mask: rf.approx_kl(x, y, estimator="k3", importance_ratio=ratio, mask=mask),
            eager_importance_k3, *tokens_of(rows, 0, 1, 2), mask_of(rows),
        )  # fmt: skip
        calls[f"approx_kl k3 straight-through with mask {way}"] = lambda run=run: run(
            lambda x, y, mask: rf.approx_kl(x, y, estimator="k3", gradient="straight_through", mask=mask),
            eager_straight_through_k3, *tokens_of(rows, 0, 1), mask_of(rows),
        )  # fmt: skip
    return calls


def named_calls(rows: int = 256, token_rows: int = 64) -> dict[str, Build]:
    return {**logits_calls(rows), **token_calls(token_rows)}


CASES = [
    Case(f"on plain PyTorch: {name}", PROVIDERS, build, (256 * WIDTH if name.startswith("token_") else 64 * TOKENS) * 4)
    for name, build in named_calls().items()
]


def test_fallback(compare: Callable[[Case, str], None], case: Case, provider: str) -> None:
    compare(case, provider)


# ------------------------------------------------------------------------------------------- the table


def extra_bytes(name: str, provider: str) -> int:
    """Rise of the peak resident memory in one call."""
    named_calls(2, 2)[name]()[provider]()  # threads, libraries and code are resident after this
    call = named_calls()[name]()[provider]
    before = resident("VmRSS")
    CLEAR_REFS.write_text("5")
    call()
    return max(0, resident("VmHWM") - before)


def in_a_process(name: str, provider: str) -> int:
    """`extra_bytes` in a child forked before this process has called any op."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    child = fork.Process(target=lambda: sender.send(extra_bytes(name, provider)))
    child.start()
    sender.close()
    result = receiver.recv()
    child.join()
    return int(result)


def main(parts: list[str]) -> None:
    calls = {name: build for name, build in named_calls().items() if not parts or any(x in name for x in parts)}
    extra = {name: [in_a_process(name, p) for p in PROVIDERS] for name in calls} if CLEAR_REFS.exists() else {}
    print("| op | eager | time of ours / eager's | eager's extra memory | ours / eager's |")
    print("| --- | --- | --- | --- | --- |")
    for name, build in calls.items():
        seconds = {p: statistics.median(x) for p, x in interleaved(build(), budget=1.0).items()}
        ours, eager = extra.get(name, (0, 0))
        memory = f"{eager / 2**20:.1f} MiB | {ours / max(eager, 1):.2f}" if eager else "- | -"
        ratio = seconds["torch"] / seconds["eager"]
        print(f"| {name} | {seconds['eager'] * 1e3:.2f} ms | {ratio:.2f} | {memory} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
