# SPDX-License-Identifier: Apache-2.0
"""Turns on Triton's interpreter for the whole test run, where there is no GPU to compile for.

It must be on before Triton is imported. On a machine with a GPU the compiled kernels are tested instead.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os

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
