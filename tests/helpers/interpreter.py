# SPDX-License-Identifier: Apache-2.0
"""Turns on Triton's interpreter for the whole test run, where there is no GPU to compile for, and makes it quicker.

It must be on before Triton is imported. On a machine with a GPU the compiled kernels are tested instead.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import inspect
import os
from typing import Any

import torch


def _reason() -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if torch.cuda.is_available():
        return "a GPU is here: the compiled kernels are tested on it"
    versions = [importlib.metadata.version(name).split(".")[:2] for name in ("triton", "numpy")]
    triton, numpy = (tuple(int(part) for part in version) for version in versions)
    if triton < (3, 7) and numpy >= (2, 4):
        return "the interpreter of Triton before 3.7 breaks on NumPy 2.4 and later"
    return ""


why_not = _reason()
usable = not why_not
if usable:
    os.environ["TRITON_INTERPRET"] = "1"


@functools.cache
def quicken() -> None:
    """Let a launch replace the functions of triton.language once.

    The interpreter replaces them by its own for a launch, and then again at every call of a function within the kernel,
    which takes more than half of the time and changes nothing.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    replaced: set[int] = set()  # the modules of the language in this launch
    run = interpreter.GridExecutor.__call__

    def launch(executor: Any, *args: Any, **options: Any) -> Any:
        replaced.clear()
        return run(executor, *args, **options)

    def call(function: Any, *args: Any, **options: Any) -> Any:
        if not (seen := _seen_by(function.fn)) <= replaced:
            interpreter._patch_lang(function.fn)
            replaced.update(seen)
        try:
            return function.rewrite()(*args, **options)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    @functools.cache
    def _seen_by(function: Any) -> frozenset[int]:
        modules = (value for value in function.__globals__.values() if inspect.ismodule(value))
        return frozenset(id(module) for module in modules if module in (tl, tl.core))

    interpreter.GridExecutor.__call__ = launch
    interpreter.InterpretedFunction.__call__ = call
