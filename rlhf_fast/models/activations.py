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
    with saved_tensors_hooks(_to_host, _to_device):
        yield


def _to_host(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
    if tensor.numel() < LEAST or any(isinstance(x, Parameter) for x in (tensor, tensor._base)):
        return tensor
    host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return tensor.device, host.copy_(tensor)


def _to_device(kept: Tensor | tuple[torch.device, Tensor]) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    device, host = kept
    return host.to(device, non_blocking=True)
