# SPDX-License-Identifier: Apache-2.0
"""Registers an op: schema, reference as default kernel, fake and autograd, once in every backend's namespace.

The compiled extension later adds CPU and CUDA kernels to the namespace `rlhf_fast`; where it has none, the
reference runs there too, so an op exists with nothing compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from rlhf_fast._dispatch import NAMESPACES

_definitions: list[Callable[[str], None]] = []  # each defines one op in a namespace


def define(
    name: str,
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any] | None,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Defines `name` with `schema` in every namespace.

    reference: the kernel in PyTorch; one with a parameter `ops` is handed the namespace it runs in.
    backward(ops, ctx, *grads): as for an autograd.Function; calls the namespace's own `..._backward` op.
    """

    def define_in(namespace: str) -> None:
        ops = getattr(torch.ops, namespace)
        qualified = f"{namespace}::{name}"
        torch.library.define(qualified, schema)
        takes_ops = "ops" in reference.__code__.co_varnames[: reference.__code__.co_argcount]
        torch.library.impl(qualified, "default", partial(reference, ops) if takes_ops else reference)
        if fake is not None:
            torch.library.register_fake(qualified, fake)
        if backward is not None:
            torch.library.register_autograd(qualified, partial(backward, ops), setup_context=setup_context)

    _definitions.append(define_in)
    for namespace in NAMESPACES.values():
        define_in(namespace)


def add_backend(name: str, namespace: str) -> None:
    """Defines every op once more, in `namespace`, and lets `use_backend(name)` choose it.

    For kernels that live elsewhere (the tests' emulator of a GPU is one). `auto` never takes it.
    """
    for define_in in _definitions:
        define_in(namespace)
    NAMESPACES[name] = namespace


def define_backward(
    name: str, schema: str, *, reference: Callable[..., Any], fake: Callable[..., Any] | None, of: str
) -> None:
    """Defines the gradient of the public op `of`: differentiating it again raises.

    Without this, autograd would take the gradient for a constant and a double backward would be silently wrong.
    """

    def refuse(ops: Any, ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"rlhf_fast.{of}: double backward is not supported; take the second derivative of a plain PyTorch "
            "expression instead, or drop create_graph=True"
        )

    define(name, schema, reference=reference, fake=fake, setup_context=_nothing_to_save, backward=refuse)


def _nothing_to_save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass
