# SPDX-License-Identifier: Apache-2.0
"""The ratios that the README quotes, measured side by side: `python benchmarks/ratios.py [--only gae] [--threads 2]`.

Every provider runs once per round, medians over the rounds, so a busy minute slows all of them alike. Shapes where we
lose are in the list on purpose and stay in it. Writes benchmarks/results/<machine>.json and the same table as Markdown.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import (
    Call,
    backward,
    bandwidth,
    compiled,
    eager_gae,
    eager_kl,
    eager_logprobs,
    eager_logprobs_entropy,
    eager_ppo_advantages,
    interleaved,
    machine,
    machine_slug,
    on,
)
from linear_providers import Problem, Shape, logprob_providers, policy_providers, sampled_providers
from torch import Tensor

import rlhf_fast as rf

RESULTS = Path(__file__).parent / "results"


class Case(NamedTuple):
    """One row of the table. `moved`: bytes that any implementation must at least move."""

    name: str
    moved: int
    providers: dict[str, Call]


def versus(
    ours: Callable[..., Any], eager: Callable[..., Any], *args: Any, compile_too: bool = True
) -> dict[str, Call]:
    """Ours on both backends against eager PyTorch and torch.compile of the same eager code."""
    providers = {"native": on("native", lambda: ours(*args)), "torch": on("torch", lambda: ours(*args))}
    providers["eager"] = lambda: eager(*args)
    if compile_too:
        function = compiled(eager)
        providers["compile"] = lambda: function(*args)
    return providers


def row_inputs(rows: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    logits = torch.randn(rows, width).mul_(3).to(dtype)
    return logits, torch.randint(width, (rows,))


def logprob_cases() -> Iterator[Case]:
    for rows, width, dtype in [
        (1024, 49152, torch.float32),
        (1024, 49152, torch.bfloat16),
        (256, 1000, torch.float32),
        (16, 128, torch.float32),
    ]:
        logits, targets = row_inputs(rows, width, dtype)
        name = f"token_logprobs forward {rows} x {width} {str(dtype).removeprefix('torch.')}"
        yield Case(name, logits.nbytes, versus(rf.token_logprobs, eager_logprobs, logits, targets))
    logits, targets = row_inputs(512, 49152)
    providers = versus(rf.token_stats, eager_logprobs_entropy, logits, targets)
    providers["native, log-probs alone"] = on("native", lambda: rf.token_logprobs(logits, targets))
    yield Case("token_stats (logprobs, entropy) forward 512 x 49152 float32", logits.nbytes, providers)
    yield backward_case(512, 49152)


def backward_case(rows: int, width: int) -> Case:
    """The logits are an intermediate result, as a head's are; ours may overwrite them, eager has no such option.

    The in-place gradient leaves garbage in `logits` for the next round, of the same size: the time does not change.
    """
    logits, targets = row_inputs(rows, width)
    logits.requires_grad_()
    function = compiled(eager_logprobs)
    ours = lambda inplace: rf.token_logprobs(logits, targets, inplace_backward=inplace)  # noqa: E731
    providers = {
        "native": on("native", backward(lambda: ours(False), [logits])),
        "native, in place": on("native", backward(lambda: ours(True), [logits])),
        "eager": backward(lambda: eager_logprobs(logits, targets), [logits]),
        "compile": backward(lambda: function(logits, targets), [logits]),
    }
    return Case(f"token_logprobs forward + backward {rows} x {width} float32", 3 * logits.nbytes, providers)


def kl_cases() -> Iterator[Case]:
    for rows, width in [(512, 49152), (64, 1000)]:
        logits, ref_logits = (torch.randn(rows, width) for _ in range(2))
        name = f"token_kl reverse forward {rows} x {width} float32"
        yield Case(name, 2 * logits.nbytes, versus(rf.token_kl, eager_kl, logits, ref_logits))
    logprobs, ref_logprobs = (-torch.rand(64, 1024) for _ in range(2))
    eager = lambda x, y: x - y  # noqa: E731
    yield Case(
        "approx_kl k1 64 x 1024 float32", 3 * logprobs.nbytes, versus(rf.approx_kl, eager, logprobs, ref_logprobs)
    )


def gae_cases() -> Iterator[Case]:
    for rows, length in [(64, 1024), (256, 1024), (16, 8192), (8, 32)]:
        rewards, values = torch.randn(rows, length), torch.randn(rows, length)
        mask = torch.rand(rows, length) < 0.9
        ours = lambda r, v, m: rf.gae(r, v, mask=m)  # noqa: E731
        # torch.compile would unroll the loop over tokens: minutes of compilation.
        providers = versus(ours, eager_gae, rewards, values, mask, compile_too=False)
        yield Case(f"gae {rows} x {length} float32", 17 * rewards.numel(), providers)
    shape = (64, 1024)
    logprobs, ref_logprobs, values = (torch.randn(shape) for _ in range(3))
    scores, mask = torch.randn(64), torch.rand(shape) < 0.9
    ours_ppo = lambda *x: rf.ppo_advantages(*x, kl_coef=0.1)  # noqa: E731
    providers = versus(ours_ppo, eager_ppo_advantages, scores, logprobs, ref_logprobs, values, mask, compile_too=False)
    yield Case("ppo_advantages 64 x 1024 float32", 29 * logprobs.numel(), providers)


def linear_cases() -> Iterator[Case]:
    """The head of SmolLM2-135M. Read `bare matmul` for the limit; a second line has the head frozen."""
    shape = Shape()
    sizes = " x ".join(map(str, shape))
    for dtype, share in itertools.product((torch.float32, torch.bfloat16), (1.0, 0.5)):
        size = (
            f"{shape.rows} x {shape.hidden} x {shape.vocabulary} {str(dtype).removeprefix('torch.')}, {share:.0%} real"
        )
        problem, frozen = Problem(shape, dtype, share), Problem(shape, dtype, share, frozen_head=True)
        for direction in ("forward", "forward + backward"):
            providers = logprob_providers(problem, direction)
            del providers["torch"]
            if direction != "forward":
                providers["native, budget 0"] = logprob_providers(problem, direction, 0)["native"]
                providers["native, frozen head"] = logprob_providers(frozen, direction)["native"]
            yield Case(f"linear_token_logprobs {direction} {size}", problem.bytes, providers)
        yield Case(f"linear_policy_loss forward + backward {size}", problem.bytes, policy_providers(problem))
    problem = Problem(shape, torch.float32, 1.0)
    for kept in (32, 512):
        name = (
            f"linear_sampled_logprobs forward, {kept} kept, {shape.rows} x {shape.hidden} x {shape.vocabulary} float32"
        )
        yield Case(name, problem.bytes, sampled_providers(problem, kept))


FAMILIES: dict[str, Callable[[], Iterator[Case]]] = {
    "logprob": logprob_cases,
    "kl": kl_cases,
    "gae": gae_cases,
    "linear": linear_cases,
}


def measure(case: Case, limits: dict[str, float], rounds: int) -> dict[str, Any]:
    times = interleaved(case.providers, rounds)
    rate = case.moved / times["native"]
    return {
        "case": case.name,
        "seconds": times,
        "times_faster_than_eager": times["eager"] / times["native"],
        "times_faster_than_compile": times["compile"] / times["native"] if "compile" in times else None,
        "bytes": case.moved,
        "gigabytes_per_second": rate / 1e9,
        "share_of_read_bandwidth": rate / limits["read"],
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as a table; every figure in the documents is printed by this function."""
    facts, limits = report["machine"], report["limits"]
    lines = [
        f"{facts['cpu']}, {facts['threads']} threads, {facts['served_by']}, PyTorch {facts['torch']}; measured limits: "
        f"read {limits['read'] / 1e9:.1f} GB/s, copy {limits['copy'] / 1e9:.1f} GB/s. {report['date']}.",
        "",
        "| op, shape | native | eager | x eager | x compile | GB/s | of read limit | other |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in report["rows"]:
        times = row["seconds"]
        others = {k: v for k, v in times.items() if k not in ("native", "eager", "compile")}
        cells = [
            row["case"],
            duration(times["native"]),
            duration(times["eager"]),
            f"{row['times_faster_than_eager']:.2f}",
            "-" if row["times_faster_than_compile"] is None else f"{row['times_faster_than_compile']:.2f}",
            f"{row['gigabytes_per_second']:.2f}",
            f"{row['share_of_read_bandwidth']:.0%}",
            ", ".join(f"{k} {duration(v)}" for k, v in others.items()),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def duration(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} us"
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(FAMILIES), help="one family")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON and the table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    limits = bandwidth()
    rows = []
    for name, cases in FAMILIES.items():
        for case in cases() if options.only in (None, name) else ():
            rows.append(measure(case, limits, options.rounds))
            print(f"{case.name}: {rows[-1]['times_faster_than_eager']:.2f} x eager", flush=True)
    report = {"machine": machine(), "limits": limits, "date": time.strftime("%Y-%m-%d"), "rows": rows}
    print("\n" + markdown(report))
    if options.only is None:  # a part would overwrite the whole
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"{machine_slug()}.json").write_text(json.dumps(report, indent=1) + "\n")
        (options.out / f"{machine_slug()}.md").write_text(markdown(report))


if __name__ == "__main__":
    main()
