# SPDX-License-Identifier: Apache-2.0
"""Less memory for activations: recomputed in the backward, or kept in CPU memory until then. Neither changes a result.

Both together keep the input of each decoder layer in CPU memory and recompute the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter

LEAST = 1024  # numbers; a smaller tensor stays where it is
FLAG = "offloads_activations"
# Nodes of the graph between a weight and another view of it, or its copy in the dtype of autocast.
SAME_NUMBERS = ("ToCopy", "T", "Transpose", "Permute", "View", "Unsqueeze", "Select", "Slice", "Alias")


def checkpoint_activations(model: Any) -> None:
    """Recompute activations in the backward, while the model is in training mode."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def offload_activations(model: Any) -> None:
    """Have `heads.hidden_states` keep what the trunk's backward needs in CPU memory."""
    setattr(model, FLAG, True)


def set_up_activations(model: Any, recompute: bool, offload: bool) -> None:
    """Either, both or neither, as the options say."""
    if recompute:
        checkpoint_activations(model)
    if offload:
        offload_activations(model)


@contextmanager
def activations_of(model: Any) -> Iterator[None]:
    """Around a forward pass of the trunk: what it saves goes to CPU memory if `offload_activations` was called.

    `torch.autograd.graph.save_on_cpu` does the same with the weights, which are on the device in any case, and would
    undo the sharding of those that FSDP frees after a layer.
    """
    if not getattr(model, FLAG, False):
        yield
        return
    with saved_tensors_hooks(ToHost().pack, to_device):
        yield


class ToHost:
    """Copies what autograd saves in one forward pass to CPU memory; what is saved several times, once.

    Layers that read the same states save them all, and every layer saves the same masks and positions.
    """

    def __init__(self) -> None:
        """Nothing is copied yet."""
        # A weak reference keeps the number of a storage from being given to another one, and no memory.
        self.copies: dict[Any, tuple[StorageWeakRef, Tensor]] = {}

    def pack(self, tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        """The device and a copy; weights, small and expanded tensors stay as they are."""
        if tensor.numel() < LEAST or is_expanded(tensor) or is_weight(tensor):
            return tensor
        storage = StorageWeakRef(tensor.untyped_storage())
        layout = tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
        what = storage.cdata, tensor._version, layout
        if what not in self.copies:
            host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            # On a GPU the backward copies back on the stream of the forward, so nobody reads too early.
            self.copies[what] = storage, host.copy_(tensor, non_blocking=tensor.is_cuda)
        return tensor.device, self.copies[what][1]


def is_expanded(tensor: Tensor) -> bool:
    """Whether numbers stand for several each: a copy would have all of these."""
    return any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True))


def is_weight(tensor: Tensor) -> bool:
    """Whether it is a weight, a view of one, or one that autocast has cast, which autograd keeps until the backward."""
    if any(isinstance(x, Parameter) for x in (tensor, tensor._base)):
        return True
    node = tensor.grad_fn
    while node is not None and node.name().removesuffix("Backward0") in SAME_NUMBERS:
        node = node.next_functions[0][0]
    return isinstance(getattr(node, "variable", None), Parameter)


def to_device(kept: Tensor | tuple[torch.device, Tensor]) -> Tensor:
    """What `ToHost.pack` was given."""
    if isinstance(kept, Tensor):
        return kept
    device, host = kept
    return host.to(device, non_blocking=True)
