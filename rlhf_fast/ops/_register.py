# SPDX-License-Identifier: Apache-2.0
"""Registers an op in every backend's namespace: schema, reference as default kernel, fake and autograd.

The compiled extension later adds CPU and CUDA kernels to the namespace `rlhf_fast`; where it has none, the reference
runs there too, so every op exists with nothing compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from rlhf_fast._dispatch import NAMESPACES, name_call, public_name

_definitions: list[Callable[[str], None]] = []  # each defines one op in a namespace
_libraries: list[torch.library.Library] = []  # registrations live only as long as their Library object


class Derivative(NamedTuple):
    """The gradient of an operator for autograd.

    backward(ops, ctx, *grads): as in an autograd.Function; calls the `..._backward` operator of the namespace `ops`.
    """

    setup_context: Callable[..., None]
    backward: Callable[..., Any]


def define(
    name: str,
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any] | None,
    derivative: Derivative | None = None,
    public: tuple[str, ...] = (),
) -> None:
    """Defines `name` with `schema` in every namespace.

    reference: the kernel in PyTorch; if it has a parameter `ops`, it gets the namespace it runs in.
    public: the public functions that call it, for messages; none = the function of the same name.
    """
    public = public or (name,)

    def define_in(namespace: str) -> None:
        ops = getattr(torch.ops, namespace)
        qualified = f"{namespace}::{name}"
        torch.library.define(qualified, schema)
        takes_ops = "ops" in reference.__code__.co_varnames[: reference.__code__.co_argcount]
        torch.library.impl(qualified, "default", partial(reference, ops) if takes_ops else reference)
        if fake is not None:
            torch.library.register_fake(qualified, fake)
        if derivative is not None:
            library = _CheckedLibrary(namespace, public, derivative is CONSTANT)
            _libraries.append(library)
            torch.library.register_autograd(
                qualified, partial(_checked_backward, partial(derivative.backward, ops)),
                setup_context=partial(_named_setup, public, derivative.setup_context), lib=library,
            )  # fmt: skip

    _definitions.append(define_in)
    for namespace in NAMESPACES.values():
        define_in(namespace)


def add_backend(name: str, namespace: str) -> None:
    """Defines every op also in `namespace`, which `use_backend(name)` then chooses.

    For kernels from elsewhere, such as the tests' GPU emulator. `auto` never chooses it.
    """
    for define_in in _definitions:
        define_in(namespace)
    NAMESPACES[name] = namespace


def define_backward(
    name: str, schema: str, *, reference: Callable[..., Any], fake: Callable[..., Any] | None, of: tuple[str, ...]
) -> None:
    """Defines the gradient of the public functions `of`: differentiating it again raises.

    Otherwise autograd would treat the gradient as a constant, and a double backward would be silently wrong.
    """
    define(name, schema, reference=reference, fake=fake, derivative=Derivative(_save_nothing, _refuse), public=of)


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _refuse(ops: Any, ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        f"rlhf_fast.{ctx.public}: double backward is not supported; take the second derivative of a plain PyTorch "
        "expression instead, or drop create_graph=True"
    )


def _mark_constant(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.mark_non_differentiable(*(output if isinstance(output, tuple) else (output,)))


# Of an operator whose results are constants to autograd, as advantages are in every policy loss.
CONSTANT = Derivative(_mark_constant, lambda ops, ctx, *grads: None)


# ----------------------------------------------------------------------------------------------- what is refused


class _CheckedLibrary(torch.library.Library):
    """Registers autograd kernels that first refuse calls which PyTorch would answer wrongly or with an unclear error.

    PyTorch also calls a kernel of `register_autograd` with dual tensors, and silently drops their tangents.
    """

    def __init__(self, namespace: str, public: tuple[str, ...], constant: bool) -> None:
        super().__init__(namespace, "FRAGMENT")  # type: ignore[no-untyped-call]
        self.public, self.constant = public, constant

    def impl(self, op_name: Any, fn: Any, dispatch_key: str = "", **options: Any) -> None:
        if dispatch_key == "Autograd":
            fn = partial(_checked_forward, self.public, self.constant, fn)
        super().impl(op_name, fn, dispatch_key, **options)  # type: ignore[no-untyped-call]


def _checked_forward(
    public: tuple[str, ...], constant: bool, kernel: Callable[..., Any], keyset: Any, *args: Any, **kwargs: Any
) -> Any:
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
    what, otherwise = "", ""
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        what = "forward-mode differentiation (torch.func.jvp, torch.func.jacfwd, torch.autograd.forward_ad) is"
    elif torch.is_grad_enabled() and any(
        x.requires_grad and torch._C._functorch.is_gradtrackingtensor(x) for x in tensors
    ):
        what = "torch.func.grad, torch.func.vjp and torch.func.jacrev are"
        otherwise = ", or detach the tensors that it is called with"
    if what:
        instead = "use torch.autograd.grad or torch.autograd.functional.jacobian, or write this part in plain PyTorch"
        if constant:
            instead = f"use its results as constants: compute them outside of it{otherwise}"
        raise NotImplementedError(f"rlhf_fast.{public_name(public)}: {what} not supported; {instead}")
    return kernel(keyset, *args, **kwargs)


def _named_setup(public: tuple[str, ...], setup_context: Callable[..., None], ctx: Any, **given: Any) -> None:
    ctx.public = public_name(public)
    setup_context(ctx, **given)


def _checked_backward(backward: Callable[..., Any], ctx: Any, *grads: Any) -> Any:
    """`backward`, with an error in our words where a batch of gradients meets an operator that cannot take one."""
    name_call(ctx.public)
    if not any_batched(grads):
        return backward(ctx, *grads)
    try:
        return backward(ctx, *grads)
    except RuntimeError as error:
        raise NotImplementedError(
            f"rlhf_fast.{ctx.public}: a batch of gradients (is_grads_batched=True, vectorize=True, torch.vmap around a "
            "backward) is not supported; call torch.autograd.grad once for each"
        ) from error


def any_batched(tensors: Iterable[Any]) -> bool:
    """Whether one of them is a batch: inside torch.vmap, or a gradient of `is_grads_batched=True`."""
    is_batched = torch._C._functorch.is_batchedtensor, torch._C._functorch.is_legacy_batchedtensor
    return any(isinstance(x, torch.Tensor) and (is_batched[0](x) or is_batched[1](x)) for x in tensors)


# ----------------------------------------------------------------------------------------------- what is saved


def save(ctx: Any, *tensors: torch.Tensor | None) -> None:
    """`ctx.save_for_backward`, also for tensors created under `torch.inference_mode()`.

    Autograd refuses to save those, since it cannot detect changes. Here they are constants, stored on ctx directly.
    """
    ctx.constants = [x if x is not None and x.is_inference() else None for x in tensors]
    ctx.save_for_backward(
        *(None if constant is not None else x for constant, x in zip(ctx.constants, tensors, strict=True))
    )


def saved(ctx: Any) -> list[torch.Tensor | None]:
    """What `save` was given, or an error that says what to do where an in-place backward has written over it."""
    try:
        tensors = ctx.saved_tensors
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise RuntimeError(
            f"rlhf_fast.{ctx.public}: its inputs were modified after the forward, perhaps by inplace_backward=True on "
            "another view of the same tensor (logits.split(n)); call the op once on the whole tensor, or drop "
            "inplace_backward"
        ) from error
    return [x if constant is None else constant for constant, x in zip(ctx.constants, tensors, strict=True)]
