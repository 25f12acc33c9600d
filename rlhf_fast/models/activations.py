# SPDX-License-Identifier: Apache-2.0
"""Less memory for activations: recomputed in the backward, or kept in CPU memory until then. Neither changes a result.

Both together keep the input of each decoder layer in CPU memory and recompute the rest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import Parameter

LEAST = 1024  # numbers; a smaller tensor stays where it is
FLAG = "offloads_activations"


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
    """Copies what autograd saves to CPU memory.

    Layers that read the same states save them one after the other, so the last copies are looked through first.
    """

    def __init__(self) -> None:
        """Nothing is copied yet."""
        self.last: deque[tuple[Any, Tensor, Tensor]] = deque(maxlen=4)  # what it was, the tensor itself, its copy

    def pack(self, tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        """The device and a copy; weights and small tensors stay as they are."""
        if tensor.numel() < LEAST or any(isinstance(x, Parameter) for x in (tensor, tensor._base)):
            return tensor
        what = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version
        for seen, _, copy in self.last:  # of tensors that still exist, so that none has the memory of another
            if seen == what:
                return tensor.device, copy
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor)
        self.last.append((what, tensor.detach(), host))
        return tensor.device, host


def to_device(kept: Tensor | tuple[torch.device, Tensor]) -> Tensor:
    """What `ToHost.pack` was given."""
    if isinstance(kept, Tensor):
        return kept
    device, host = kept
    return host.to(device, non_blocking=True)
