# SPDX-License-Identifier: Apache-2.0
"""Steps of every phase beside TRL's: SFT packed and not, reward model, DPO, GRPO after SFT and at full length, PPO.

    make measure-trainer ARGS=--write                  or
    python benchmarks/trainer_phases.py --write        the table of docs/trainer-measurements.md: 15 idle minutes
    python benchmarks/trainer_phases.py --quick        one step of each, once: does it work?
    python benchmarks/trainer_phases.py --model DIR --rounds 1        another model than SmolLM2-135M

Both sides do the same work on the same data: optimizer steps of 16 demonstrations, 8 pairs of 109 + 2 x 41 tokens (near
the means of HH-RLHF's harmless part), 4 prompts x 4 samples of at most 48 tokens. Each runs in processes of its own, in
turns, whose peak memory is that of the whole process. A step is from one to the next, everything between included; the
first, a warm-up, is left out. Each side has the fastest setting with which a small learning rate still moves the
weights: ours bfloat16 with float32 masters; TRL float32, or float32 weights under autocast to bfloat16, and on a GPU
with Liger's kernels too if the package is there: what is fastest in the first turn, or with --quick what `USUAL` says
(GRPO at full length has that of GRPO after SFT, SFT without packing that of SFT, PPO float32). TRL's SFT is padded in
both rows: its packing lets demonstrations see one another without flash attention. PPO is that of TRL 1.12, the last
release that had it, from the folder .venv/trl-ppo or the one that the variable TRL_PPO names.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from machine import machine
from trainer_steps import LENGTHS, NEW_TOKENS, PROMPTS, PROMPTS_PER_STEP, SAMPLES, trl_reward

ROOT = Path(__file__).resolve().parents[1]
PEER_PPO = Path(os.environ.get("TRL_PPO") or Path(sys.prefix) / "trl-ppo")  # `pip install --no-deps --target`
DEMONSTRATIONS, PAIRS = 16, 8  # of one optimizer step
PHASES = ("sft", "sft-unpacked", "reward", "dpo", "grpo", "grpo-full", "ppo")
NAMES = {
    "sft": "SFT, packed", "sft-unpacked": "SFT, padded", "reward": "reward model", "dpo": "DPO", "ppo": "PPO",
    "grpo": "GRPO, after SFT", "grpo-full": "GRPO, full length",
}  # fmt: skip
USUAL = {"sft": "autocast", "reward": "autocast", "dpo": "autocast", "grpo": "float32", "ppo": "float32"}
DOCUMENT = ROOT / "docs" / "trainer-measurements.md"
BEGIN, END = "<!-- benchmarks/trainer_phases.py --write -->", "<!-- end -->"
SFT_STEPS = 40  # of the model for GRPO after SFT


def demonstrations() -> list[dict[str, str]]:
    lines = (ROOT / "examples" / "demo" / "sft.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def pairs() -> list[dict[str, str]]:
    """Pairs with a long prompt in common, of the demo's sentences."""
    rng, sentences = random.Random(0), [row["prompt"] + row["completion"] for row in demonstrations()]
    made = []
    for _ in range(8 * PAIRS):
        prompt, chosen, rejected = (" ".join(rng.choices(sentences, k=k)) for k in (8, 3, 3))
        made.append({"prompt": prompt, "chosen": " " + chosen, "rejected": " " + rejected})
    return made


