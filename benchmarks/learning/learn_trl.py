# SPDX-License-Identifier: Apache-2.0
"""TRL's side of the comparison, with its trainers told the same as ours."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import datasets
import torch
import transformers
import trl
from settings import BETAS, DPO, EVERY, REWARD, RL, SFT, Curve
from task import NEW_TOKENS, Task, load
from task import reward as worth


class Watch(transformers.TrainerCallback):
    """Measures the model every few steps."""

    def __init__(self, measure: Callable[[Any], dict[str, float]]) -> None:
        self.measure, self.curve = measure, Curve()

    def look(self, step: int, model: Any) -> None:
        if not self.curve or self.curve[-1]["step"] < step:
            self.curve.append({"step": step, **self.measure(model)})

    def on_train_begin(self, _: Any, state: Any, control: Any, model: Any = None, **__: Any) -> None:
        self.look(0, model)

    def on_step_end(self, _: Any, state: Any, control: Any, model: Any = None, **__: Any) -> None:
        if state.global_step % EVERY == 0 or state.global_step == state.max_steps:
            self.look(state.global_step, model)


def common(folder: str, seed: int, batch: int, lr: float, schedule: str = "constant") -> dict[str, Any]:
    return {
        "output_dir": folder, "per_device_train_batch_size": batch, "learning_rate": lr, "seed": seed,
        "lr_scheduler_type": schedule, "weight_decay": 0.0, "max_grad_norm": 1.0, "use_cpu": True, "bf16": False,
        "gradient_checkpointing": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
        "logging_steps": 1,
    }  # fmt: skip


def quietly(trainer: Any) -> None:
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()


BETA = {"adam_beta1": BETAS[0], "adam_beta2": BETAS[1]}


def sft(task: Task, seed: int) -> Curve:
    watch = Watch(lambda model: {"nll": task.nll(model)})
    with tempfile.TemporaryDirectory() as folder:
        options = common(folder, seed, SFT["batch"], SFT["lr"], "linear")
        config = trl.SFTConfig(**options, max_steps=SFT["steps"], max_length=32)
        rows = datasets.Dataset.from_list(task.rows("sft.jsonl"))
        trainer = trl.SFTTrainer(load(task.base), config, train_dataset=rows, processing_class=task.tokenizer)
        trainer.add_callback(watch)
        quietly(trainer)
    watch.curve[-1] |= task.measure(trainer.model)
    return watch.curve


def reward(task: Task, seed: int) -> Curve:
    torch.manual_seed(seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        task.start, num_labels=1, dtype=torch.float32
    )
    with tempfile.TemporaryDirectory() as folder:
        options = common(folder, seed, REWARD["batch"], REWARD["lr"], "linear")
        config = trl.RewardConfig(**options, num_train_epochs=REWARD["epochs"], max_length=32)
        rows = [{side: r["prompt"] + r[side] for side in ("chosen", "rejected")} for r in task.rows("pairs.jsonl")]
        trainer = trl.RewardTrainer(
            model, args=config, train_dataset=datasets.Dataset.from_list(rows), processing_class=task.tokenizer
        )
        quietly(trainer)
    curve = [{"step": h["step"], "train loss": h["loss"]} for h in trainer.state.log_history if "loss" in h]
    return [*curve, {"step": curve[-1]["step"], **task.pair_figures(trainer.model.eval())}]


def dpo(task: Task, seed: int) -> Curve:
    watch = Watch(task.measure)
    with tempfile.TemporaryDirectory() as folder:
        options = common(folder, seed, DPO["batch"], DPO["lr"]) | BETA
        config = trl.DPOConfig(**options, num_train_epochs=DPO["epochs"], beta=DPO["beta"], max_length=32)
        rows = datasets.Dataset.from_list(task.rows("pairs.jsonl"))
        trainer = trl.DPOTrainer(
            load(task.start), load(task.start), args=config, train_dataset=rows, processing_class=task.tokenizer
        )
        trainer.add_callback(watch)
        quietly(trainer)
    return watch.curve


def online(objective: str, task: Task, seed: int) -> Curve:
    """GRPO or RLOO against the rater."""
    watch = Watch(task.measure)
    eos = task.tokenizer.eos_token_id

    def rewards(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        return worth(prompts, completions, [ids[-1] == eos for ids in completion_ids])

    with tempfile.TemporaryDirectory() as folder:
        options = common(folder, seed, RL["prompts"] * RL["samples"], RL["lr"]) | BETA
        options |= {
            "max_steps": RL["steps"], "num_generations": RL["samples"], "max_completion_length": NEW_TOKENS,
            "beta": RL["kl_coef"][objective], "temperature": 1.0, "top_p": 1.0, "top_k": 0,
        }  # fmt: skip
        if objective == "grpo":
            config = trl.GRPOConfig(**options, loss_type="grpo", scale_rewards="group")
        else:
            config = trl.RLOOConfig(**options)
        trainer = (trl.GRPOTrainer if objective == "grpo" else trl.RLOOTrainer)(
            str(task.start), rewards, args=config, processing_class=task.tokenizer,
            train_dataset=datasets.Dataset.from_dict({"prompt": task.prompts("feedback_prompts.jsonl")}),
        )  # fmt: skip
        trainer.add_callback(watch)
        quietly(trainer)
    return watch.curve
