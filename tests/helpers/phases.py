# SPDX-License-Identifier: Apache-2.0
"""Every phase on the tiny task, small enough to run often: `python phases.py DATA FOLDER [JOB ...] [-- COMMAND ...]`.

It is a script as well, because processes that are killed or that form a group cannot be pytest's own. The job `reward`
learns from a fixed file, the jobs of PPO use an untrained reward model, so that no job waits for another.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from pytest import MonkeyPatch

from rlhf_fast import cli
from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.models import loading
from rlhf_fast.rollout.builtin import generate
from rlhf_fast.rollout.rollout import Rollout
from rlhf_fast.run.folder import RunFolder
from rlhf_fast.trainer import PPOConfig, RewardConfig, SFTConfig
from rlhf_fast.trainer.collection import CollectConfig, collect
from rlhf_fast.trainer.reward.train import train_reward
from rlhf_fast.trainer.rl.ppo import train_ppo
from rlhf_fast.trainer.sft.train import train_sft

CUT = ("sft", "lora", "reward", "reward-lora", "ppo", "grpo", "ppo-lora", "ranked", "scarce")  # also done with fsdp
RATER = f"{Path(__file__).parents[2] / 'examples' / 'tiny' / 'raters.py'}:topic_share"


def often_short(prompt: str, completions: list[str]) -> list[float]:
    """1 for a completion of fewer than the most words."""
    return [float(len(completion.split()) < 8) for completion in completions]


def prepare(data: Path) -> None:
    """Add to the tiny task's folder what the jobs start from: feedback.jsonl and the model `reward`."""
    rows = [json.loads(line) for line in (data / "sft.jsonl").read_text().splitlines()[:60]]
    with (data / "feedback.jsonl").open("w") as file:
        for i, row in enumerate(rows):
            words = row["completion"].split()
            completions = [" " + " ".join(words[: 2 + (i + k) % 5 + k]) for k in range(2 + i % 3)]
            ratings = [(7 * i + 3 * k) % 5 for k in range(len(completions))]
            line = {"prompt": row["prompt"], "completions": completions, "ratings": ratings}
            file.write(json.dumps({**line, "ended": [k % 2 == 0 for k in range(len(completions))]}) + "\n")
    for name, count in (("few", 24), ("fewer", 6)):
        lines = (data / "feedback_prompts.jsonl").read_text().splitlines()[:count]
        (data / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))
    lines = [json.loads(line) for line in (data / "sft.jsonl").read_text().splitlines()[:64]]
    for i, row in enumerate(lines):  # of several lengths, so that a mean of means is not the mean
        row["completion"] = " " + " ".join(row["completion"].split()[: 1 + i % 8])
    (data / "demos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    torch.manual_seed(0)
    tokenizer = loading.load_tokenizer(str(data / "model"))
    model = loading.load_reward_model(str(data / "model"), "float32", tokenizer, new_head=True)
    model.score.weight.data.mul_(20)
    loading.set_score_normalizer(model, 0.1, 0.5)
    model.save_pretrained(data / "reward")


def jobs(data: Path) -> dict[str, Any]:
    """Configuration of each job; its class says which phase it is."""
    common: dict[str, Any] = {"model": str(data / "model"), "dtype": "float32", "max_length": 32, "save_steps": 1}
    sft = SFTConfig(
        **common, train_file=str(data / "demos.jsonl"), eval_file=str(data / "fewer.jsonl").replace("fewer", "demos"),
        max_steps=5, batch_size=16, micro_batch_size=8, lr=3e-3,
    )  # fmt: skip
    ppo = PPOConfig(
        **common, reward_model=str(data / "reward"), prompts_file=str(data / "feedback_prompts.jsonl"),
        eval_prompts_file=str(data / "fewer.jsonl"), rater=RATER, max_new_tokens=8, prompts_per_step=4,
        samples_per_prompt=4, micro_batch_size=4, max_steps=3, lr=1e-3, critic_lr=1e-3, missing_eos_penalty=0.5,
        epochs=2,
    )  # fmt: skip
    reward = RewardConfig(
        **common, feedback_file=str(data / "feedback.jsonl"), batch_size=7, micro_batch_size=8, epochs=0.8, lr=1e-3,
        head_lr=1e-2, centering=0.01,
    )  # fmt: skip
    samples = CollectConfig(
        **common, prompts_file=str(data / "few.jsonl"), rater=RATER, samples_per_prompt=2, max_new_tokens=8,
        micro_batch_size=6,
    )  # fmt: skip
    nf4: dict[str, Any] = {"lora_rank": 4, "dtype": "nf4", "max_steps": 3}
    quantised = {"sft-4bit": replace(sft, **nf4), "reinforce-4bit": replace(ppo, objective="reinforce++", **nf4)}
    return {
        **(quantised if find_spec("bitsandbytes") else {}),
        "sft": sft,
        "lora": replace(sft, lora_rank=4, max_steps=3),
        "sft-packed": replace(sft, packing=True, max_steps=3),
        "collect": samples,
        "reward": reward,
        "ppo": ppo,
        "grpo": replace(ppo, objective="grpo", kl_in="loss", kl_estimator="k3", top_k=20),
        "reward-lora": replace(reward, lora_rank=4),
        "ppo-lora": replace(ppo, lora_rank=4),
        # A reward that many prompts' samples agree on, so that each step takes a round or two more.
        "dynamic": replace(
            ppo,
            objective="dapo",
            reward_model="",
            reward_functions=(f"{__file__}:often_short",),
            eval_prompts_file=None,
            samples_per_prompt=2,
            dynamic_sampling=3,
            top_k=20,
        ),
        "dpo": replace(ppo, objective="dpo", kl_target=2.0, kl_coef=0.3),
        # Ranked samples, and minibatches in which a rank may have no row.
        "ranked": replace(
            ppo,
            objective="dpo",
            prompts_file=str(data / "feedback.jsonl"),
            num_minibatches=4,
            kl_coef=0.3,
            missing_eos_penalty=0.0,
        ),  # fmt: skip
        # Of seed 0's samples some weights get next to no gradient: Adam's step of those is that of the rounding.
        "scarce": replace(
            ppo, samples_per_prompt=1, num_minibatches=4, kl_estimator="exact", whiten_rewards=True, seed=3
        ),
    }


def cut_jobs(data: Path) -> dict[str, Any]:
    """The same with models cut over the ranks, in smaller micro-batches, of which a rank then has several.

    Some also save memory in ways that change nothing: state and activations in CPU memory, and the optimizer of 8 bits,
    which has 32 for weights as small as these adapters.
    """
    saving: dict[str, dict[str, Any]] = {
        "sft": {"optimizer": "adamw-offload"},
        "lora": {"optimizer": "adamw-8bit", "activation_offloading": True} if find_spec("bitsandbytes") else {},
        "reward": {"activation_offloading": True, "gradient_checkpointing": True},
        "ppo": {"optimizer": "adamw-offload", "activation_offloading": True},
    }
    return {
        f"{name}-fsdp": replace(jobs(data)[name], fsdp=True, micro_batch_size=4, **saving.get(name, {})) for name in CUT
    }


def say_that_bfloat16_is(patch: MonkeyPatch, fast: bool) -> None:
    """Have dtype auto, and what nf4 does not quantise, be the same on every CPU."""
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        patch.setattr(torch.cpu, name, lambda: fast)


def run(config: Any, folder: Path, resume: bool = False) -> None:
    """Do one job in `folder`. PPO also writes what each rank sampled to rollouts-RANK.jsonl."""
    config = replace(config, output_dir=str(folder), resume=resume)

    def sampler(*args: Any, **options: Any) -> Rollout:
        made = generate(*args, **options)
        if "total_prompts" not in options:  # an evaluation, which has its own share of the work
            return made
        with (folder / f"rollouts-{ranks().index}.jsonl").open("a") as file:
            rows = [ids[keep].tolist() for ids, keep in zip(made.input_ids, made.attention_mask, strict=True)]
            file.write(json.dumps({"ids": rows, "ended": made.ended.tolist(), "tokens": int(made.response_mask.sum())}))
            file.write("\n")
        return made

    run_folder = RunFolder.create(folder, resume=resume)
    patch = MonkeyPatch()
    say_that_bfloat16_is(patch, fast=False)
    try:
        if isinstance(config, PPOConfig):
            train_ppo(config, run_folder, sampler)
        elif isinstance(config, CollectConfig):
            collect(config, run_folder)
        else:
            (train_sft if isinstance(config, SFTConfig) else train_reward)(config, run_folder)  # type: ignore[operator]
    finally:
        run_folder.close()
        patch.undo()


def metrics(folder: Path) -> list[dict[str, float]]:
    """Rows of metrics.jsonl without the times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    words, _, command = (" ".join(sys.argv[1:]) + " ").partition(" -- ")
    first, second, *names = words.split()
    data, folder = Path(first), Path(second)
    for name, config in {**jobs(data), **(cut_jobs(data) if ranks().count > 1 else {})}.items():
        if not names or name in names:
            run(config, folder / name, resume=ranks().once((folder / name).exists))  # one answer for all processes
    if command:
        sys.exit(cli.main(command.split()))