class Clock:
    """Seconds between ticks, the first one left out as a warm-up."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def __call__(self, *_: Any, **__: Any) -> None:
        self.ticks.append(time.perf_counter())

    def seconds(self) -> float:
        return median(b - a for a, b in zip(self.ticks, self.ticks[1:], strict=False))


# ------------------------------------------------------------------------------------------------ ours


def ours(phase: str, model: str, rounds: int, folder: Path) -> None:
    from rlhf_fast import trainer
    from rlhf_fast.run.folder import RunFolder

    common = {"model": model, "output_dir": str(folder / "run"), "save_minutes": 0.0, "save_last": False}
    name = phase.partition("-")[0]
    config, function = {
        "sft": (trainer.SFTConfig, trainer.train_sft),
        "reward": (trainer.RewardConfig, trainer.train_reward),
    }.get(name, (trainer.PPOConfig, trainer.train_ppo))
    made = config(**common, **our_options(name, rounds, folder))
    if phase == "sft-unpacked":
        made.packing = False
    run, clock, lengths = RunFolder.create(made.output_dir), Clock(), []
    log = run.log

    def logged(metrics: dict[str, float], step: int) -> None:
        log(metrics, step)
        if "loss" in metrics or "objective/kl" in metrics:
            clock()
            lengths.append(metrics.get("sample/length", 0.0))
        if len(clock.ticks) > rounds:
            finish({"seconds": clock.seconds(), "length": sum(lengths) / len(lengths)})

    run.log = logged
    function(made, run)


def our_options(name: str, rounds: int, folder: Path) -> dict[str, Any]:
    def written(file: str, rows: list[dict[str, str]]) -> str:
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(folder / file)

    if name == "sft":
        path = written("sft.jsonl", demonstrations())
        return {"train_file": path, "batch_size": DEMONSTRATIONS, "max_steps": rounds + 1, "packing": True}
    if name == "reward":
        path = written("pairs.jsonl", pairs()[: (rounds + 1) * PAIRS])
        return {"feedback_file": path, "batch_size": PAIRS, "eval_fraction": 0.0}
    if name == "dpo":
        path = written("pairs.jsonl", pairs())
        return {
            "objective": "dpo", "prompts_file": path, "prompts_per_step": PAIRS, "max_steps": rounds + 1,
            "num_minibatches": 1, "max_new_tokens": NEW_TOKENS, "lr": 1e-6,
        }  # fmt: skip
    options = {
        "prompts_file": written("prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS]), "max_steps": rounds + 1,
        "prompts_per_step": PROMPTS_PER_STEP, "samples_per_prompt": SAMPLES, "max_new_tokens": NEW_TOKENS, "lr": 1e-6,
    }  # fmt: skip
    if name == "ppo":
        return {**options, "critic_lr": 1e-6, "reward_model": str(folder / "reward"), "score_clip": 0.0}
    return {**options, "objective": "grpo", "reward_functions": (f"{ROOT}/benchmarks/trainer_steps.py:our_reward",)}


# ------------------------------------------------------------------------------------------------- TRL


def theirs(phase: str, model: str, rounds: int, folder: Path) -> None:
    from transformers import TrainerCallback

    name, clock = phase.partition("-")[0], Clock()
    callback = type("Ticks", (TrainerCallback,), {"on_step_end": lambda self, *_, **__: clock()})()
    made = {"sft": trl_sft, "reward": trl_reward_model, "dpo": trl_dpo, "grpo": trl_grpo, "ppo": trl_ppo}[name](
        model, rounds, folder
    )
    made.add_callback(callback)
    made.train()
    finish({"seconds": clock.seconds(), "length": sum(LENGTHS) / len(LENGTHS) if LENGTHS else 0.0})


def trl_options(rounds: int, folder: Path, batch: int) -> dict[str, Any]:
    setting = os.environ["TRL_SETTING"]
    return {
        "output_dir": str(folder / "trl"), "per_device_train_batch_size": batch, "learning_rate": 1e-6,
        "max_steps": rounds + 1, "use_cpu": not on_gpu(), "bf16": "autocast" in setting, "report_to": [],
        "use_liger_kernel": "Liger" in setting, "gradient_checkpointing": False, "save_strategy": "no",
        "logging_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def tools(model: str, side: str = "right") -> tuple[Any, Any, Any]:
    """The modules datasets and trl, and the tokenizer."""
    import datasets
    import trl
    from transformers import AutoTokenizer

    return datasets, trl, AutoTokenizer.from_pretrained(model, padding_side=side)


def causal(model: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def classifier(model: str) -> Any:
    import torch
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)


def trl_sft(model: str, rounds: int, folder: Path) -> Any:
    datasets, trl, tokenizer = tools(model)
    config = trl.SFTConfig(**trl_options(rounds, folder, DEMONSTRATIONS), max_length=512)
    rows = datasets.Dataset.from_list(demonstrations())
    return trl.SFTTrainer(causal(model), config, train_dataset=rows, processing_class=tokenizer)


def trl_reward_model(model: str, rounds: int, folder: Path) -> Any:
    datasets, trl, tokenizer = tools(model)
    config = trl.RewardConfig(**trl_options(rounds, folder, PAIRS), max_length=512)
    rows = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in pairs()]
    data = datasets.Dataset.from_list(rows)
    return trl.RewardTrainer(classifier(model), args=config, train_dataset=data, processing_class=tokenizer)


def trl_dpo(model: str, rounds: int, folder: Path) -> Any:
    datasets, trl, tokenizer = tools(model)
    config = trl.DPOConfig(**trl_options(rounds, folder, PAIRS), max_length=512)
    return trl.DPOTrainer(
        causal(model), causal(model), args=config, train_dataset=datasets.Dataset.from_list(pairs()),
        processing_class=tokenizer,
    )  # fmt: skip


def trl_grpo(model: str, rounds: int, folder: Path) -> Any:
    datasets, trl, tokenizer = tools(model, "left")
    config = trl.GRPOConfig(
        **trl_options(rounds, folder, PROMPTS_PER_STEP * SAMPLES), num_generations=SAMPLES, beta=0.04,
        max_completion_length=NEW_TOKENS, loss_type="grpo", temperature=1.0, top_p=1.0, top_k=0,
    )  # fmt: skip
    rows = datasets.Dataset.from_dict({"prompt": PROMPTS})
    return trl.GRPOTrainer(causal(model), trl_reward, args=config, train_dataset=rows, processing_class=tokenizer)


def trl_ppo(model: str, rounds: int, folder: Path) -> Any:
    datasets, _, tokenizer = tools(model, "left")
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer.pad_token = "<|endoftext|>" if "<|endoftext|>" in tokenizer.get_vocab() else tokenizer.pad_token
    options = trl_options(rounds, folder, PROMPTS_PER_STEP * SAMPLES)
    options["total_episodes"] = (options.pop("max_steps")) * PROMPTS_PER_STEP * SAMPLES
    config = PPOConfig(
        **options, num_ppo_epochs=1, num_mini_batches=2, response_length=NEW_TOKENS, temperature=1.0, stop_token="eos",
        num_sample_generations=0,
    )  # fmt: skip
    rows = [{"input_ids": tokenizer(p)["input_ids"]} for p in PROMPTS for _ in range(SAMPLES * 4)]
    data = datasets.Dataset.from_list(rows)
    reward = str(folder / "reward")
    return PPOTrainer(
        config, tokenizer, causal(model), causal(model), classifier(reward), data, classifier(reward), eval_dataset=data
    )


# ------------------------------------------------------------------------------------------------ table


def settings(phase: str, side: str, options: argparse.Namespace) -> list[str]:
    """What this side may run with: one setting once the first turn has chosen it."""
    name = phase.partition("-")[0]
    if side != "TRL":
        return ["bfloat16"]
    if options.quick or name == "ppo" or name in options.chosen:
        return [options.chosen.get(name, USUAL[name])]
    liger = on_gpu() and find_spec("liger_kernel") is not None
    return ["float32", "autocast", *(["autocast, Liger"] if liger else [])]


def measured(phase: str, side: str, options: argparse.Namespace) -> dict[str, Any]:
    """One process of one side; with several settings one each, and the fastest counts from now on."""
    found = [{**one_process(phase, side, x, options), "setting": x} for x in settings(phase, side, options)]
    best = min(found, key=lambda figures: figures["seconds"])
    if side == "TRL":
        options.chosen[phase.partition("-")[0]] = best["setting"]
    return best


def one_process(phase: str, side: str, setting: str, options: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--model", options.model, "--rounds", str(options.rounds)]
    folder = Path(options.folder) / f"{phase}-{side}-{time.time_ns()}"
    folder.mkdir()
    if phase == "ppo":
        (folder / "reward").symlink_to(Path(options.folder) / "reward")
    command += ["--after-sft", options.after_sft, "--folder", str(folder), "--job", phase, side]
    environment = {**os.environ, "TRL_SETTING": setting}
    if (phase, side) == ("ppo", "TRL"):
        environment["PYTHONPATH"] = os.pathsep.join([str(PEER_PPO), environment.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def job(phase: str, side: str, options: argparse.Namespace) -> None:
    from rlhf_fast.run.runtime import tune_process

    tune_process()  # for both: threads, allocator, denormals
    warnings.simplefilter("ignore")
    model = options.after_sft if phase == "grpo" else options.model
    (ours if side == "rlhf_fast" else theirs)(phase, model, options.rounds, Path(options.folder))


def finish(figures: dict[str, float]) -> None:
    """Print what was measured and end here: no side evaluates or saves its model."""
    figures["gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps(figures), flush=True)
    os._exit(0)


def make_reward_model(model: str, folder: Path) -> None:
    """A reward model that has learned nothing, which takes as long as another."""
    from transformers import AutoTokenizer

    classifier(model).save_pretrained(folder / "reward")
    AutoTokenizer.from_pretrained(model).save_pretrained(folder / "reward")


def after_sft(options: argparse.Namespace, folder: str) -> str:
    """A model that has learned to write one sentence and end."""
    command = [sys.executable, "-m", "rlhf_fast", "sft", "--model", options.model, "--output-dir", f"{folder}/sft"]
    command += ["--train-file", str(ROOT / "examples" / "demo" / "sft.jsonl"), "--max-steps", str(options.sft_steps)]
    subprocess.run([*command, "--packing", "--save-minutes", "0"], capture_output=True, check=True)
    return f"{folder}/sft/model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help='"smollm2", or a folder')
    parser.add_argument("--rounds", type=int, default=2, help="steps of each process behind its warm-up")
    parser.add_argument("--turns", type=int, default=2, help="processes of each side, in turns")
    parser.add_argument("--quick", action="store_true", help="one round, one turn, TRL's usual dtypes")
    parser.add_argument("--write", action="store_true", help=f"put the table into {DOCUMENT.name}")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES)
    parser.add_argument("--sft-steps", type=int, default=SFT_STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--after-sft", default="", help="a model for GRPO after SFT; else one is trained first")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    from rlhf_fast.models.gguf import resolve_model
    from rlhf_fast.run.quiet import quiet

    options.model = str(resolve_model(options.model))
    quiet()
    if options.job:
        return job(*options.job, options)
    if options.write and (options.quick or tuple(options.phases) != PHASES):
        parser.error("--write takes a whole table: neither --quick nor --phases")
    if options.quick:
        options.rounds, options.turns = 1, 1
    options.chosen = {}
    if options.write and not DOCUMENT.read_text().count(BEGIN) == DOCUMENT.read_text().count(END) == 1:
        sys.exit(f"{DOCUMENT} must have one line {BEGIN} and one line {END}")
    begun = time.monotonic()
    found = machine()
    lines = [f"PyTorch {found['torch']}, {found['threads']} threads of {found['cpu']} ({found['instruction_set']})"]
    lines[0] += f", {time.strftime('%Y-%m-%d')}. {options.rounds} steps behind a warm-up in each process"
    lines[0] += f", {options.turns} processes of each side in turns; medians."
    lines += ["", "| step | | seconds | peak GiB | mean length | speed-up | memory |", "| --- | --- |" + " ---: |" * 5]
    print("\n".join(lines))
    with tempfile.TemporaryDirectory() as options.folder:
        if "grpo" in options.phases:
            options.after_sft = options.after_sft or after_sft(options, options.folder)
        if "ppo" in options.phases:
            make_reward_model(options.model, Path(options.folder))
        for phase in options.phases:
            rows = table(phase, options)
            print("\n".join(rows), flush=True)
            lines += rows
    print(f"{(time.monotonic() - begun) / 60:.1f} minutes", file=sys.stderr)
    if options.write:
        text = DOCUMENT.read_text()
        before, after = text.index(BEGIN) + len(BEGIN), text.index(END)
        DOCUMENT.write_text(text[:before] + "\n\n" + "\n".join(lines) + "\n\n" + text[after:])


def table(phase: str, options: argparse.Namespace) -> list[str]:
    """Measure; the two lines of a phase."""
    found: dict[str, list[dict[str, Any]]] = {"TRL": [], "rlhf_fast": []}
    for turn in range(options.turns):
        for side in list(found)[:: -1 if turn % 2 else 1]:
            found[side].append(measured(phase, side, options))
    keys = ("seconds", "gib", "length")
    middle = {side: {k: median(f[k] for f in runs) for k in keys} for side, runs in found.items()}
    rows = []
    for side, f in middle.items():
        length = f"{f['length']:.1f}" if f["length"] else ""
        cells = [NAMES[phase], f"{side}, {' or '.join(sorted({run['setting'] for run in found[side]}))}"]
        cells.append(f"{f['seconds']:.2f}")
        cells += [f"{f['gib']:.2f}", length, f"{middle['TRL']['seconds'] / f['seconds']:.2f} x"]
        cells.append(f"{f['gib'] / middle['TRL']['gib']:.2f} x")
        rows.append(f"| {' | '.join(cells)} |")
    return rows


if __name__ == "__main__":
    main()
