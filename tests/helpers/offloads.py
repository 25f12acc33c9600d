# SPDX-License-Identifier: Apache-2.0
"""What `activation_offloading` moves to CPU memory, and what autocast adds on the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_fast.models import activations


@contextmanager
def moved_to_host(least: int = activations.LEAST) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The tensors that go there meanwhile, each with its copy; smaller ones than `least` numbers stay."""
    moved: list[tuple[Tensor, Tensor]] = []
    usual, really = activations.LEAST, activations.ToHost.pack

    def noted(self: activations.ToHost, tensor: Tensor) -> Any:
        kept = really(self, tensor)
        if isinstance(kept, tuple):
            moved.append((tensor, kept[1]))
        return kept

    activations.LEAST, activations.ToHost.pack = least, noted  # type: ignore[method-assign]
    try:
        yield moved
    finally:
        activations.LEAST, activations.ToHost.pack = usual, really  # type: ignore[method-assign]


def is_weight_of(model: Any, tensor: Tensor) -> bool:
    """Whether it has the numbers of a weight, in its own dtype, which autocast may have rounded them to."""
    for weight in model.parameters():
        cast = weight.detach().to(tensor.dtype)
        for found in (cast, cast.t()) if cast.dim() == 2 else (cast,):
            if found.shape == tensor.shape and torch.equal(found, tensor):
                return True
    return False


class Casts(TorchDispatchMode):
    """Notes what autocast casts to bfloat16; in a `with` inside of its own, or it would see nothing."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.shapes = {p.shape for p in model.parameters()}
        self.made: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        of_weight = function is torch.ops.aten._to_copy.default and result.shape in self.shapes
        if of_weight and (args[0].dtype, result.dtype) == (torch.float32, torch.bfloat16):
            self.made.append((StorageWeakRef(result.untyped_storage()), result.nbytes))
        return result

    def alive(self) -> int:
        """Bytes of casts of weights that are still in memory."""
        return sum(size for storage, size in self.made if not storage.expired())
