# SPDX-License-Identifier: Apache-2.0
"""Which columns of a prompt's row a user's function takes: those that its parameters name, or all with `**columns`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_fast.data.examples import PromptLine
from rlhf_fast.errors import UserError

VARIADIC = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


@dataclass(frozen=True)
class Columns:
    """The columns that one function takes by keyword."""

    named: dict[str, bool]  # name of each that a parameter names -> whether it must be given, having no default
    every: bool  # it has **columns, and takes all others too
    own: Collection[str]  # parameters that are not columns

    @classmethod
    def of(cls, parameters: Mapping[str, inspect.Parameter], own: Collection[str]) -> Columns:
        """Of a function with these `parameters`, of which those named `own` are no columns."""
        named = {p.name: p.default is p.empty for p in parameters.values() if p.kind not in VARIADIC}
        every = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        return cls({name: needed for name, needed in named.items() if name not in own}, every, own)

    def taken(self, known: Collection[str]) -> list[str]:
        """Of the columns `known`, those that it takes, and all that it must have, known or not."""
        taken = [name for name in known if name in self.named or (self.every and name not in self.own)]
        return [*taken, *(name for name, needed in self.named.items() if needed and name not in known)]

    def check(self, shown: str, lines: Sequence[object]) -> None:
        """UserError about the function that is `shown` if it must have a column which no prompt of `lines` has."""
        prompts = [line for line in lines if isinstance(line, PromptLine)]
        known = dict.fromkeys(name for line in prompts for name in line.columns)
        missing = [name for name, needed in self.named.items() if needed and name not in known]
        if missing and prompts:
            file, has = prompts[0].where.rpartition(":")[0], ", ".join(known) or "none"
            raise UserError(
                f"{shown} takes {', '.join(missing)}, which no row of {file} has; its columns beside the prompt: {has}"
            )


def parameters_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Its parameters by name; none of a built-in without a signature."""
    try:
        return dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return {}


def first_two(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    """The names of the parameters that a prompt and its completions go to, by position."""
    return [p.name for p in list(parameters.values())[:2] if p.kind is not p.KEYWORD_ONLY]
