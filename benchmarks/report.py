# SPDX-License-Identifier: Apache-2.0
"""Results as documents: every figure in README and docs/benchmarks.md is printed here, from the committed file.

`python benchmarks/report.py` writes the documents again from benchmarks/results; tests/test_benchmark_docs.py checks
that they are what this file prints.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "benchmarks.md"
README = ROOT / "README.md"

# README's choice: label, case. Those that the file does not hold are left out.
README_ROWS = [
    ("`token_logprobs` forward, 1024 x 49152 float32", "token_logprobs forward 1024 x 49152 float32"),
    ("the same, bfloat16 logits", "token_logprobs forward 1024 x 49152 bfloat16"),
    (
        "`token_stats`, log-probs and entropy, 512 x 49152",
        "token_stats (logprobs, entropy) forward 512 x 49152 float32",
    ),
    ("`token_kl` reverse, 512 x 49152", "token_kl reverse forward 512 x 49152 float32"),
    (
        "`linear_token_logprobs` forward and backward, 1024 x 576 x 49152",
        "linear_token_logprobs forward + backward 1024 x 576 x 49152 float32 100% real",
    ),
    (
        "`linear_token_logprobs` forward and backward, 256 x 576 x 49152",
        "linear_token_logprobs forward + backward 256 x 576 x 49152 float32 100% real",
    ),
    ("`token_logprobs` forward, 16 x 128", "token_logprobs forward 16 x 128 float32"),
]
# README's choice of errors: label, then op, dtype and inputs of the accuracy table.
README_ERRORS = [
    ("log-probability", "token_logprobs", "float32", "ordinary"),
    ("log-probability, logits offset by 1e4", "token_logprobs", "float32", "offset 1e4"),
    ("log-probability", "token_logprobs", "bfloat16", "ordinary"),
    ("entropy", "entropy", "bfloat16", "ordinary"),
    ("entropy, some logits -inf", "entropy", "float32", "with -inf"),
    ("exact KL, some logits -inf", "token_kl reverse", "float32", "with -inf"),
    ("gradient of log-probabilities", "token_logprobs, gradient", "bfloat16", "ordinary"),
    ("advantages (GAE)", "gae (no mask)", "bfloat16", "ordinary"),
]
README_PROVIDERS = {"native": "ours", "eager": "eager", "eager, own dtype": "eager in the logits' dtype", "TRL": "TRL"}
OURS = ("native", "torch", "triton")


def load() -> tuple[str, dict[str, Any]]:
    """The newest committed results of a CPU: their name and content."""
    found = [(path.stem, json.loads(path.read_text())) for path in sorted(RESULTS.glob("*.json"))]
    whole = [(name, report) for name, report in found if "threads" in report.get("machine", {})]
    return max(whole, key=lambda pair: pair[1]["date"])


def duration(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} us"
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"


def table(header: list[str], rows: list[list[str]], numbers: range) -> str:
    """Markdown; columns in `numbers` are right-aligned."""
    rule = ["---:" if i in numbers else "---" for i in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)) + "\n"


def ratio(row: dict[str, Any], provider: str, unit: str = "") -> str:
    """How many times faster the native backend is, or a dash."""
    times = row["seconds"]
    if provider not in times:
        return "-"
    return f"{times[provider] / times['native']:.{1 if unit else 2}f}{unit}"


def heading(report: dict[str, Any]) -> str:
    facts, limits = report["machine"], report["limits"]
    matmul = f", matmul {limits['matmul'] / 1e9:.0f} GFLOP/s" if "matmul" in limits else ""
    state = report.get("state")
    quiet = f" Load average at the start: {state['load_average'][0]:.2f}." if state else ""
    versions = report.get("peers", {})
    here = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    missing = ", ".join(name for name, version in versions.items() if not version)
    peers = f" Peers: {here or 'none'}{f'; not installed: {missing}' if missing else ''}." if versions else ""
    return (
        f"{facts['cpu']}, {facts['threads']} threads, {facts['served_by']}, PyTorch {facts['torch']}; measured limits: "
        f"read {limits['read'] / 1e9:.1f} GB/s, copy {limits['copy'] / 1e9:.1f} GB/s{matmul}. "
        f"{report['date']}.{quiet}{peers}\n"
    )


IN_CACHE = " in cache, "  # in the name of a case that says what a thread does, not what a call costs beside others


def speed(report: dict[str, Any]) -> str:
    rows = []
    for row in report["rows"]:
        if IN_CACHE in row["case"]:
            continue
        times = row["seconds"]
        others = [f"{k} {duration(v)}" for k, v in times.items() if k not in ("native", "eager", "compile")]
        rate = row["bytes"] / times["native"]
        cells = [row["case"], duration(times["native"]), duration(times["eager"]) if "eager" in times else "-"]
        cells += [ratio(row, "eager"), ratio(row, "compile"), f"{rate / 1e9:.2f}"]
        rows.append([*cells, f"{rate / report['limits']['read']:.0%}", ", ".join(others)])
    header = ["op, shape", "native", "eager", "x eager", "x compile", "GB/s", "of read limit", "other"]
    return table(header, rows, range(1, 7))


def in_cache(report: dict[str, Any]) -> str:
    """One thread over and over on the same inputs, whole calls: elements a second."""
    rows = [
        [row["case"], duration(row["seconds"]["native"]), f"{row['million_elements_per_second'] / 1e3:.2f}"]
        for row in report["rows"]
        if IN_CACHE in row["case"]
    ]
    return table(["op, shape", "native", "G elements/s"], rows, range(1, 3)) if rows else ""


def losses(report: dict[str, Any]) -> str:
    """Wherever anything that is not ours was faster than the native backend."""
    rows = []
    for row in report["rows"]:
        times = row["seconds"]
        faster = {k: t for k, t in times.items() if t < times["native"] and k.split(",")[0] not in OURS}
        faster.pop("bare matmul", None)  # a part of the work, not a rival
        for name, t in sorted(faster.items(), key=lambda pair: pair[1]):
            rows.append([row["case"], duration(times["native"]), name, duration(t), f"{times['native'] / t:.2f}"])
    if not rows:
        return "None in this run.\n"
    return table(["op, shape", "native", "faster", "its time", "times faster"], rows, range(1, 2))


def memory(report: dict[str, Any]) -> str:
    cells: dict[tuple[str, int], dict[str, int]] = {}
    for row in report["memory"]:
        cells.setdefault((row["op"], row["rows"]), {})[row["provider"]] = row["extra_bytes"]
    names = {"token_logprobs": "token_logprobs, in place", "linear_token_logprobs": "linear_token_logprobs"}
    rows = [
        [names.get(op, op), str(n), f"{x['eager'] / 2**20:.0f}", f"{x['native'] / 2**20:.0f}"]
        for (op, n), x in cells.items()
    ]
    return table(["op, forward + backward, V = 49152, float32", "rows", "eager, MiB", "ours, MiB"], rows, range(1, 4))


def accuracy(report: dict[str, Any]) -> str:
    names: list[str] = []
    for row in report["accuracy"]:
        names += [name for name in row["errors"] if name not in names]
    shown = lambda x: "-" if x is None else x if isinstance(x, str) else f"{x:.1e}"  # noqa: E731
    rows = [
        [r["op"], r["dtype"], r["inputs"], *(shown(r["errors"].get(name)) for name in names)]
        for r in report["accuracy"]
    ]
    return table(["op", "dtype", "inputs", *names], rows, range(3, 3 + len(names)))


VARIANTS = {"full logits": "full logits", "eager": "eager, compacted", "native": "ours"}


def ppo_step(report: dict[str, Any]) -> str:
    step = report["ppo_step"]
    parts = step.get("parts", step)  # before memory was measured, the parts alone stood here
    shown = [name for name in VARIANTS if name in parts]
    totals = {name: sum(parts[name].values()) for name in shown}
    rows = []
    for part in parts["native"]:
        times = [(parts[name][part], totals[name]) for name in shown]
        rows.append([part, *(cell for t, total in times for cell in (duration(t), f"{t / total:.1%}"))])
    rows.append(["whole step", *(cell for name in shown for cell in (duration(totals[name]), ""))])
    for label in step.get("extra_bytes", {}).get("native", {}):
        sizes = (step["extra_bytes"][name][label] / 2**20 for name in shown)
        rows.append([label, *(cell for size in sizes for cell in (f"{size:.0f} MiB", ""))])
    header = ["part", *(cell for name in shown for cell in (VARIANTS[name], "share"))]
    shape = f"{step['shape']}.\n\n" if "shape" in step else ""
    return shape + table(header, rows, range(1, len(header)))


def plots(name: str, report: dict[str, Any]) -> str:
    drawn = [key for key in ("scaling", "memory") if report.get(key)]
    return "\n".join(f"![{key}](../benchmarks/results/{name}-{key}.png)" for key in drawn) + "\n"


SECTIONS = {
    "memory": ("Peak extra memory", memory),
    "ppo_step": ("A whole PPO step", ppo_step),
    "accuracy": ("Accuracy: largest error against float64", accuracy),
}


def results(name: str, report: dict[str, Any]) -> str:
    """All tables; sections that the file does not hold are left out."""
    parts = [heading(report), speed(report), "### Where we lose\n", losses(report)]
    if figures := in_cache(report):
        parts += ["### One thread, data in cache\n", figures]
    for key, (title, show) in SECTIONS.items():
        if report.get(key):
            parts += [f"### {title}\n", show(report)]
    if report.get("scaling"):
        parts += ["### Scaling\n", plots(name, report)]
    return "\n".join(parts)


def readme_errors(report: dict[str, Any]) -> str:
    """The largest errors against float64, for the outputs that README names."""
    errors = {(row["op"], row["dtype"], row["inputs"]): row["errors"] for row in report["accuracy"]}
    rows = []
    for label, *key in README_ERRORS:
        if tuple(key) in errors:
            found = (errors[tuple(key)].get(name) for name in README_PROVIDERS)
            shown = ("-" if x is None else x if isinstance(x, str) else f"{x:.1e}" for x in found)
            rows.append([label, key[1], *shown])
    return table(["largest error", "inputs", *README_PROVIDERS.values()], rows, range(2, 6))


def readme_results(report: dict[str, Any]) -> str:
    """What README shows: exactness first, then memory, where we lose, and speed."""
    parts = [
        ("Largest error against float64, on random inputs; NaN where the result is not a number:", readme_errors),
        ("Peak memory beyond the inputs, forward and backward:", memory),
        ("Shapes at which something else is faster:", losses),
        ("Speed against PyTorch, a figure under 1 being a loss:", readme_speed),
    ]
    return "\n".join(f"{title}\n\n{show(report)}" for title, show in parts)


def readme_speed(report: dict[str, Any]) -> str:
    rows = {row["case"]: row for row in report["rows"]}
    wanted = [(label, rows[case]) for label, case in README_ROWS if case in rows]
    cells = [[label, ratio(row, "eager", " x"), ratio(row, "compile", " x")] for label, row in wanted]
    return table(["op, shape", "against eager PyTorch", "against torch.compile"], cells, range(1, 3))


def between_marks(document: str, text: str) -> str:
    """The document with what stands between its two marks replaced."""
    marks = r"(<!-- begin: benchmarks/report\.py -->\n).*(<!-- end -->)"
    replaced, count = re.subn(marks, lambda m: m[1] + text + m[2], document, flags=re.DOTALL)
    assert count == 1, "the marks of benchmarks/report.py are missing"
    return replaced


def documents() -> dict[Path, str]:
    """What README and docs/benchmarks.md should hold."""
    name, report = load()
    return {
        DOCUMENT: between_marks(DOCUMENT.read_text(), results(name, report)),
        README: between_marks(README.read_text(), readme_results(report)),
    }


if __name__ == "__main__":
    for path, text in documents().items():
        path.write_text(text)
        print(f"wrote {path.relative_to(ROOT)}")
