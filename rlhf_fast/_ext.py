# SPDX-License-Identifier: Apache-2.0
"""The compiled modules: loaded once, here, and if they cannot be, the reason is kept for `rf.backends()`.

`_C` holds the operators (stable ABI; loading it registers the kernels), `_host` tells about the host and the build.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType

import torch

NAMESPACE = "rlhf_fast"
OLDEST_GPU = (8, 0)  # compute capability: bfloat16 came with it
CPU_CAPABILITIES = ("default", "avx2", "avx512")

if os.environ.get("RLHF_FAST_CPU", "default") not in CPU_CAPABILITIES:
    raise ValueError(f"RLHF_FAST_CPU must be one of {', '.join(CPU_CAPABILITIES)}, got {os.environ['RLHF_FAST_CPU']!r}")


def _left_out() -> dict[str, str]:
    """What setup.py left out of this installation ("extension", "cuda") and why."""
    note = Path(__file__).with_name("_left_out.txt")
    lines = note.read_text().splitlines() if note.exists() else []
    return dict(line.split(": ", 1) for line in lines)


LEFT_OUT = _left_out()


def _load(name: str) -> tuple[ModuleType | None, str]:
    """The module, or why there is none."""
    try:
        return importlib.import_module(f"rlhf_fast.{name}"), ""
    except ModuleNotFoundError:
        reason = LEFT_OUT.get("extension", "no compiler at install time, or RLHF_FAST_EXT=0")
        return None, f"the extension is not built ({reason})"
    except ImportError as error:  # built for another platform or an older torch: worth its own words
        return None, f"the extension does not load: {error}"


_C, why_not = _load("_C")
_host, _ = _load("_host")


def has_kernel(op: str, device_type: str) -> bool:
    """Whether the extension registered a kernel of `op` for the device."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    if _C is None or key is None:
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", key)


_gpu_refused: str | None = None  # asked once, and never while torch.compile traces, which cannot follow the question


def why_not_gpu(device_type: str) -> str:
    """Empty when the current GPU can run the compiled kernels, native and Triton alike, else the reason."""
    global _gpu_refused
    if device_type != "cuda" or torch.version.hip is not None:
        return ""
    if _gpu_refused is None and not torch.compiler.is_compiling():
        major, minor = torch.cuda.get_device_capability()
        wanted = "{}.{}".format(*OLDEST_GPU)
        old = f"the GPU has compute capability {major}.{minor}, and the kernels need {wanted}"
        _gpu_refused = old if (major, minor) < OLDEST_GPU else ""
    return _gpu_refused or ""


def cpu_capability() -> str | None:
    """Instruction set that the CPU kernels use now: "default", "avx2" or "avx512"; None where `_host` is missing.

    Wheels from the index hold no `_host`: pybind11 would tie them to one Python.
    """
    return None if _host is None else _host.cpu_capability()


def build_info() -> dict[str, str]:
    """Compiler, instruction sets and CUDA architectures of the build; empty where `_host` is missing."""
    return {} if _host is None else dict(_host.build_info())
