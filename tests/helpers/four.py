# SPDX-License-Identifier: Apache-2.0
"""Four processes on one machine: `python -m helpers.four FOLDER [STEPS]` in tests/, some minutes.

First every phase and every objective, with models copied and sharded and with a stand-in for the engine, and three with
models sharded over two groups of two, by one process and by four (gloo): weights and metrics must agree to rounding.
Then STEPS (300) steps of PPO on sharded models, which saves every tenth: memory and open files of each process must not
grow.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from helpers import phases
from helpers.vllm_stub import Stub
from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.models.loading import load_causal_lm
from rlhf_fast.rollout.builtin import generate
from rlhf_fast.run.folder import RunFolder
from rlhf_fast.trainer.rl.objectives import OBJECTIVES
from rlhf_fast.trainer.rl.ppo import train_ppo

PROCESSES = 4
WEIGHTS, METRICS = 3e-3, 5e-4  # of what learning moved; relative
GROWTH = 8.0  # MiB between the second and the last sixth of the steps


def jobs(data: Path) -> dict[str, Any]:
    """Those of phases.py, and each objective that they leave out."""
    found = {name: job for name, job in phases.jobs(data).items() if not name.endswith("4bit")}
    known = {getattr(job, "objective", "") for job in found.values()}
    ppo = found["ppo"]
    found |= {name: replace(ppo, objective=name) for name in OBJECTIVES if name not in known}
    found["engine"] = replace(ppo, objective="grpo", sampler="vllm-server")
    cut = [name for name, job in found.items() if hasattr(job, "fsdp") and name not in ("collect", "sft-packed")]
    cuts = {f"{name}-fsdp": replace(found[name], fsdp=True, micro_batch_size=4) for name in cut}
    groups = {f"{name}-groups": replace(cuts[f"{name}-fsdp"], fsdp_size=2) for name in ("sft", "reward", "ppo")}
    return found | cuts | groups


def alone(name: str) -> str:
    """The job of one process that it is compared with."""
    return name.removesuffix("-fsdp").removesuffix("-groups")


def do(data: Path, folder: Path, url: str, names: list[str]) -> None:
    for name, job in jobs(data).items():
        if name in names:
            if name.startswith("engine"):
                run = RunFolder.create(folder / name)
                train_ppo(replace(job, engine_url=(url,), output_dir=str(run.path)), run)
                run.close()
            else:
                phases.run(job, folder / name)
            if ranks().main:
                print(f"{name} done", flush=True)


def launch(*words: str) -> None:
    """Four processes of this file."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([*command, "-m", "helpers.four", *words], check=True, env=environment)


def with_stub(data: Path, work: Any) -> None:
    """Call `work(url)` with a server that has a model of its own."""
    with Stub(load_causal_lm(str(data / "model"), "float32")) as stub:
        work(stub.url)


def difference(data: Path, one: Path, four: Path) -> tuple[float, float]:
    """Largest of the weights, as a share of what learning moved, and of the metrics, relative."""
    weights = 0.0
    first, second = (load_file(folder / "model" / "model.safetensors") for folder in (one, four))
    start = load_file(data / ("reward" if one.name.startswith("reward") else "model") / "model.safetensors")
    moved = max(float((first[key] - start[key]).abs().max()) for key in first)
    weights = max(float((first[key] - second[key]).abs().max()) for key in first) / moved
    rows = zip(phases.metrics(one), phases.metrics(four), strict=True)
    pairs = [(a[name], b[name]) for a, b in rows for name in a if a[name] is not None]
    return weights, max(abs(a - b) / max(abs(a), 0.1) for a, b in pairs)


def compare(data: Path, folder: Path) -> int:
    """Print a line a job; returns how many differ."""
    wrong = 0
    for name in jobs(data):
        one, four = folder / "one" / alone(name), folder / "four" / name
        if name == "collect":
            same = (one / "feedback.jsonl").read_bytes() == (four / "feedback.jsonl").read_bytes()
            print(f"{name:18} feedback.jsonl {'the same' if same else 'differs'}")
            wrong += not same
            continue
        weights, metrics = difference(data, one, four)
        bad = not (weights <= WEIGHTS and metrics <= METRICS)
        wrong += bad
        print(f"{name:18} weights {weights:.1e} of their movement, metrics {metrics:.1e}{' WRONG' if bad else ''}")
    return wrong


def soak(data: Path, folder: Path, steps: int) -> None:
    """PPO on sharded models; each process notes its resident memory and open files at every step."""
    job = phases.jobs(data)["ppo"]
    job = replace(
        job, fsdp=True, max_steps=steps, save_steps=10, max_new_tokens=4, samples_per_prompt=1, epochs=1,
        eval_prompts_file=None, output_dir=str(folder),
    )  # fmt: skip
    run = RunFolder.create(folder)

    def sampler(*args: Any, **options: Any) -> Any:
        status = Path("/proc/self/status").read_text()
        resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
        with (folder / f"memory-{ranks().index}.jsonl").open("a") as file:
            file.write(json.dumps([resident / 1024, len(os.listdir("/proc/self/fd"))]) + "\n")
        return generate(*args, **options)

    train_ppo(job, run, sampler)
    run.close()


def grown(folder: Path) -> int:
    """Print how memory and open files went; returns how many processes grew."""
    wrong = 0
    for rank in range(PROCESSES):
        rows = [json.loads(line) for line in (folder / f"memory-{rank}.jsonl").read_text().splitlines()]
        sixth = len(rows) // 6
        memory, files = zip(*rows[sixth:], strict=True)
        early, late = (statistics.median(part) for part in (memory[:sixth], memory[-sixth:]))
        line = statistics.linear_regression(range(len(memory)), memory)
        rest = [y - line.intercept - line.slope * x for x, y in enumerate(memory)]
        error = statistics.pstdev(rest) / (statistics.pstdev(range(len(memory))) * math.sqrt(len(memory)))
        bad = late - early > GROWTH or statistics.median(files[-sixth:]) > max(files[:sixth])
        wrong += bad
        print(
            f"process {rank}: {early:.1f} MiB, {late:.1f} at the end of {len(rows)} steps; slope "
            f"{1024 * line.slope:+.2f} +- {1024 * error:.2f} KiB a step; open files {min(files)} to {max(files)}, "
            f"{files[-1]} at the end{' WRONG' if bad else ''}"
        )
    return wrong


def main(folder: Path, steps: int) -> int:
    """Everything; the exit code is the number of jobs and processes that are wrong."""
    shutil.rmtree(folder, ignore_errors=True)
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "tiny"))
    import make_data

    data = folder / "data"
    make_data.make_tiny(data)
    phases.prepare(data)
    names = list(jobs(data))
    with_stub(data, lambda url: do(data, folder / "one", url, [name for name in names if alone(name) == name]))
    engines = [name for name in names if name.startswith("engine")]
    rest = [name for name in names if name not in engines]
    launch("jobs", str(data), str(folder / "four"), "-", *rest)
    for name in engines:
        with_stub(data, lambda url, name=name: launch("jobs", str(data), str(folder / "four"), url, name))
    wrong = compare(data, folder)
    launch("soak", str(data), str(folder / "soak"), str(steps))
    return wrong + grown(folder / "soak")


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    words = sys.argv[1:]
    if words[0] == "jobs":
        do(Path(words[1]), Path(words[2]), words[3], words[4:])
    elif words[0] == "soak":
        soak(Path(words[1]), Path(words[2]), int(words[3]))
    else:
        sys.exit(main(Path(words[0]), int(words[1]) if words[1:] else 300))
