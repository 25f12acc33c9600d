# SPDX-License-Identifier: Apache-2.0
"""Small helpers that the test files share: run an op with gradients, random inputs, ways to lay a tensor out badly."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_fast import _ext

HALF = (torch.float16, torch.bfloat16)
NAN = float("nan")
INF = float("inf")


def native_is_built() -> bool:
    """Whether the compiled operators are loaded; `test_native_backend_is_built` fails loudly where they should be."""
    return _ext._C is not None


def native_is_wanted() -> bool:
    return os.environ.get("RLHF_FAST_EXT", "1") != "0"


def upcast(x: Any) -> Any:
    """The same thing in float64 (floating tensors only; everything else unchanged)."""
    return x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x


def named_outputs(result: Any) -> dict[str, Tensor]:
    """A tensor, a (named) tuple or a dict as {name: tensor}, without what was not asked for."""
    if isinstance(result, Tensor):
        return {"out": result}
    if hasattr(result, "_asdict"):
        result = result._asdict()
    elif not isinstance(result, Mapping):
        result = {str(i): x for i, x in enumerate(result)}
    return {name: x for name, x in result.items() if x is not None}


def incoming(name: str, out: Tensor) -> Tensor:
    """A fixed random gradient for one output, the same numbers in whatever dtype it is wanted."""
    seed = sum(ord(c) * 31**i for i, c in enumerate(name)) % 2**31
    values = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return values.to(out.dtype)


def with_gradients(
    op: Callable[..., Any], inputs: dict[str, Tensor], *, grads_of: tuple[str, ...] | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Run `op(**inputs)` with every input a leaf that requires grad; return outputs and gradients by name.

    `grads_of` names the outputs that receive a gradient; None takes every differentiable one.
    """
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    outputs = named_outputs(op(**leaves))
    chosen = {n: x for n, x in outputs.items() if x.requires_grad and (grads_of is None or n in grads_of)}
    grads = torch.autograd.grad(
        list(chosen.values()),
        list(leaves.values()),
        [incoming(n, x) for n, x in chosen.items()],
        allow_unused=True,
    )
    return {n: x.detach() for n, x in outputs.items()}, dict(zip(leaves, grads, strict=True))


def randn(*shape: int, generator: torch.Generator, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normal numbers, rounded to `dtype` once, so that truth and op see the same values."""
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def randint(high: int, *shape: int, generator: torch.Generator) -> Tensor:
    return torch.randint(high, shape, generator=generator)


def random_mask(*shape: int, generator: torch.Generator, share: float = 0.6) -> Tensor:
    return torch.rand(shape, generator=generator) < share


def scribble(targets: Tensor, mask: Tensor) -> Tensor:
    """Targets (...) or (..., K) with ids that exist nowhere wherever the mask is False."""
    junk = torch.tensor([-100, -(2**63), 2**63 - 1, 2**31, -1])
    junk = junk[torch.arange(targets.numel()) % junk.numel()].view(targets.shape)
    return torch.where(mask if targets.dim() == mask.dim() else mask.unsqueeze(-1), targets, junk)


def shifted_storage(x: Tensor) -> Tensor:
    """The same values one element past an aligned address: vector loads must not assume alignment."""
    flat = torch.empty(x.numel() + 1, dtype=x.dtype)
    flat[1:] = x.reshape(-1)
    return flat[1:].view(x.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "unaligned": shifted_storage,
    "sliced": lambda x: torch.cat([x, x[:, :1]], dim=1)[:, :-1],
    "first_dims_transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "last_dim_strided": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every_other_column": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "padded_columns": lambda x: torch.cat([x, torch.full_like(x[..., :3], NAN)], dim=-1)[..., :-3],
}


class Recorder(TorchDispatchMode):
    """Notes every call of an rlhf_fast operator, with copies of its arguments, on its way to the kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace.startswith("rlhf_fast"):
            copies = tuple(x.detach().clone() if isinstance(x, Tensor) else x for x in args)
            self.calls.append((func, copies, dict(kwargs or {})))
        return func(*args, **(kwargs or {}))
