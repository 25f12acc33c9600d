# SPDX-License-Identifier: Apache-2.0
"""Models sharded over the ranks by FSDP2: each rank keeps its rows of every weight, gradient and optimizer state.

The trunk is sharded by FSDP: `fully_shard` of each decoder layer and of the rest of the trunk, which gathers a layer's
weights when it runs and sums its gradients over the ranks. They are summed, not averaged, because our losses are
already divided by the token count of all ranks. Our ops read the head outside of any forward, so it is a matrix sharded
the same way, which `full_tensor` gathers for an op. A tied head is the trunk's own weight, so both gradients are added
up there. A scalar head is replicated, and the optimizer sums its gradients, as it does without FSDP.

Gathering needs all ranks. A rank with fewer micro-batches than another runs empty ones as well (`pad_to_ranks`). In
generation ranks sample different numbers of tokens, so weights are gathered once, before it (`unsharded`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from rlhf_fast.distributed.dtensors import full_tensor, is_dtensor, mesh_of, shard
from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.errors import UserError

from .prefix_sharing import packing_kernel

T = TypeVar("T")


def sharded(model: Any, wanted: bool, size: int = 0) -> Any:
    """Shard `model` in place if `wanted`, and return it; UserError if that is impossible.

    Over all ranks, or over each group of `size` ranks, so that each group has a copy, whose gradients are summed too.
    """
    if not wanted:
        return model
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    packing_kernel(model)  # tests it with forward passes, which are cheaper before the weights are sharded
    mesh = mesh_of(ranks().device.type, size)
    trunk = model.base_model
    head = head_of(model)
    names = {id(weight): name for name, weight in trunk.named_parameters()}
    tied = {name: names[id(weight)] for name, weight in head.named_parameters() if id(weight) in names}
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for module in (*decoder_layers(model), trunk):
        # A trunk left unsharded after a forward would be stale after an optimizer step or a resume.
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo supports nothing else
    for name, weight in list(head.named_parameters()):
        if name in tied:
            setattr(head, name, trunk.get_parameter(tied[name]))
        else:
            setattr(head, name, nn.Parameter(shard(weight, mesh), weight.requires_grad))
    return model


def head_of(model: Any) -> nn.Module:
    """The language-model head; a module without weights if there is none."""
    return model.get_output_embeddings() or nn.Identity()


def decoder_layers(model: Any) -> list[nn.Module]:
    """The decoder layers of the trunk: the modules in transformers' `_no_split_modules`."""
    names = set(model._no_split_modules or ())
    layers = [module for module in model.base_model.modules() if type(module).__name__ in names]
    if not layers:
        raise UserError(f"{type(model).__name__} does not say what its decoder layers are: set fsdp to false")
    return layers


def is_sharded(model: Any) -> bool:
    """Whether `sharded` has sharded the model."""
    return any(map(is_dtensor, model.parameters()))


def shard_size(model: Any) -> int | None:
    """How many ranks share a copy of the model; None if it is not sharded."""
    return next((w.device_mesh.size(-1) for w in model.parameters() if is_dtensor(w)), None)


@contextmanager
def unsharded(model: Any) -> Iterator[None]:
    """Within it every rank has all weights as ordinary tensors, and forwards need no communication. No gradients.

    This takes the memory of the weights, not of the optimizer state. All ranks must enter and leave it.
    """
    if not is_sharded(model):
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    head = head_of(model)
    parts = dict(head.named_parameters())
    with torch.no_grad():
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        for name, part in parts.items():
            setattr(head, name, nn.Parameter(full_tensor(part), requires_grad=False))
    try:
        yield
    finally:
        for name, part in parts.items():
            setattr(head, name, part)
        for module in modules:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()


def pad_to_ranks(parts: list[T], model: Any, filler: T) -> list[T]:
    """Pad this rank's micro-batches with `filler`, an empty one, so that every rank runs equally many.

    Only a sharded model needs this; for any other, `parts` is returned unchanged.
    """
    if not is_sharded(model):
        return parts
    return parts + [filler] * (max(ranks().every(len(parts))) - len(parts))
