# SPDX-License-Identifier: Apache-2.0
"""Reward functions of the user: `module:function`, `file.py:function` or a server's URL, weighted as `0.5*file.py:f`.

Two signatures, told apart by the names of the parameters:

    def right(prompt, completions, answer): ...          one prompt and its K completions; `answer` is its row's column
    def right(prompts, completions, answer): ...         TRL's: lists over all completions, columns as well, by keyword
    def right(completions, answer, **columns): ...       TRL's too, which may leave `prompts` out

Each returns one number per completion, or None for a completion that it does not score: the sum is then of the other
functions, as in TRL, and a completion that nothing scores ends the run. A function gets the columns of the data file
that its parameters name, or all of them if it takes `**columns`.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any
from urllib.parse import urlsplit

from rlhf_fast.data.examples import PromptLine, prompt_text
from rlhf_fast.errors import UserError
from rlhf_fast.feedback.columns import Columns, first_two, parameters_of
from rlhf_fast.feedback.raters import finite_numbers, load_function

from .remote_reward import RemoteReward

OURS = ("prompt", "completions")
OF_PAIRS = ("chosen", "rejected", "margins", "accuracies")  # `pair_metrics` of dpo: such a function is always numbered


@dataclass(frozen=True)
class RewardFunction:
    """One function and its weight."""

    name: str  # as in metrics
    spec: str
    weight: float
    function: Callable[..., Any]

    def of_prompts(self, prompts: Sequence[PromptLine], texts: Sequence[str]) -> list[float]:
        """(B,) rewards of `texts`, NaN where it returned None; equally many per prompt, grouped by prompt."""
        samples = len(texts) // len(prompts)
        if self.takes_all:
            lines = [line for line in prompts for _ in range(samples)]
            lists: dict[str, Any] = {
                name: [line.columns.get(name) for line in lines] for name in self.columns_taken(lines)
            }
            shown = [as_messages(line, text) for line, text in zip(lines, texts, strict=True)]
            samples_of = {"prompts": [line.prompt for line in lines], "completions": shown}
            lists |= {
                name: value for name, value in samples_of.items() if name in self.parameters or self.columns.every
            }
            return self.checked(partial(self.function, **lists), prompts[0], texts)
        numbers: list[float] = []
        for place, line in enumerate(prompts):
            part = list(texts[place * samples : (place + 1) * samples])
            columns = {name: line.columns.get(name) for name in self.columns_taken([line])}
            numbers += self.checked(partial(self.function, line.prompt, part, **columns), line, part)
        return numbers

    @property
    def takes_all(self) -> bool:
        """Whether it has TRL's signature: it names `prompts`, begins with `completions`, or takes keywords alone."""
        first = next(iter(self.parameters.values()), None)
        return "prompts" in self.parameters or (
            first is not None and (first.name == "completions" or first.kind is first.VAR_KEYWORD)
        )

    @cached_property
    def columns(self) -> Columns:
        """The columns that it takes."""
        own = () if self.takes_all else first_two(self.parameters)
        return Columns.of(self.parameters, {*OURS, "prompts", *own})

    @cached_property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """Its parameters by name."""
        return parameters_of(self.function)

    def columns_taken(self, lines: Sequence[PromptLine]) -> list[str]:
        """The names of the columns that it takes; one that it must have and no row of `lines` has is given as None."""
        return self.columns.taken(dict.fromkeys(name for line in lines for name in line.columns))

    def checked(self, call: Callable[[], Any], line: PromptLine, texts: Sequence[str]) -> list[float]:
        """The numbers that `call()` returns, NaN for None; RaterError unless there is one finite number per text."""
        shown = f"reward function {self.spec!r} on the prompt {prompt_text(line.prompt)[:80]!r} ({line.where})"
        unscored: set[int] = set()

        def numbers() -> list[Any]:
            answers = call()
            if inspect.isawaitable(answers):  # of an `async def`, as TRL takes them
                answers = _result_of(answers)
            answers = list(answers)
            unscored.update(place for place, number in enumerate(answers) if number is None)
            return [0.0 if number is None else number for number in answers]

        checked = finite_numbers(numbers, texts, shown, "rewards")
        return [math.nan if place in unscored else number for place, number in enumerate(checked)]


def _result_of(answers: Any) -> Any:
    """What an awaitable gives, in the one event loop of all calls: clients of a module are bound to the first loop."""
    future = asyncio.run_coroutine_threadsafe(_awaited(answers), _loop())
    try:
        return future.result()
    except BaseException:
        future.cancel()  # if it took too long
        raise


async def _awaited(answers: Any) -> Any:
    return await answers


@lru_cache(maxsize=1)
def _loop() -> asyncio.AbstractEventLoop:
    """Runs in a thread of its own, as this one may be running a loop (Jupyter)."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="reward functions", daemon=True).start()
    return loop


def check_columns(functions: Sequence[RewardFunction], lines: Sequence[object]) -> None:
    """UserError naming a function that must have a column which no prompt of `lines` has."""
    for function in functions:
        function.columns.check(f"reward function {function.spec!r}", lines)


def as_messages(line: PromptLine, text: str) -> str | list[dict[str, str]]:
    """A completion as TRL gives it: text, or the assistant's message if the prompt is messages."""
    return text if isinstance(line.prompt, str) else [{"role": "assistant", "content": text}]


def load_functions(specs: Sequence[str]) -> list[RewardFunction]:
    """Each "module:function", "file.py:function" or "http://server/path" of the options, some with "0.5*" before."""
    functions: list[RewardFunction] = []
    for text in specs:
        weight, star, spec = (part.strip() for part in text.rpartition("*"))
        try:
            number = float(weight) if star else 1.0
        except ValueError:
            raise UserError(f"reward_functions: {weight!r} before the * in {text!r} is no number") from None
        if not math.isfinite(number):
            raise UserError(f"reward_functions: the weight in {text!r} must be finite")
        remote = spec.startswith(("http://", "https://"))
        name = urlsplit(spec).netloc if remote else spec.rpartition(":")[2]
        count = sum(function.name.partition("#")[0] == name for function in functions)
        function = RemoteReward(spec) if remote else load_function(spec, "reward function")
        numbered = f"{name}#{count + 1}" if count or name in OF_PAIRS else name
        functions.append(RewardFunction(numbered, spec, number, function))
    return functions
