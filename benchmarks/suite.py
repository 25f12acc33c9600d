# SPDX-License-Identifier: Apache-2.0
"""Everything in one command: `python benchmarks/suite.py` measures, draws, and writes the documents again.

Leaves benchmarks/results/<machine>.json with its Markdown tables and PNGs, and renews README.md and docs/benchmarks.md
from it. `--quick` and `--only` print and write to a folder of their own: a part must not stand for the whole.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accuracy
import machine
import memory
import plots
import report as report_
import scaling
import torch

HERE = Path(__file__).resolve().parent


def pytest_benchmark(files: list[Path], options: list[str]) -> list[dict[str, Any]]:
    """Runs the files with pytest-benchmark in a process of their own; its records. A failed case is told, not fatal."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "benchmarks.json"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-only"]
        command += ["--benchmark-columns=median,rounds", "--benchmark-group-by=group", f"--benchmark-json={output}"]
        finished = subprocess.run([*command, *options, *map(str, files)], cwd=HERE.parent)
        if finished.returncode:
            print(f"pytest ended with {finished.returncode}: cases that failed are missing below", file=sys.stderr)
        text = output.read_text() if output.exists() else ""
        return json.loads(text)["benchmarks"] if text else []


def rows_of(records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One row per case: seconds of every provider."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if "bytes_moved" in record["extra_info"]:
            groups.setdefault(record["group"], []).append(record)
    for group, members in groups.items():
        seconds = {r["extra_info"]["provider"]: r["stats"]["median"] for r in members}
        if "native" not in seconds:
            print(f"{group}: the native backend was not measured", file=sys.stderr)
            continue
        ours = next(r["extra_info"] for r in members if r["extra_info"]["provider"] == "native")
        more = {k: v for k, v in ours.items() if k not in ("provider", "bytes_moved", "limits")}
        yield {"case": group, "seconds": seconds, "bytes": ours["bytes_moved"], **more}


def speed(options: list[str]) -> list[dict[str, Any]]:
    files = [path for path in sorted(HERE.glob("bench_*.py")) if path.stem not in ("bench_fallback", "bench_ppo_step")]
    return list(rows_of(pytest_benchmark(files, options)))


def ppo_step(options: list[str]) -> dict[str, Any]:
    """By variant: seconds of the parts, and bytes of the update and of its head; empty without transformers."""
    records = pytest_benchmark([HERE / "bench_ppo_step.py"], options)
    found = {r["extra_info"]["provider"]: r["extra_info"] for r in records}
    if not {"eager", "native"} <= set(found):
        return {}
    keys = ("parts", "extra_bytes")
    return {"shape": records[0]["group"], **{key: {n: x[key] for n, x in found.items()} for key in keys}}


PARTS: dict[str, Callable[[list[str]], Any]] = {
    "speed": speed,
    "accuracy": lambda _: list(accuracy.measure()),
    "memory": lambda _: list(memory.measure()),
    "scaling": lambda _: list(scaling.measure()),
    "ppo_step": ppo_step,
}


def measured(parts: tuple[str, ...], options: list[str]) -> dict[str, Any]:
    """The report. The parts run one after the other; nothing else should run meanwhile."""
    report: dict[str, Any] = {
        "machine": machine.machine(),
        "state": machine.state(),
        "limits": machine.limits(),
        "peers": machine.peers(),
        "date": time.strftime("%Y-%m-%d"),
        "rows": [],
    }
    begin = time.perf_counter()
    for part in parts:
        print(f"{time.perf_counter() - begin:.0f} s: {part} ...", flush=True)
        try:
            report["rows" if part == "speed" else part] = PARTS[part](options)
        except Exception as error:  # told, and the other parts go on
            traceback.print_exc()
            report.setdefault("failed", {})[part] = f"{type(error).__name__}: {error}"
    report["minutes"] = round((time.perf_counter() - begin) / 60, 1)
    report["state_at_the_end"] = machine.state()
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, action="append", help="a part; may be given several times")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="folder for the results; default benchmarks/results")
    parser.add_argument("pytest_options", nargs="*", help="after --, for pytest, such as -k gae")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    whole = options.only is None and not options.pytest_options
    folder = options.out or (report_.RESULTS if whole else HERE.parent / "build" / "benchmarks")
    folder.mkdir(parents=True, exist_ok=True)
    report = measured(tuple(options.only or PARTS), options.pytest_options)
    name = machine.machine_slug()
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / f"{name}.md").write_text(report_.results(name, report))
    plots.draw(name, report, folder)
    print(report_.results(name, report))
    print(f"{report['minutes']} minutes; results in {folder}")
    if "failed" in report:
        sys.exit(f"these parts failed: {report['failed']}; the documents were left as they are")
    if folder == report_.RESULTS:
        for path, text in report_.documents().items():
            path.write_text(text)


if __name__ == "__main__":
    main()
