# SPDX-License-Identifier: Apache-2.0
"""Options of supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from rlhf_fast.run.options import FILE, NOT_NEGATIVE, POSITIVE, Options, RunOptions, Schedule

Turns = Literal["last", "all"]


@dataclass
class SFTOptions(Options):
    """Supervised fine-tuning on demonstrations."""

    CHANGEABLE = frozenset({"lr", "packing", "dropout", "eval_steps", "max_grad_norm"})
    EXTENDS = frozenset({"epochs", "max_steps"})

    train_file: Annotated[str, FILE] = ""
    """{"prompt", "completion"}, {"messages"} or {"text"} on each line; JSONL, Parquet, CSV or datasets:NAME[:SPLIT]."""
    eval_file: str | None = None
    """Held-out demonstrations of the same form; their loss is reported before and after."""
    turns: Turns = "last"
    """Answers of a chat to learn: the last one, or all of the assistant's. The rest is context."""
    epochs: Annotated[float, POSITIVE] = 2.0
    """Passes over the training file."""
    max_steps: Annotated[int, NOT_NEGATIVE] = 0
    """End after this many optimizer steps; 0 lets `epochs` decide."""
    dropout: bool = False
    """Train with the dropout rates of the model's configuration; off: without dropout."""
    batch_size: Annotated[int, POSITIVE] = 16
    """Demonstrations per optimizer step."""
    lr: Annotated[float, POSITIVE] = 1e-4
    """Peak learning rate of AdamW. 1e-4 suits 135M weights, 2e-5 7B; with lora_rank ten times as much."""
    lr_schedule: Schedule = "linear"
    """After the warm-up: constant, or falling to 0 at the last step."""
    warmup_steps: Annotated[int, NOT_NEGATIVE] = 0
    """Steps in which the learning rate rises from 0."""
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.0
    """Weight decay of AdamW, on all weights except biases and norms."""
    max_grad_norm: Annotated[float, NOT_NEGATIVE] = 1.0
    """Largest gradient norm: larger gradients are scaled down; 0: no limit."""
    eval_steps: Annotated[int, NOT_NEGATIVE] = 0
    """Steps between evaluations on eval_file; 0: only before and after training."""
    packing: bool = False
    """Pack the demonstrations of a micro-batch end to end instead of padding them; the result is the same."""


@dataclass
class SFTConfig(SFTOptions, RunOptions):
    """Fine-tune a language model on demonstrations."""
