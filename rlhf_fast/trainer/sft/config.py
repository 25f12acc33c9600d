# SPDX-License-Identifier: Apache-2.0
"""Options of supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from rlhf_fast.run.options import FILE, NOT_NEGATIVE, POSITIVE, Options, RunOptions


@dataclass
class SFTOptions(Options):
    """Supervised fine-tuning on demonstrations."""

    CHANGEABLE = frozenset({"lr", "packing", "dropout"})
    EXTENDS = frozenset({"epochs", "max_steps"})

    train_file: Annotated[str, FILE] = ""
    """{"prompt", "completion"}, {"messages"} or {"text"} on each line; JSONL, Parquet, CSV or datasets:NAME[:SPLIT]."""
    eval_file: str | None = None
    """Held-out demonstrations of the same form; their loss is reported before and after."""
    turns: Literal["last", "all"] = "last"
    """Answers of a chat that are learned: the last one, or every one of the assistant's. The rest is context."""
    epochs: Annotated[float, POSITIVE] = 2.0
    """Passes over the training file."""
    max_steps: Annotated[int, NOT_NEGATIVE] = 0
    """End after this many optimizer steps; 0 lets `epochs` decide."""
    dropout: bool = False
    """Learn with the dropout that the model's configuration names; off, it has none."""
    batch_size: Annotated[int, POSITIVE] = 16
    """Demonstrations per optimizer step."""
    lr: Annotated[float, POSITIVE] = 1e-4
    """Peak learning rate of AdamW; linear decay to 0."""
    packing: bool = False
    """Put the demonstrations of a micro-batch end to end instead of padding them; the result is the same."""


@dataclass
class SFTConfig(SFTOptions, RunOptions):
    """Fine-tune a language model on demonstrations."""
