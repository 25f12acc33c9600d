# SPDX-License-Identifier: Apache-2.0
"""Raters: functions named `module:function` or `file.py:function` that give each completion a number."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from rlhf_fast.data.examples import Prompt, prompt_text
from rlhf_fast.distributed.limits import NAME, longest_call
from rlhf_fast.errors import UserError

from .columns import Columns, first_two, parameters_of


class RaterError(UserError):
    """A rater raised, or did not return one finite number for each completion."""


@dataclass(frozen=True)
class Rater:
    """A function that rates completions, with its results checked at every call."""

    spec: str
    function: Callable[..., Any]

    def __call__(self, prompt: Prompt, completions: Sequence[str], /, **columns: Any) -> list[float]:
        """(K,) ratings. The function gets those of the prompt's `columns` that it has parameters for, or all if it
        takes **any; None for one that it must have and the row lacks.

        Raises RaterError naming the prompt if the function raises or does not return one finite number for each
        completion.
        """
        shown = f"rater {self.spec!r} on the prompt {prompt_text(prompt)[:80]!r}"
        taken = {name: columns.get(name) for name in self.columns.taken(columns)}
        return finite_numbers(lambda: self.function(prompt, completions, **taken), completions, shown, "ratings")

    @cached_property
    def columns(self) -> Columns:
        """The columns that the function takes."""
        parameters = parameters_of(self.function)
        return Columns.of(parameters, first_two(parameters))

    def check_columns(self, lines: Sequence[object]) -> None:
        """UserError if the function must have a column which no prompt of `lines` has."""
        self.columns.check(f"rater {self.spec!r}", lines)


def load_rater(spec: str) -> Rater:
    """The function that `module:function` or `file.py:function` names, as a rater."""
    return Rater(spec, load_function(spec))


def finite_numbers(call: Callable[[], Any], texts: Sequence[str], shown: str, noun: str) -> list[float]:
    """What `call()` returns; RaterError about `shown` and `noun` unless that is one finite number for each text.

    Also if it takes longer than `longest_call()`.
    """
    limit = longest_call()
    try:
        with interrupted_after(limit):
            numbers = [float(number) for number in call()]
    except Exception as error:
        raise RaterError(f"{shown} raised {type(error).__name__}: {error}") from error
    if len(numbers) != len(texts):
        raise RaterError(f"{shown} returned {len(numbers)} {noun} for {len(texts)} completions")
    for number, text in zip(numbers, texts, strict=True):
        if not math.isfinite(number):
            raise RaterError(f"{shown} returned {number} for {text[:80]!r}; {noun} must be finite")
    return numbers


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Raise TimeoutError within the block if it takes longer, and after it if the block catches that.

    By SIGALRM, which wakes a function that waits for a server or a lock. Does nothing for 0 seconds, on Windows,
    outside of the main thread, and where someone else uses the signal.
    """
    alarm: Any = getattr(signal, "SIGALRM", None)
    usable = alarm is not None and threading.current_thread() is threading.main_thread()
    if not usable or seconds <= 0 or signal.getsignal(alarm) is not signal.SIG_DFL:
        yield
        return

    message = f"no answer after {seconds:g} s ({NAME}; 0: no limit)"
    late = over = False

    def wake(number: int, frame: FrameType | None) -> None:
        nonlocal late
        if not over:
            late = True
            raise TimeoutError(message)

    signal.signal(alarm, wake)
    signal.setitimer(signal.ITIMER_REAL, seconds, 10.0)  # and again, should the function catch it
    caught: Exception | None = None
    try:
        yield
    except Exception as error:
        if not late:
            raise
        caught = error
    finally:
        over = True
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        if signal.getsignal(alarm) is wake:
            signal.signal(alarm, signal.SIG_DFL)
    if late:  # also if the function caught it, and answered with something else
        raise TimeoutError(message) from caught


def load_function(spec: str, noun: str = "rater") -> Callable[..., Any]:
    """The function that `module:function` or `file.py:function` names; UserError, about a `noun`, if there is none."""
    source, _, name = spec.rpartition(":")
    function = getattr(_load_module(source, spec, noun), name, None)
    if not callable(function):
        raise UserError(f"{noun} {spec!r}: {source} has no function {name!r}")
    return function


def _load_module(source: str, spec: str, noun: str) -> ModuleType:
    if not source:
        raise UserError(f"{noun} must be module:function or file.py:function, got {spec!r}")
    try:
        if not source.endswith(".py"):
            return importlib.import_module(source)
        if not Path(source).is_file():
            raise UserError(f"{noun} {spec!r}: there is no file {source}")
        return _module_of(Path(source).resolve())
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{noun} {spec!r}: importing {source} raised {type(error).__name__}: {error}") from error


class _FromSource(SourceFileLoader):
    """Never takes what an earlier version of a file was compiled to, which Python tells apart by seconds."""

    def path_stats(self, path: str) -> Mapping[str, Any]:  # type: ignore[override]
        """OSError: nothing is known that compiled code could be compared with."""
        raise OSError(f"{path} is read itself")


def _module_of(file: Path) -> ModuleType:
    """The module of a file, executed once for all functions of it, as an import would be, and again if it changed.

    Its folder is searched for modules from then on, as Python does for a script, but last. It is in sys.modules, where
    dataclasses and pickle look for it, under a name that no other module has.
    """
    stat = file.stat()
    version = hashlib.sha256(f"{file} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
    name = f"rlhf_fast_file_{version}_{file.stem}"
    if name in sys.modules:
        return sys.modules[name]
    module_spec = importlib.util.spec_from_file_location(name, file, loader=_FromSource(name, str(file)))
    assert module_spec is not None and module_spec.loader is not None  # that given
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))  # last, so that the files there hide no installed module
    try:
        module_spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
