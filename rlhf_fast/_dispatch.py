# SPDX-License-Identifier: Apache-2.0
"""Which backend serves a call: auto | native | triton | torch.

A backend is an operator namespace with the same schemas (see `ops/_register.py`), so choosing one is choosing
`torch.ops.rlhf_fast` (native: C++ and CUDA), `torch.ops.rlhf_fast_triton`, or `torch.ops.rlhf_fast_torch` (the
reference in PyTorch). `auto` takes the first of them, in this order, that serves the op, device and dtype; a backend
chosen by name serves the call or raises.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from rlhf_fast import _ext, _triton

NAMESPACES = {"native": _ext.NAMESPACE, "triton": _triton.NAMESPACE, "torch": "rlhf_fast_torch"}
BY_SPEED = tuple(NAMESPACES)
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Public op -> the operator whose kernels decide which backend serves it, or "". Filled by the ops.
KERNEL_OF: dict[str, str] = {}


def served_by(kernel: str, *ops: str) -> None:
    """The public functions `ops` run on backends with kernels for the operator `kernel`. For linear_* that is the row
    operator that they use."""
    KERNEL_OF.update(dict.fromkeys(ops, kernel))


def served_by_reference(*ops: str) -> None:
    """Only the torch backend serves the public functions `ops`: they have no kernels yet."""
    KERNEL_OF.update(dict.fromkeys(ops, ""))


# (kernel, device type) that the extension registered; filled once by `find_native_kernels`, when all ops are defined.
_native: frozenset[tuple[str, str]] = frozenset()


def find_native_kernels() -> None:
    """Queries the dispatcher once, so that `select` is plain Python that torch.compile can trace."""
    global _native
    devices = ("cpu", "cuda") if torch.version.hip is None else ("cpu",)  # ROCm's tensors call themselves cuda
    pairs = {(kernel, device) for kernel in KERNEL_OF.values() if kernel for device in devices}
    _native = frozenset(pair for pair in pairs if _ext.has_kernel(*pair))


def _checked(name: str, source: str) -> str:
    if name != "auto" and name not in NAMESPACES:
        raise ValueError(f"{source}: backend must be one of auto, {', '.join(NAMESPACES)}, got {name!r}")
    return name


_requested = _checked(os.environ.get("RLHF_FAST_BACKEND") or "auto", "RLHF_FAST_BACKEND")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block every op uses this backend, or raises if the backend cannot serve the call.

    name: "auto" (the default outside), "native" (compiled C++/CUDA), "triton" or "torch" (the reference).
    Applies to the whole process, not to one thread. A backward runs on the backend of its forward.

    Raises:
        ValueError: on an unknown name.
    """
    global _requested
    previous, _requested = _requested, _checked(name, "rlhf_fast.use_backend")
    try:
        yield
    finally:
        _requested = previous


def may_be(backend: str) -> bool:
    """Whether neither `use_backend` nor RLHF_FAST_BACKEND requests another backend than this one."""
    return _requested in ("auto", backend)


def why_not(
    backend: str, op: str, device_type: str, dtype: torch.dtype = torch.float32, index: int | None = None
) -> str:
    """Empty if the backend serves the op on this device (index None: the current one), else the reason why not."""
    if backend == "torch":
        return ""
    if not KERNEL_OF[op]:
        return "the op has no kernels, only the reference in PyTorch"
    if backend == "native":
        if _ext.why_not:
            return _ext.why_not
        if (KERNEL_OF[op], device_type) not in _native:
            reason = _ext.LEFT_OUT.get(device_type)
            return f"this build holds no {device_type} kernels" + (f" ({reason})" if reason else "")
        if reason := _ext.why_not_native_gpu(device_type, index):
            return reason
    if backend == "triton" and (reason := _triton.why_not(KERNEL_OF[op], device_type, index)):
        return reason
    return "" if dtype in KERNEL_DTYPES else f"only the torch backend serves {dtype}"


class _Call(threading.local):
    public = ""


_call = _Call()  # the public function that this thread called last


def name_call(public: str) -> None:
    """Says which public function runs: several share an operator, and its errors shall name the one that was called."""
    if not torch.compiler.is_compiling():
        _call.public = public


def public_name(candidates: tuple[str, ...]) -> str:
    """Which of these public functions was called; the first where that is not known (torch.ops, torch.compile)."""
    return _call.public if _call.public in candidates else candidates[0]


def select(op: str, tensor: torch.Tensor) -> Any:
    """The operator namespace that serves `op` on tensors like this one (the return type is torch.ops' own)."""
    name_call(op)
    for backend in BY_SPEED if _requested == "auto" else (_requested,):
        reason = why_not(backend, op, tensor.device.type, tensor.dtype, tensor.device.index)
        if not reason:
            return getattr(torch.ops, NAMESPACES[backend])
    raise RuntimeError(f"rlhf_fast.{op}: the {_requested} backend was requested, but {reason}; use 'auto' or 'torch'")


def call(operator: Any, *args: Any) -> Any:
    """Calls an operator, without autograd's layer if no gradient can be needed.

    That layer is a Python function which takes as long as a small kernel (about 10 us). Tracing needs it, and so do
    torch.func's transforms and forward mode, because it raises the errors for them (`ops/_register.py`).
    """
    if (
        torch.compiler.is_compiling()
        or (torch.is_grad_enabled() and torch._C._any_requires_grad(*args))
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    ):
        return operator(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


def is_unobserved(*args: Any) -> bool:
    """Whether nothing traces, transforms or records calls, so that PyTorch's own code may stand for an operator."""
    tensors = [x for x in args if isinstance(x, torch.Tensor)]
    return not (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or any(type(x) not in (torch.Tensor, torch.nn.Parameter) for x in tensors)
    )


class Served(NamedTuple):
    """One row of `backends()`."""

    op: str
    device: str
    backend: str
    why_not_faster: str


class BackendTable(tuple[Served, ...]):
    """The rows of `backends()`; prints as a table."""

    def __str__(self) -> str:
        header = Served("op", "device", "backend", "why not a faster one")
        widths = [max(len(row[i]) for row in (header, *self)) for i in range(4)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in (header, *self)]
        return "\n".join(line.rstrip() for line in lines)


def backends() -> BackendTable:
    """Which backend serves each op on each device, and why not a faster one."""
    devices = ["cpu"] + [name for name in ("cuda", "xpu") if getattr(torch, name).is_available()]
    return BackendTable(_served(op, device) for op in KERNEL_OF for device in devices)


def _served(op: str, device: str) -> Served:
    if _requested != "auto":
        reason = why_not(_requested, op, device)
        origin = "requested by use_backend or RLHF_FAST_BACKEND"
        return Served(op, device, "none" if reason else _requested, f"{origin}, but {reason}" if reason else origin)
    reasons = {}
    for backend in BY_SPEED:
        if not (reason := why_not(backend, op, device)):
            break
        reasons[backend] = reason
    instructions = _ext.cpu_capability() if backend == "native" and device == "cpu" else None
    detail = f" ({instructions})" if instructions else ""
    return Served(op, device, backend + detail, "; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
