# SPDX-License-Identifier: Apache-2.0
"""Prompts and completions in a data file: text, or chat messages in the form of transformers' templates.

A message keeps all its keys, as the template may read them: `tool_calls`, `reasoning_content`, `name` and others.
A key of a message that is null counts as missing; nulls deeper inside, as of a tool's argument, are kept, except in
formats whose rows have one schema and so fill them in (`filled_in_removed`). Content parts are concatenated if all of
them are text.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from typing import Any

from rlhf_fast.errors import UserError

NESTED = ("tools", "chat_template_kwargs", "completions")  # columns of messages and tools, beside lists of messages
BESIDES_CONTENT = ("tool_calls", "reasoning_content", "thinking", "function_call")

Message = dict[str, Any]  # {"role": text, "content": text, ...}


class Chat(list[Message]):
    """Messages, with the chat template's other inputs: `tools`, and variables such as `enable_thinking`."""

    def __init__(
        self,
        messages: Iterable[Message],
        tools: list[Any] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        """`tools` and `variables` apply to all messages."""
        super().__init__(messages)
        self.tools = tools
        self.variables = dict(variables or {})

    def then(self, completion: Completion) -> Chat:
        """The conversation with the completion appended."""
        return Chat([*self, *completion_messages(completion)], self.tools, self.variables)

    def columns(self) -> dict[str, Any]:
        """The other columns of a data file's row."""
        columns = {"tools": self.tools, "chat_template_kwargs": self.variables}
        return {name: value for name, value in columns.items() if value}


Prompt = str | list[Message]  # the list is a Chat if the row had tools
Completion = str | Message | list[Message]  # text, one message, or several turns


def check_prompt(value: Any, where: str, name: str = "prompt", row: Mapping[str, Any] | None = None) -> Prompt:
    """`value` as non-empty text, or as messages with the tools of their `row`; UserError otherwise."""
    if isinstance(value, str) and value:
        return value
    if is_messages(value):
        row = row or {}
        return Chat(_messages(value, where), _tools(row.get("tools"), where), _variables(row, where))
    shown = repr(value)[:60]
    if value is None:
        shown = (
            "nothing" if row is None else f"nothing; the keys of the row: {', '.join(map(repr, row))[:200] or 'none'}"
        )
    raise UserError(
        f'{where}: "{name}" must be text or a list of {{"role": ..., "content": ...}} messages, got {shown}'
    )


def check_completion(value: Any, where: str, name: str = "completion") -> Completion:
    """`value` as non-empty text, or as messages of which the last is the assistant's; UserError otherwise."""
    if isinstance(value, str) and value:
        return value
    if isinstance(value, dict) and is_messages([value]):
        value = [value]
    if is_messages(value):
        messages = _messages(value, where)
        if messages[-1]["role"] != "assistant":
            raise UserError(f'{where}: "{name}" must end with a message of the assistant, which is learned')
        if says_something(messages[-1]):
            return messages if len(messages) > 1 else plain(messages[0])
    raise UserError(
        f'{where}: "{name}" must be text that is not empty, or messages that end with one of the assistant, '
        f"got {repr(value)[:60]}"
    )


def plain(message: Message) -> str | Message:
    """The text of a message that has nothing but text, else the message."""
    return message["content"] if set(message) == {"role", "content"} else message


def says_something(message: Message) -> bool:
    """True if a message has content, tool calls or reasoning."""
    return bool(message.get("content")) or any(message.get(key) for key in BESIDES_CONTENT)


def is_messages(value: Any) -> bool:
    """True for a list of objects with a role, and with content, tool calls or reasoning."""
    return isinstance(value, list) and bool(value) and all(map(_is_message, value))


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    content = value.get("content")
    return isinstance(content, str | list) or (content is None and says_something(value))


def _messages(values: list[Any], where: str) -> list[Message]:
    messages = []
    for value in values:
        message = {key: copy.deepcopy(item) for key, item in value.items() if item is not None}
        message["content"] = _content(value.get("content"), where)
        for call in message.get("tool_calls") or ():
            _parse_arguments(call)
        messages.append(message)
    return messages


def _parse_arguments(call: Any) -> None:
    """Parse, in place, arguments that are JSON text (as OpenAI's API writes them); templates expect an object."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if isinstance(function, dict) and isinstance(arguments := function.get("arguments"), str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            return
        if isinstance(parsed, dict):
            function["arguments"] = parsed


def _content(content: Any, where: str) -> str:
    """Content as text: parts are concatenated, and UserError for a part that is not text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    texts: list[Any] = [part.get("text") if isinstance(part, dict) else part for part in content]
    kinds = [part.get("type", "text") if isinstance(part, dict) else "text" for part in content]
    if any(kind != "text" for kind in kinds) or not all(isinstance(text, str) for text in texts):
        names = ", ".join(sorted(set(map(str, kinds))))
        raise UserError(f"{where}: a message has content of the kinds {names}; only text is read")
    return "".join(texts)


def filled_in_removed(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of Parquet or `datasets` without the nulls that fill its messages and tools up to the common schema."""
    return {
        name: without_nulls(value) if name in NESTED or is_messages(value) or is_messages([value]) else value
        for name, value in row.items()
        if value is not None
    }


def without_nulls(value: Any) -> Any:
    """A copy of JSON data without keys whose value is null."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def _tools(value: Any, where: str) -> list[Any] | None:
    if isinstance(value, str):  # Parquet cannot hold rows of different schemas, so data sets store tools as JSON
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise UserError(f'{where}: "tools" must be a list of tools, got {value[:60]!r}') from None
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise UserError(f'{where}: "tools" must be a list of tools, got {repr(value)[:60]}')
    return value


def _variables(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    value = row.get("chat_template_kwargs") or {}
    if not isinstance(value, dict):
        raise UserError(f'{where}: "chat_template_kwargs" must be an object, got {repr(value)[:60]}')
    return value


def as_chat(prompt: Prompt) -> Chat:
    """A prompt as a conversation; text becomes a user message."""
    if isinstance(prompt, str):
        return Chat([{"role": "user", "content": prompt}] if prompt else [])
    return prompt if isinstance(prompt, Chat) else Chat(prompt)


def completion_messages(completion: Completion) -> list[Message]:
    """A completion as messages; text becomes an assistant message."""
    if isinstance(completion, str):
        return [{"role": "assistant", "content": completion}]
    return [completion] if isinstance(completion, dict) else completion


def prompt_text(prompt: Prompt) -> str:
    """A prompt as one string for raters and reports: text unchanged, messages as "role: content" lines."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {_shown(message)}" for message in prompt)


def completion_text(completion: Completion) -> str:
    """A completion as one string for raters and reports."""
    if isinstance(completion, str):
        return completion
    if isinstance(completion, dict):
        return _shown(completion)
    return prompt_text(completion)


def _shown(message: Message) -> str:
    calls = message.get("tool_calls") or message.get("function_call")
    shown = "" if calls is None else json.dumps(calls, ensure_ascii=False)
    return "\n".join(part for part in (message.get("reasoning_content"), message.get("content"), shown) if part)
