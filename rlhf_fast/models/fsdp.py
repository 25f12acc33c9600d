# SPDX-License-Identifier: Apache-2.0
"""Models sharded over the ranks by FSDP2: each rank keeps its rows of every weight, gradient and optimizer state.

The trunk is FSDP's: `fully_shard` of each decoder layer and of the rest of the trunk, which gathers a layer's weights
when it runs and sums its gradients over the ranks. They are summed, not averaged: our losses are sums over the sum of
what all ranks count. The head is read by our ops, outside of any forward: a matrix sharded the same way, which
`full_tensor` gathers for an op. A tied head is the trunk's own weight, whose gradients from both meet in one place. A
scalar head is replicated, and so are its gradients: the optimizer sums them, as it does without FSDP.

Gathering takes all ranks. A rank with fewer micro-batches than another runs empty ones as well (`pad_to_ranks`); in
generation each rank has its own number of tokens, so weights are gathered once, before (`unsharded`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from rlhf_fast.distributed.dtensors import full_tensor, is_dtensor, shard
from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.errors import UserError

from .prefix_sharing import can_pack

T = TypeVar("T")


def sharded(model: Any, wanted: bool) -> Any:
    """Shard `model` over the ranks in place if `wanted`, and return it; UserError if that is impossible."""
    if not wanted:
        return model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    can_pack(model)  # found out by forwards, which are the cheaper while all weights are here
    mesh = init_device_mesh(ranks().device.type, (ranks().count,))
    trunk = model.base_model
    head = head_of(model)
    names = {id(weight): name for name, weight in trunk.named_parameters()}
    tied = {name: names[id(weight)] for name, weight in head.named_parameters() if id(weight) in names}
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for module in (*decoder_layers(model), trunk):
        # A trunk that stayed whole after a forward would be the old one after an optimizer step or a resume.
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo can do nothing else
    for name, weight in list(head.named_parameters()):
        if name in tied:
            setattr(head, name, trunk.get_parameter(tied[name]))
        else:
            setattr(head, name, nn.Parameter(shard(weight, mesh), weight.requires_grad))
    return model


def head_of(model: Any) -> nn.Module:
    """The language-model head; a module without weights where there is none."""
    return model.get_output_embeddings() or nn.Identity()


def decoder_layers(model: Any) -> list[nn.Module]:
    """The layers of the trunk, which transformers names as what must not be split over devices."""
    names = set(model._no_split_modules or ())
    found = [module for module in model.base_model.modules() if type(module).__name__ in names]
    if not found:
        raise UserError(f"{type(model).__name__} does not say what its decoder layers are: set fsdp to false")
    return found


def is_sharded(model: Any) -> bool:
    """Whether `sharded` has sharded the model."""
    return any(map(is_dtensor, model.parameters()))


@contextmanager
def unsharded(model: Any) -> Iterator[None]:
    """All weights of the model on every rank, as ordinary tensors, and nothing exchanged while it runs; no gradients.

    That takes the memory of the weights, not of what the optimizer keeps. Every rank must begin and end it.
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

    Only a sharded model needs it; of any other `parts` come back as they are.
    """
    if not is_sharded(model):
        return parts
    return parts + [filler] * (max(ranks().every(len(parts))) - len(parts))
