# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a step of every phase, measured, beside what `rlhf-fast plan` says of the same settings.

    python benchmarks/plan_memory.py                                  every phase in both dtypes
    python benchmarks/plan_memory.py --phases dpo --dtypes bfloat16   some of them
    python benchmarks/plan_memory.py --model DIR                      another model than SmolLM2-135M

The table of docs/scaling.md has the rows in bfloat16 of sft, reward, dpo and grpo. PPO and float32 were not run to the
end yet, and nobody measured how long everything takes.

Each row is a process of its own, which first runs the phase once on a tiny model, so that libraries, threads and code
are there. Measured is how far resident memory rises above that during the second step, when the optimizer has its
moments; Linux. The allocator gives freed memory back at once (a normal run keeps it, for speed), and the sampler's
packed copy of the weights, which only CPUs have, is off. The plan's figure is its largest moment, without libraries and
without the share to spare.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from memory import resident

from rlhf_fast.report import plan

SEQUENCES = 8  # of a step
TOKENS = {"grpo": (112, 16), "ppo": (112, 16)}  # of a prompt and a completion, where completions are sampled
PHASES = ("sft", "reward", "dpo", "grpo", "ppo")
LORA_RANK = 16
GB = 1e9


class Case(NamedTuple):
    """Settings of one row."""

    dtype: str
    micro: int
    lora_rank: int


class Enough(BaseException):
    """The second step is done; no Exception, after which a run is saved."""

    def __init__(self, peak: int) -> None:
        super().__init__()
        self.peak = peak  # of resident memory during that step


