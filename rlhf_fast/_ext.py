# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled modules, once; if one cannot be loaded, keeps the reason for `rf.backends()`.

`_C` holds the operators (stable ABI; loading it registers the kernels), `_host` describes the build.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch

from . import _built_from

NAMESPACE = "rlhf_fast"
OLDEST_GPU = (8, 0)  # compute capability; the first with bfloat16
CPU_CAPABILITIES = ("default", "avx2", "avx512")
Query = TypeVar("Query", bound=Callable[..., Any])

if os.environ.get("RLHF_FAST_CPU", "default") not in CPU_CAPABILITIES:
    raise ValueError(f"RLHF_FAST_CPU must be one of {', '.join(CPU_CAPABILITIES)}, got {os.environ['RLHF_FAST_CPU']!r}")


def _left_out() -> dict[str, str]:
    """What setup.py left out of this installation ("extension", "cuda") and why."""
    note = Path(__file__).with_name("_left_out.txt")
    lines = note.read_text().splitlines() if note.exists() else []
    return dict(line.split(": ", 1) for line in lines)


LEFT_OUT = _left_out()


STALE = _built_from.stale(Path(__file__).parent)


def _load(name: str) -> tuple[ModuleType | None, str]:
    """The module, or why there is none."""
    if STALE and importlib.util.find_spec(f"rlhf_fast.{name}") is not None:
        return None, STALE
    try:
        return importlib.import_module(f"rlhf_fast.{name}"), ""
    except ModuleNotFoundError:
        reason = LEFT_OUT.get("extension", "no compiler at install time, or RLHF_FAST_EXT=0")
        return None, f"the extension is not built ({reason})"
    except ImportError as error:  # built for another platform or an older torch
        return None, f"the extension does not load: {error}"


_C, why_not = _load("_C")
_host, _ = _load("_host")
if why_not == STALE != "":
    warnings.warn(f"rlhf_fast works without its compiled kernels: {STALE}", stacklevel=2)


def has_kernel(op: str, device_type: str) -> bool:
    """Whether the extension registered a kernel of `op` for the device."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    if _C is None or key is None:
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", key)


# GPU's index -> why it is refused, or ''.
_gpu_refused: dict[int, str] = {}
_native_refused: dict[int, str] = {}


def why_not_gpu(device_type: str, index: int | None = None) -> str:
    """Empty if this GPU (None: the current one) can run native and Triton kernels, else the reason why not."""
    if device_type != "cuda" or torch.version.hip is not None:
        return ""
    return _refused(index, False)


def why_not_native_gpu(device_type: str, index: int | None = None) -> str:
    """Empty if the extension's kernels run on this GPU, else why not: an old driver, a missing architecture."""
    if device_type != "cuda" or torch.version.hip is not None:
        return ""
    return why_not_gpu(device_type, index) or _refused(index, True)


def constant_in_graphs(query: Query) -> Query:
    """torch.compile does not trace the function, but calls it and takes its answer for a constant.

    The first call of an op may be a compiled one, and the answer decides what it calls. Does what
    torch.compiler.assume_constant_result does, which would import the whole compiler here.
    """
    query._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return query


@constant_in_graphs
def _refused(index: int | None, native: bool) -> str:
    known, ask = (_native_refused, _why_not_native) if native else (_gpu_refused, _why_not_capability)
    if index in known:
        return known[index]
    if not torch.cuda.is_available():  # the tensor is a fake one
        return ""
    index = torch.cuda.current_device() if index is None else index
    if index not in known:
        known[index] = ask(index)
    return known[index]


def _why_not_capability(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    wanted = "{}.{}".format(*OLDEST_GPU)
    old = f"the GPU has compute capability {major}.{minor}, and the kernels need {wanted}"
    return old if (major, minor) < OLDEST_GPU else ""


def _why_not_native(index: int) -> str:
    """Launches a tiny kernel: the extension has its own CUDA runtime, which may be newer than the driver."""
    ask: Callable[[int], str] = getattr(_C, "why_not_cuda", lambda index: "this build holds no CUDA kernels")
    return ask(index)


def cpu_capability() -> str | None:
    """Instruction set that the CPU kernels use now: "default", "avx2" or "avx512"; None without the extension."""
    return None if _C is None else _C.cpu_capability()


def cap_cpu(name: str) -> None:
    """Limits that instruction set from now on, as RLHF_FAST_CPU does from the start; for tests."""
    if _C is not None:
        _C.cap_cpu(name)


def build_info() -> dict[str, str]:
    """Compiler, instruction sets and CUDA architectures of the build; empty without `_host`.

    Wheels from the index have no `_host`, since pybind11 would restrict them to one Python version.
    """
    return {} if _host is None else dict(_host.build_info())
