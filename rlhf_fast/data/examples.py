# SPDX-License-Identifier: Apache-2.0
"""Prompts and demonstrations of a data file, and their token ids.

Prompts are text or chat messages; demonstrations come in three forms:

    {"prompt": "The new job"}
    {"prompt": "The new job", "completion": " pays well."}      (the prompt may also be a list of messages)
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
    {"text": "Once upon a time."}

Text is used as it stands: prompt and completion are simply joined, so a completion begins with its own space.
Whatever is wrong with one is a UserError that names the file and the line. `files.py` has the kinds of file.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.errors import UserError

from .files import read_lines

Prompt = str | list[dict[str, str]]  # text, or chat messages [{"role": ..., "content": ...}]


@dataclass(frozen=True)
class PromptLine:
    """A prompt, where it was read ("file:line", for messages), and the other columns of its row."""

    prompt: Prompt
    where: str
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Demonstration:
    """A prompt, the completion to learn, and where they were read. Text without a prompt has prompt ""."""

    prompt: Prompt
    completion: str
    where: str


def read_prompts(path: str | Path) -> list[PromptLine]:
    """The prompts of a data file: rows `{"prompt": text or messages}`; other keys are left alone."""
    return read_lines(path, prompt_line)


def read_sft(path: str | Path) -> list[Demonstration]:
    """The demonstrations of a data file, in any of the three forms of the module's docstring."""
    return read_lines(path, demonstration)


def prompt_line(row: dict[str, Any], where: str) -> PromptLine:
    """A row that holds a prompt, checked."""
    columns = {name: value for name, value in row.items() if name != "prompt"}
    return PromptLine(check_prompt(row.get("prompt"), where), where, columns)


def demonstration(row: dict[str, Any], where: str) -> Demonstration:
    """A row that holds a demonstration in any of the three forms, checked."""
    if "messages" in row:
        messages = check_prompt(row["messages"], where, name="messages")
        if isinstance(messages, str) or messages[-1]["role"] != "assistant":
            raise UserError(f'{where}: "messages" must be a list that ends with an assistant message, which is learned')
        return Demonstration(messages[:-1], messages[-1]["content"], where)
    if "text" in row:
        return Demonstration("", _check_text(row["text"], "text", where), where)
    if "prompt" in row and "completion" in row:
        prompt = check_prompt(row["prompt"], where)
        return Demonstration(prompt, _check_text(row["completion"], "completion", where), where)
    keys = ", ".join(map(repr, row)) or "none"
    raise UserError(f'{where}: wanted the keys "prompt" and "completion", or "messages", or "text"; got {keys}')


def check_prompt(value: Any, where: str, name: str = "prompt") -> Prompt:
    """`value` if it is text that is not empty or a list of chat messages, else a UserError."""
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(_is_message(message) for message in value):
        return value
    shown = "nothing" if value is None else repr(value)[:60]
    raise UserError(
        f'{where}: "{name}" must be text or a list of {{"role": ..., "content": ...}} messages, got {shown}'
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def _check_text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise UserError(f'{where}: "{name}" must be text that is not empty, got {repr(value)[:60]}')
    return value


def encode_prompt(tokenizer: Any, prompt: Prompt, *, max_length: int, where: str) -> list[int]:
    """Token ids of a prompt, ready for a completion to follow; `where` ("file:line") is for messages.

    Text gets the special tokens that the tokenizer puts in front, messages go through its chat template.
    Raises UserError if there is no template, or if no room for a single completion token is left in
    `max_length`.
    """
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt)["input_ids"])
        while ids and ids[-1] == tokenizer.eos_token_id:  # some tokenizers close every text
            ids.pop()
    elif tokenizer.chat_template is None:
        raise UserError(
            f"{where}: the prompt is a list of messages, but the model's tokenizer has no chat template; "
            "give the prompt as text, or take a model that was tuned for chat"
        )
    else:
        ids = list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))
    if not ids:  # "text" demonstrations: the first token needs something to be predicted from
        ids = [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
    if len(ids) >= max_length:
        raise UserError(
            f"{where}: the prompt has {len(ids)} tokens and leaves no room for a completion "
            f"in a context of {max_length}; shorten it or raise max_length (the model sets the upper limit)"
        )
    return ids


def encode_completion(tokenizer: Any, completion: str, *, ended: bool = True) -> list[int]:
    """Token ids of a completion; the end-of-sequence token is there if the completion `ended` by itself."""
    ids = list(tokenizer(completion, add_special_tokens=False)["input_ids"])
    return [*ids, tokenizer.eos_token_id] if ended else ids


def encode_answer(tokenizer: Any, prompt: Prompt, prompt_ids: list[int], completion: str) -> list[int]:
    """Token ids of a demonstration's completion behind `prompt_ids`, up to the end-of-sequence token.

    After messages they are what the chat template makes of the answer, where it begins with the prompt; some templates
    put tokens of their own around an answer, which the model must learn to write.
    """
    if not isinstance(prompt, str):
        messages = [*prompt, {"role": "assistant", "content": completion}]
        whole = list(tokenizer.apply_chat_template(messages, return_dict=False))
        answer = whole[len(prompt_ids) :]
        if whole[: len(prompt_ids)] == prompt_ids and answer:
            end = answer.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in answer else len(answer)
            return [*answer[:end], tokenizer.eos_token_id]
    return encode_completion(tokenizer, completion)


def prompt_text(prompt: Prompt) -> str:
    """A prompt as one string for raters and reports: text as it is, messages as "role: content" lines."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def pad_right(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token lists as `input_ids (B, T)` int64 and `attention_mask (B, T)` bool, padded on the right."""
    width = max(map(len, sequences))
    input_ids = torch.full((len(sequences), width), pad_id)
    attention_mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, ids in enumerate(sequences):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = True
    return input_ids, attention_mask