def configured(phase: str, case: Case, folder: Path, model: str) -> tuple[Any, Any]:
    """The phase's function, and its options on data with equally many tokens in every row."""
    prompt, new = TOKENS.get(phase, (64, 64))
    from rlhf_fast import trainer

    word = lambda i: f" {'abcdefgh'[i % 8]}"  # noqa: E731
    prompts = ["The" + "".join(word(i + k) for k in range(prompt - 1)) for i in range(SEQUENCES)]
    ends = ["".join(word(2 * i + k) for k in range(new - 1)) for i in range(2)]
    rows: list[dict[str, Any]] = [{"prompt": p, "completion": ends[0]} for p in prompts]
    if phase in ("reward", "dpo"):
        rows = [{"prompt": p, "chosen": ends[0], "rejected": ends[1]} for p in prompts]
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "model": model, "output_dir": str(folder / "run"), "dtype": case.dtype, "micro_batch_size": case.micro,
        "lora_rank": case.lora_rank, "max_length": 512, "save_minutes": 0.0, "save_last": False,
    }  # fmt: skip
    if phase == "sft":
        options = {"train_file": str(file), "batch_size": SEQUENCES, "max_steps": 4}
        return trainer.train_sft, trainer.SFTConfig(**common, **options)
    if phase == "reward":
        options = {"feedback_file": str(file), "batch_size": SEQUENCES // 2, "eval_fraction": 0.0, "epochs": 4}
        return trainer.train_reward, trainer.RewardConfig(**common, **options)
    options = {"objective": phase, "prompts_file": str(file), "max_steps": 4, "max_new_tokens": new}
    options |= {"dpo": {"prompts_per_step": SEQUENCES // 2}}.get(
        phase,
        {"prompts_per_step": SEQUENCES // 4, "samples_per_prompt": 4, "reward_functions": (f"{__file__}:longest",)},
    )
    if phase == "ppo":
        reward = folder / "reward"
        if not reward.exists():
            save_reward_model(model, case.dtype, reward)
        options |= {"reward_functions": (), "reward_model": str(reward), "score_clip": 0.0}
    return trainer.train_ppo, trainer.PPOConfig(**common, **options)


def longest(prompt: str, completions: list[str]) -> list[float]:
    """A reward."""
    return [float(len(set(text.split()))) for text in completions]


def save_reward_model(model: str, dtype: str, folder: Path) -> None:
    """A reward model that has learned nothing."""
    from rlhf_fast.models.loading import load_reward_model, load_tokenizer

    tokenizer = load_tokenizer(model)
    load_reward_model(model, dtype, tokenizer, new_head=True).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def second_step(function: Any, config: Any) -> int:
    """Run two steps; the peak of resident memory during the second."""
    from rlhf_fast.run.folder import RunFolder

    config.overwrite = True
    run, steps = RunFolder.create(config.output_dir, overwrite=True), 0

    def logged(metrics: dict[str, float], step: int) -> None:
        nonlocal steps
        steps += bool(metrics.keys() & {"loss", "policy/grad_norm"})
        if steps == 1:
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        if steps == 2:
            raise Enough(resident("VmHWM"))

    run.log = logged  # type: ignore[method-assign]
    try:
        function(config, run)
    except Enough as enough:
        return enough.peak
    raise RuntimeError("fewer than two steps")


def measure(phase: str, cases: list[Case], model: str) -> None:
    """Print the bytes of each case above what was there before it."""
    from rlhf_fast.models.tiny import write_tiny_model
    from rlhf_fast.rollout import builtin
    from rlhf_fast.trainer.reward import train as reward
    from rlhf_fast.trainer.rl import ppo
    from rlhf_fast.trainer.sft import train as sft

    for module in (sft, reward, ppo):
        module.tune_process = lambda: None  # it would keep freed memory
    builtin.WORTH_PACKING = 2**31
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tiny_model(folder / "tiny", ["The", *"abcdefgh"], context=1024)
        for case in cases:
            for place in (str(folder / "tiny"), model):
                (folder / case.dtype / Path(place).name).mkdir(parents=True, exist_ok=True)
                job = configured(phase, case, folder / case.dtype / Path(place).name, place)
                gc.collect()
                before = resident("VmRSS")
                peak = second_step(*job)
            print(json.dumps([*case, peak - before]), flush=True)


def planned(phase: str, case: Case, model: str) -> plan.Memory:
    """The plan of the same settings, moment by moment."""
    prompt, new = TOKENS.get(phase, (64, 64))
    options = plan.PlanOptions(
        model=model, phase=phase if phase in ("sft", "reward") else "ppo", dtype=case.dtype,
        batch_size=SEQUENCES, prompt_length=prompt + (new if phase == "sft" else 0), max_new_tokens=new,
        lora_rank=case.lora_rank,
    )  # fmt: skip
    if options.phase == "ppo":
        options.objective = phase
        options.reward_model = "" if phase == "ppo" else "none"
    models = plan.load(options)
    moments = plan.memory(options, models, plan.Setup(lora_rank=case.lora_rank, micro_batch=case.micro), "cpu")
    return {name: {part: x for part, x in parts.items() if part != "libraries"} for name, parts in moments.items()}


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help='"smollm2", or a folder')
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--micro-batches", nargs="+", type=int, default=[2, 8])
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    cases = [Case(dtype, micro, 0) for dtype in options.dtypes for micro in options.micro_batches]
    cases.append(Case(options.dtypes[0], options.micro_batches[-1], LORA_RANK))
    if options.job:
        return measure(options.job, cases, options.model)
    print("| phase | dtype | micro-batch | plan, GB | measured, GB | plan / measured |\n| --- | --- |" + " ---: |" * 4)
    for phase in options.phases:
        command = [sys.executable, __file__, *sys.argv[1:], "--job", phase]
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as job:
            assert job.stdout is not None
            for line in filter(lambda line: line.startswith("["), job.stdout):
                *settings, found = json.loads(line)
                case = Case(*settings)
                show(phase, case, max(sum(x.values()) for x in planned(phase, case, options.model).values()), found)
        if job.returncode:
            sys.exit(job.returncode)


def show(phase: str, case: Case, wanted: float, found: float) -> None:
    """Print a row."""
    name = phase.upper() if phase != "reward" else "reward model"
    name += f", LoRA of rank {case.lora_rank}" if case.lora_rank else ""
    cells = [name, case.dtype, str(case.micro), f"{wanted / GB:.2f}", f"{found / GB:.2f}", f"{wanted / found:.2f}"]
    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
