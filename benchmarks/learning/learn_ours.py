# SPDX-License-Identifier: Apache-2.0
"""rlhf_fast's side of the comparison: each function trains once and returns its curve."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from settings import DPO, EVERY, REWARD, RL, SFT, Curve
from task import MISSING_EOS, NEW_TOKENS, RATER, Task, load


def sft(task: Task, seed: int, folder: Path | None = None) -> Curve:
    from rlhf_fast.trainer import SFTConfig, train_sft

    with tempfile.TemporaryDirectory() as made:
        config = SFTConfig(
            model=str(task.base), train_file=str(task.folder / "sft.jsonl"), output_dir=made, dtype="float32",
            eval_file=str(task.folder / "heldout.jsonl"), max_steps=SFT["steps"], batch_size=SFT["batch"], lr=SFT["lr"],
            eval_steps=EVERY, micro_batch_size=64, seed=seed, overwrite=True,
        )  # fmt: skip
        run = folder_of(config)
        train_sft(config, run)
        run.close()
        lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
        model = load(run.path / "model")
        if folder is not None:
            model.save_pretrained(folder)
            task.tokenizer.save_pretrained(folder)
    curve = [{"step": line["step"], "nll": line["eval/nll"]} for line in lines if "eval/nll" in line]
    return [*curve, {"step": SFT["steps"], "nll": task.nll(model), **task.measure(model)}] if folder is None else curve


def reward(task: Task, seed: int) -> Curve:
    from transformers import AutoModelForSequenceClassification

    from rlhf_fast.trainer import RewardConfig, train_reward

    with tempfile.TemporaryDirectory() as made:
        config = RewardConfig(
            model=str(task.start), feedback_file=str(task.folder / "pairs.jsonl"), output_dir=made, dtype="float32",
            eval_fraction=0.0, epochs=REWARD["epochs"], batch_size=REWARD["batch"], lr=REWARD["lr"],
            head_lr=REWARD["lr"], max_length=32, micro_batch_size=64, seed=seed, overwrite=True,
        )  # fmt: skip
        run = folder_of(config)
        train_reward(config, run)
        run.close()
        lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
        model = AutoModelForSequenceClassification.from_pretrained(run.path / "model").eval()
    curve = [{"step": line["step"], "train loss": line["loss"]} for line in lines if "loss" in line]
    return [*curve, {"step": curve[-1]["step"], **task.pair_figures(model)}]


def online(objective: str, task: Task, seed: int) -> Curve:
    """PPO, GRPO or RLOO against the rater."""
    return learn(
        task, RL["steps"], objective=objective, prompts_file=str(task.folder / "feedback_prompts.jsonl"),
        reward_functions=(f"{RATER}:topic_share",), missing_eos_penalty=MISSING_EOS, kl_coef=RL["kl_coef"][objective],
        prompts_per_step=RL["prompts"], samples_per_prompt=RL["samples"], lr=RL["lr"], critic_lr=RL["lr"], seed=seed,
        **({"adam_eps": 1e-5} if objective == "ppo" else {}),
    )  # fmt: skip


def dpo(task: Task, seed: int) -> Curve:
    """DPO on the file of pairs."""
    steps = DPO["epochs"] * len(task.rows("pairs.jsonl")) // DPO["batch"]
    return learn(
        task, steps, objective="dpo", prompts_file=str(task.folder / "pairs.jsonl"), kl_coef=DPO["beta"], lr=DPO["lr"],
        prompts_per_step=DPO["batch"], num_minibatches=1, seed=seed,
    )  # fmt: skip


def learn(task: Task, steps: int, **values: Any) -> Curve:
    from rlhf_fast.run.checkpoint import seed_everything
    from rlhf_fast.run.progress import Timer
    from rlhf_fast.trainer import PPOConfig
    from rlhf_fast.trainer.rl import agent as agents
    from rlhf_fast.trainer.rl import ppo
    from rlhf_fast.trainer.rl.prompts import read_data
    from rlhf_fast.trainer.rl.settings import Settings

    config = PPOConfig(
        model=str(task.start), dtype="float32", max_new_tokens=NEW_TOKENS, max_length=32, max_steps=steps,
        micro_batch_size=64, **values,
    )  # fmt: skip
    config.validate()
    seed_everything(config.seed)
    options = Settings(config)
    agent = agents.load_agent(options.agent)
    lines = read_data(options.data._replace(strict=True), [], None).prompts
    prompts = agents.encode_prompts(lines, agent, options.prompts)
    curve = [{"step": 0, **task.measure(agent.policy)}]
    for step in range(steps):
        ppo.train_step(agent, prompts, options.step, options.sizes, step, Timer())
        if (step + 1) % EVERY == 0 or step + 1 == steps:
            curve.append({"step": step + 1, **task.measure(agent.policy)})
    return curve


def folder_of(config: Any) -> Any:
    from rlhf_fast.run.folder import RunFolder

    return RunFolder.create(config.output_dir, overwrite=True, resume=False)
