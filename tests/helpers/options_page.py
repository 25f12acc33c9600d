# SPDX-License-Identifier: Apache-2.0
"""The tables of options in docs/trainer-reference.md, from the dataclasses: `python tests/helpers/options_page.py`."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path
from typing import Any

from tyro._docstrings import get_field_docstring

from rlhf_fast.run.options import RunOptions
from rlhf_fast.run.resume import NEVER_COMPARED
from rlhf_fast.trainer import CollectConfig, PPOConfig, RewardConfig, SFTConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "trainer-reference.md"
SECTIONS: dict[str, Any] = {
    "every phase": RunOptions,
    "sft": SFTConfig,
    "collect": CollectConfig,
    "reward": RewardConfig,
    "ppo": PPOConfig,
}
BLOCK = re.compile(r"(<!-- options of ([a-z ]+) -->\n).*?(<!-- end of options -->)", re.DOTALL)


def rows(section: str) -> list[str]:
    """One row an option: name, default, what it may be, what it does, whether it may change on resume."""
    cls = SECTIONS[section]
    shared = set() if cls is RunOptions else {field.name for field in dataclasses.fields(RunOptions)}
    hints = typing.get_type_hints(cls, include_extras=True)
    found = ["| option | default | values | meaning | on resume |", "| --- | --- | --- | --- | --- |"]
    for field in dataclasses.fields(cls):
        if field.name in shared:
            continue
        text = " ".join((get_field_docstring(cls, field.name, ()) or "").split()).replace("|", "\\|")
        change = "may change" if cls.may_change(field.name) else "fixed"
        change = "not compared" if field.name in NEVER_COMPARED else change
        found.append(f"| `{field.name}` | `{field.default!r}` | {values(hints[field.name])} | {text} | {change} |")
    return found


def values(hint: Any) -> str:
    """The type in words, with its range."""
    ranges = [extra.wanted for extra in getattr(hint, "__metadata__", ()) if hasattr(extra, "wanted")]
    kind = typing.get_args(hint)[0] if hasattr(hint, "__metadata__") else hint
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(kind))
    inner = [part for part in typing.get_args(kind) if part not in (type(None), Ellipsis)]
    if inner and typing.get_origin(kind) is not tuple:
        return values(inner[0])
    name = {bool: "yes or no", int: "whole number", float: "number", str: "text"}.get(kind, "list of texts")
    return ", ".join([name, *ranges])


def page(text: str) -> str:
    """The page with its tables written anew."""
    return BLOCK.sub(lambda found: found[1] + "\n".join(rows(found[2])) + "\n" + found[3], text)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
