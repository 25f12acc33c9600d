# SPDX-License-Identifier: Apache-2.0
"""The row and token ops on a GPU against their limits and against PyTorch: writes gpu.json and gpu.md.

`python benchmarks/gpu/bench.py --out benchmarks/results`; part of `make gpu-check`. Peers are timed where they can be
imported. A case that fails is written down with its error and the rest goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import compiled, eager_kl, eager_linear_logprobs, eager_logprobs, eager_logprobs_entropy  # noqa: E402
from gpu import peers  # noqa: E402
from gpu.timing import Call, as_graph, limits, milliseconds, rotating  # noqa: E402

import rlhf_fast as rf  # noqa: E402

SMALL = 50  # launches of a case that takes microseconds
ALL_OUTPUTS = ("logprobs", "entropy", "logsumexp", "sum_sq_probs", "argmax")
BF16 = torch.bfloat16


class Case(NamedTuple):
    """`moved`: bytes that any implementation must move. `target`: milliseconds we want on an H100, if any. `flops`:
    bf16 operations, where they take longer than the bytes.

    Small ones have `launches` > 1: that many calls in a row, and then as many in a CUDA graph.
    """

    name: str
    moved: int
    providers: dict[str, Call]
    target: float | None = None
    launches: int = 1
    flops: int = 0


def on(backend: str, call: Call) -> Call:
    def run(i: int) -> object:
        with rf.use_backend(backend):
            return call(i)

    return run


def ours(call: Call) -> dict[str, Call]:
    return {backend: on(backend, call) for backend in ("native", "triton")}


def copies_of(nbytes: int) -> int:
    """So many that none is in L2 when its turn comes again."""
    return max(2, -(-(2**27) // nbytes))


def logits(rows: int, width: int) -> Callable[[int], tuple[torch.Tensor, ...]]:
    def make() -> tuple[torch.Tensor, ...]:
        return (
            torch.randn(rows, width, device="cuda", dtype=BF16),
            torch.randint(width, (rows,), device="cuda"),
        )

    return rotating(make, copies_of(2 * rows * width))


def logprob_cases() -> Iterator[Case]:
    shapes = ((8192, 151936, 0.83, 1), (8192, 32000, None, 1), (64, 262144, None, 20), (64, 32000, None, SMALL))
    for rows, width, target, launches in shapes:
        inputs = logits(rows, width)
        moved = rows * width * 2
        providers = ours(lambda i, inputs=inputs: rf.token_stats(*inputs(i), outputs=ALL_OUTPUTS))
        if rows * width < 2**29:  # eager makes float32 copies
            providers["eager"] = lambda i, inputs=inputs: eager_logprobs_entropy(*inputs(i))
        function = compiled(eager_logprobs_entropy)
        providers["compile"] = lambda i, inputs=inputs, function=function: function(*inputs(i))
        yield Case(f"token_stats forward, all outputs, {rows} x {width} bf16", moved, providers, target, launches)
        logprobs = ours(lambda i, inputs=inputs: rf.token_logprobs(*inputs(i)))
        logprobs |= peers.of_logprobs(inputs)
        function = compiled(eager_logprobs)
        logprobs["compile"] = lambda i, inputs=inputs, function=function: function(*inputs(i))
        yield Case(f"token_logprobs forward {rows} x {width} bf16", moved, logprobs, None, launches)
    yield backward_case(8192, 151936, 1.75)
    yield backward_case(8192, 32000, None)
    yield backward_case(64, 32000, None, SMALL)


def backward_case(rows: int, width: int, target: float | None, launches: int = 1) -> Case:
    """The gradient alone, in place. It leaves garbage in the logits for the next round, which takes the same time."""
    inputs = logits(rows, width)

    def backward(backend: str) -> Call:
        saved = []
        for i in range(copies_of(2 * rows * width)):
            x, targets = inputs(i)
            ops = torch.ops.rlhf_fast if backend == "native" else torch.ops.rlhf_fast_triton
            out = ops.token_stats(x, targets, None, None, 1.0, 1.0, 0.0, -1, 3, False)
            saved.append((x, targets, out[1], out[5]))
        ones = torch.ones(rows, device="cuda")

        def run(i: int) -> object:
            x, targets, entropy, parts = saved[i % len(saved)]
            return ops.token_stats_backward_(
                ones, ones, None, x, targets, None, None, entropy, parts, 1.0, 1.0, 0.0, -1
            )

        return run

    providers = {backend: backward(backend) for backend in ("native", "triton")}
    name = f"token_stats backward, in place, {rows} x {width} bf16"
    return Case(name, 4 * rows * width, providers, target, launches)


def kl_cases() -> Iterator[Case]:
    rows, width = 4096, 131072
    ones = torch.full((rows,), 1e-3, device="cuda")
    pair = rotating(lambda: tuple(torch.randn(rows, width, device="cuda", dtype=BF16) for _ in range(2)), 2)
    function = compiled(eager_kl)
    for kind, target in (("reverse", 0.80), ("forward", 0.80), ("jsd", None), ("tv", None)):
        providers = ours(lambda i, kind=kind: rf.token_kl(*pair(i), kind=kind))
        if kind == "reverse":
            providers["compile"] = lambda i: function(*pair(i))
            providers |= peers.of_reverse_kl(pair)
        yield Case(f"token_kl {kind} forward {rows} x {width} bf16", 4 * rows * width, providers, target)

    def step(loss: Callable[..., torch.Tensor]) -> Call:
        def run(i: int) -> object:
            x, y = pair(i)
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad((loss(leaf, y) * ones).sum(), leaf)

        return run

    providers = ours(lambda i: rf.token_kl_and_grad(*pair(i), ones))
    providers |= {f"{name}, two steps": call for name, call in ours(step(rf.token_kl)).items()}
    providers["compile"] = step(compiled(eager_kl))
    yield Case(f"token_kl reverse, loss and gradient, {rows} x {width} bf16", 6 * rows * width, providers, 2.0)
    yield from small_kl_cases()


def small_kl_cases() -> Iterator[Case]:
    rows, width = 64, 32000
    pair = rotating(lambda: tuple(torch.randn(rows, width, device="cuda", dtype=BF16) for _ in range(2)), 16)
    ones = torch.ones(rows, device="cuda")
    for kind in ("reverse", "jsd"):
        providers = ours(lambda i, kind=kind: rf.token_kl(*pair(i), kind=kind))
        yield Case(f"token_kl {kind} forward {rows} x {width} bf16", 4 * rows * width, providers, None, SMALL)
    providers = ours(lambda i: rf.token_kl_and_grad(*pair(i), ones))
    name = f"token_kl reverse, loss and gradient, {rows} x {width} bf16"
    yield Case(name, 6 * rows * width, providers, None, SMALL)
    for tokens in ((64, 1024), (512, 8192)):
        sampled = rotating(lambda s=tokens: tuple(torch.randn(s, device="cuda") for _ in range(2)), 2)
        providers = ours(lambda i, sampled=sampled: rf.approx_kl(*sampled(i), estimator="k3"))
        count = tokens[0] * tokens[1]
        yield Case(f"approx_kl k3 {tokens[0]} x {tokens[1]} fp32", 12 * count, providers, None, SMALL)


def gae_cases() -> Iterator[Case]:
    shapes = ((256, 131072, 0.25, 1), (8192, 2048, 0.13, 1), (256, 8192, 0.025, 20), (64, 1024, 0.010, 50))
    for rows, length, target, launches in shapes:
        # With few copies the small ones stay in L2, as they do in a trainer, where they have just been made.
        inputs = rotating(lambda s=(rows, length): tuple(torch.randn(s, device="cuda") for _ in range(2)), 2)
        call = lambda i, inputs=inputs: rf.gae(*inputs(i), lam=0.95)  # noqa: E731
        moved = 16 * rows * length
        yield Case(f"gae {rows} x {length} fp32", moved, ours(call) | peers.of_gae(inputs), target, launches)
    for rows, length in ((256, 131072), (8192, 2048)):
        three = rotating(lambda s=(rows, length): tuple(torch.randn(s, device="cuda") for _ in range(3)), 2)
        providers = ours(lambda i, three=three: rf.vtrace(*three(i))) | peers.of_vtrace(three)
        yield Case(f"vtrace {rows} x {length} fp32", 20 * rows * length, providers, None, 1)
    rows, length = 8192, 2048
    four = rotating(lambda: tuple(torch.randn(rows, length, device="cuda") for _ in range(4)), 2)
    providers = ours(lambda i: rf.retrace(*four(i), lam=0.95)) | peers.of_retrace(four)
    yield Case(f"retrace {rows} x {length} fp32", 20 * rows * length, providers, None, 1)
    row = rotating(lambda: tuple(torch.randn(1, 131072, device="cuda") for _ in range(2)), 2)
    yield Case("gae 1 x 131072 fp32", 16 * 131072, ours(lambda i: rf.gae(*row(i))), None, 20)
    for rows, length in ((64, 1024), (512, 8192)):
        shape = (rows, length)
        scores, mask = torch.randn(rows, device="cuda"), torch.rand(shape, device="cuda") < 0.9
        three = rotating(lambda s=shape: tuple(torch.randn(s, device="cuda") for _ in range(3)), 2)
        call = lambda i, s=scores, m=mask, t=three: rf.ppo_advantages(s, *t(i), m, kl_coef=0.1)  # noqa: E731
        yield Case(f"ppo_advantages {rows} x {length} fp32", 38 * rows * length, ours(call), None, 20)
        call = lambda i, m=mask, t=three: rf.masked_whiten(t(i)[0], m)  # noqa: E731
        yield Case(f"masked_whiten {rows} x {length} fp32", 14 * rows * length, ours(call), None, 20)


def linear_cases() -> Iterator[Case]:
    """Log-probs from hidden states. The limit is that of the products: one forward, and two more for the gradients."""
    rows, width, vocabulary = 8192, 4096, 131072
    hidden, weight = (torch.randn(n, width, device="cuda").mul_(0.05).to(BF16) for n in (rows, vocabulary))
    targets = torch.randint(vocabulary, (rows,), device="cuda")
    inputs = hidden.requires_grad_(), weight.requires_grad_(), targets
    functions: dict[str, Call] = {"native": lambda i: rf.linear_token_logprobs(*inputs)}
    functions["eager"] = lambda i: eager_linear_logprobs(*inputs)
    functions |= peers.of_linear_logprobs(*inputs)

    def step(logprobs: Call) -> Call:
        return lambda i: torch.autograd.grad(logprobs(i).sum(), inputs[:2])  # type: ignore[attr-defined]

    product, name = 2 * rows * width * vocabulary, f"{rows} x {width} x {vocabulary} bf16"
    moved = 2 * (rows + vocabulary) * width
    forward = {key: torch.no_grad()(call) for key, call in functions.items()}
    both = {key: step(call) for key, call in functions.items()}
    forward["native"], both["native"] = on("native", forward["native"]), on("native", both["native"])
    yield Case(f"linear_token_logprobs forward {name}", moved, forward, None, 1, product)
    yield Case(f"linear_token_logprobs forward + backward {name}", 3 * moved, both, None, 1, 3 * product)


FAMILIES = (logprob_cases, kl_cases, gae_cases, linear_cases)


def measure(case: Case, limits: dict[str, float]) -> dict[str, Any]:
    errors: dict[str, str] = {}
    working: dict[str, Call] = {}
    for name, call in case.providers.items():
        try:
            call(0)
            torch.cuda.synchronize()
            working[name] = call
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"[:300]
    times = milliseconds(working, launches=case.launches) if working else {}
    graphs = {}
    if case.launches > 1:
        for name, call in working.items():
            try:
                graphs[name] = as_graph(call, case.launches)
            except Exception as error:
                errors[f"{name}, in a graph"] = f"{type(error).__name__}: {error}"[:300]
    in_graph = milliseconds(graphs) if graphs else {}
    return {
        "case": case.name,
        "ms": {name: t.kernel for name, t in times.items()},  # the GPU's own work
        "call_ms": {name: t.call for name, t in times.items()},  # from an idle GPU: Python and the launch count
        "graph_ms": {name: t.kernel / case.launches for name, t in in_graph.items()},  # one of many in a CUDA graph
        "limit_ms": 1e3 * max(case.moved / limits["copy_bytes_per_s"], case.flops / limits["bf16_flop_per_s"]),
        "target_ms": case.target,
        "errors": errors,
    }


def _cell(ms: float | None) -> str:
    return "-" if ms is None else f"{ms:.3f}"


def markdown(report: dict[str, Any]) -> str:
    facts = report["machine"]
    lines = [
        f"{facts['gpu']}, PyTorch {facts['torch']}, Triton {facts['triton']}; measured: copy "
        f"{report['limits']['copy_bytes_per_s'] / 1e12:.2f} TB/s, bf16 product "
        f"{report['limits']['bf16_flop_per_s'] / 1e12:.0f} TFLOP/s. {report['date']}.",
        "Times are the GPU's own; `a call` starts on an idle GPU, so that the host's time counts; `in a graph` is one",
        "of many calls in a CUDA graph, for shapes that take less than their launch.",
        "",
        "| op, shape | limit, ms | target, ms | native, ms | of limit | a call, ms | in a graph, ms | triton, ms "
        "| in a graph, ms | others, ms |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in report["rows"]:
        ms = dict(row["ms"])
        first = next((name for name in ms if name.startswith("native")), None)
        second = next((name for name in ms if name.startswith("triton")), None)
        call = row["call_ms"].get(first)
        graph, triton_graph = (row["graph_ms"].get(name) for name in (first, second))
        native, triton = ms.pop(first, None) if first else None, ms.pop(second, None) if second else None
        others = ", ".join([f"{k} {v:.3f}" for k, v in ms.items()] + [f"{k}: {v}" for k, v in row["errors"].items()])
        cells = [
            row["case"],
            f"{row['limit_ms']:.3f}",
            _cell(row["target_ms"]),
            _cell(native),
            "-" if native is None else f"{row['limit_ms'] / native:.0%}",
            _cell(call),
            _cell(graph),
            _cell(triton),
            _cell(triton_graph),
            others.replace("|", "/").replace("\n", " "),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "results")
    parser.add_argument("--seconds", type=float, default=240, help="start no new case after this long")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    torch.manual_seed(0)
    triton = peers.peer("triton", "__version__")
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton}
    report: dict[str, Any] = {"machine": machine, "limits": limits(), "date": time.strftime("%Y-%m-%d"), "rows": []}
    for family in FAMILIES:
        try:
            for case in family():
                if time.monotonic() - begin > options.seconds:
                    nothing: dict[str, Any] = {"ms": {}, "call_ms": {}, "graph_ms": {}, "limit_ms": 0.0}
                    nothing |= {"target_ms": None, "errors": {"-": "no time left"}}
                    report["rows"].append({"case": case.name, **nothing})
                    continue
                report["rows"].append(measure(case, report["limits"]))
                print(case.name, report["rows"][-1]["ms"], report["rows"][-1]["errors"], flush=True)
        except Exception:
            traceback.print_exc()
        torch.cuda.empty_cache()
        (options.out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
        (options.out / "gpu.md").write_text(markdown(report))
    print("\n" + markdown(report))


if __name__ == "__main__":
    main()
