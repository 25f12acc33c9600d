# SPDX-License-Identifier: Apache-2.0
"""Prompts and demonstrations of a data file.

Prompts are text or chat messages; demonstrations come in three forms:

    {"prompt": "The new job"}
    {"prompt": "The new job", "completion": " pays well."}      (each may also be a list of messages)
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}], "tools": [...]}
    {"text": "Once upon a time."}

Text is used unchanged: prompt and completion are concatenated, so a completion begins with its own space.
Unusable rows are dropped and listed, or raise with `strict` (`dropped.py`). See `files.py` for file formats,
`formats.py` for rows of ShareGPT and Alpaca, `messages.py` for messages, `encoding.py` for token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.errors import UserError

from .encoding import decode_completion, encode_answer, encode_completion, encode_example, encode_prompt
from .files import read_lines
from .formats import usual_keys
from .messages import (
    Chat,
    Completion,
    Prompt,
    as_chat,
    check_completion,
    check_prompt,
    completion_text,
    plain,
    prompt_text,
    says_something,
)

__all__ = [
    "Chat",
    "Completion",
    "Demonstration",
    "Prompt",
    "PromptLine",
    "check_prompt",
    "completion_text",
    "decode_completion",
    "demonstration",
    "encode_answer",
    "encode_completion",
    "encode_example",
    "encode_prompt",
    "pad_right",
    "prompt_line",
    "prompt_text",
    "read_prompts",
    "read_sft",
]


@dataclass(frozen=True)
class PromptLine:
    """A prompt, where it was read ("file:line", for error messages), and the other columns of its row."""

    prompt: Prompt
    where: str
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Demonstration:
    """A prompt, the completion to learn, and where they were read. Text without a prompt has prompt ""."""

    prompt: Prompt
    completion: Completion
    where: str


def read_prompts(path: str | Path, strict: bool = False) -> list[PromptLine]:
    """The prompts of a data file: rows `{"prompt": text or messages}`; other keys become `columns`."""
    return read_lines(path, prompt_line, strict)


def read_sft(path: str | Path, strict: bool = False) -> list[Demonstration]:
    """The demonstrations of a data file, in any of the three forms of the module's docstring."""
    return read_lines(path, demonstration, strict)


def prompt_line(row: dict[str, Any], where: str) -> PromptLine:
    """Parse and check a row with a prompt. The prompt of a conversation is everything before its last answer."""
    row = usual_keys(row)
    if "prompt" not in row and "messages" in row:
        messages = as_chat(check_prompt(row["messages"], where, "messages", row))
        last = len(messages) - (messages[-1]["role"] == "assistant")
        prompt = check_prompt(messages[:last], where, "messages", row)
    else:
        prompt = check_prompt(row.get("prompt"), where, row=row)
    return PromptLine(prompt, where, {name: value for name, value in row.items() if name not in ("prompt", "messages")})


def demonstration(row: dict[str, Any], where: str) -> Demonstration:
    """Parse and check a row with a demonstration in any of the three forms, or of ShareGPT or Alpaca."""
    row = usual_keys(row)
    if "messages" in row:
        return _conversation(check_prompt(row["messages"], where, "messages", row), where)
    if "text" in row:
        completion = check_completion(row["text"], where, "text")
        return Demonstration("", completion, where)
    if "prompt" in row and "completion" in row:
        prompt = check_prompt(row["prompt"], where, row=row)
        completion = check_completion(row["completion"], where)
        if isinstance(completion, str) and isinstance(prompt, str):
            return Demonstration(prompt, completion, where)
        return _conversation(as_chat(prompt).then(completion), where)
    keys = ", ".join(map(repr, row)) or "none"
    raise UserError(f'{where}: wanted the keys "prompt" and "completion", or "messages", or "text"; got {keys}')


def _conversation(messages: Prompt, where: str) -> Demonstration:
    """Everything before the last answer as the prompt, and that answer; later user messages are ignored."""
    chat = as_chat(messages) if not isinstance(messages, str) else Chat([])
    answers = [i for i, message in enumerate(chat) if message["role"] == "assistant" and says_something(message)]
    if not answers or answers[-1] == 0:
        raise UserError(
            f'{where}: "messages" must be a list with a message of the user and an assistant message after it, which '
            "is learned"
        )
    last = answers[-1]
    return Demonstration(Chat(chat[:last], chat.tools, chat.variables), plain(chat[last]), where)


def pad_right(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token lists as `input_ids (B, T)` int64 and `attention_mask (B, T)` bool, padded on the right."""
    width = max(map(len, sequences))
    input_ids = torch.full((len(sequences), width), pad_id)
    attention_mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, ids in enumerate(sequences):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = True
    return input_ids, attention_mask
