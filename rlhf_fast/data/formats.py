# SPDX-License-Identifier: Apache-2.0
"""Rows of ShareGPT and of Alpaca, the formats of LLaMA-Factory and axolotl, with the keys that all readers know.

    ShareGPT  {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}], "system": "..."}
    Alpaca    {"instruction": "...", "input": "...", "output": "...", "system": "...", "history": [["...", "..."]]}

Both become {"messages": [...]}; for feedback, where "chosen" and "rejected" hold the answers, {"prompt": [...]}.
"""

from __future__ import annotations

import json
from typing import Any

Row = dict[str, Any]
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
}
KNOWN = ("prompt", "messages", "text", "completions")  # a row with one of these is left as it is


def usual_keys(row: Row) -> Row:
    """The row with the usual keys if it is one of ShareGPT or Alpaca, else unchanged."""
    if any(key in row for key in KNOWN):
        return row
    if isinstance(row.get("conversations"), list):
        return _with_chat(row, [_message(turn) for turn in row["conversations"]], "conversations")
    if isinstance(row.get("instruction"), str):
        return _alpaca(row)
    return row


def _alpaca(row: Row) -> Row:
    """LLaMA-Factory joins `instruction` and `input` by a line break."""
    messages: list[Any] = []
    history = row.get("history")
    for pair in history if isinstance(history, list) else ():
        if isinstance(pair, list) and len(pair) == 2:
            messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    asked = [part for part in (row["instruction"], row.get("input")) if isinstance(part, str) and part]
    messages.append({"role": "user", "content": "\n".join(asked)})
    if "output" in row:
        messages.append({"role": "assistant", "content": row["output"]})
    return _with_chat(row, messages, "instruction", "input", "output", "history")


def _with_chat(row: Row, messages: list[Any], *used: str) -> Row:
    """The other columns of the row and its messages, which begin with the column `system` if there is one."""
    rest = {key: value for key, value in row.items() if key not in (*used, "system")}
    if isinstance(row.get("system"), str) and row["system"]:
        messages = [{"role": "system", "content": row["system"]}, *messages]
    if "chosen" in row and "rejected" in row:
        return {**rest, "prompt": messages, **{side: _answer(row[side]) for side in ("chosen", "rejected")}}
    return {**rest, "messages": messages}


def _answer(value: Any) -> Any:
    """A side of a pair: text, one turn or several."""
    if isinstance(value, list):
        return [_message(turn) for turn in value]
    message = _message(value)
    return [message] if isinstance(message, dict) else message


def _message(turn: Any) -> Any:
    """A turn with `role` and `content`; anything else is left for the reader to refuse."""
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        return turn
    if turn.get("from") == "function_call":
        try:
            return {"role": "assistant", "tool_calls": [{"type": "function", "function": json.loads(turn["value"])}]}
        except (ValueError, RecursionError):
            return turn
    role = ROLES.get(str(turn.get("from")))
    return turn if role is None else {"role": role, "content": turn["value"]}
