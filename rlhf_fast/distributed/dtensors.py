# SPDX-License-Identifier: Apache-2.0
"""Tensors sharded over the ranks along dim 0 (DTensors): conversion to the local shard, to the full tensor, and back.

Every rank must call these in the same order, because they communicate. An ordinary tensor passes through unchanged.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .ranks import ranks


def is_dtensor(tensor: Tensor) -> bool:
    """Whether the rows of `tensor` are sharded over the ranks."""
    return hasattr(tensor, "placements")


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's rows, sharing memory with `tensor`, detached."""
    return tensor.detach().to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def full_tensor(tensor: Tensor) -> Tensor:
    """All rows on every rank, differentiable. The backward sums the gradients of all ranks in float32 and shards them.

    Each rank works on its own sequences, so its gradient is one term of a sum (`Partial`).
    """
    if not is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import Partial, Replicate

    whole: Any = tensor
    every = whole.device_mesh.ndim
    replicated = whole.redistribute(placements=[Replicate()] * every, backward_dtype=torch.float32)
    return replicated.to_local(grad_placements=[Partial()] * every)  # type: ignore[no-any-return]


@torch.no_grad()
def full_on_main(tensor: Tensor) -> Tensor:
    """All rows in the CPU memory of the main process, for saving; other ranks get an empty tensor."""
    if not is_dtensor(tensor):
        return tensor
    full = full_tensor(tensor.detach())
    return full.cpu() if ranks().main else full.new_empty(0)


@lru_cache
def mesh_of(device_type: str, size: int) -> Any:
    """The mesh over which models are sharded: all ranks, or groups of `size` of them that have a copy each (HSDP)."""
    from torch.distributed.device_mesh import init_device_mesh

    count = ranks().count
    if size in (0, count):
        return init_device_mesh(device_type, (count,))
    return init_device_mesh(device_type, (count // size, size), mesh_dim_names=("replicate", "shard"))


def copies(tensor: Tensor) -> int:
    """How many groups of ranks have all rows of a sharded tensor."""
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    return int(mesh.size(0)) if mesh.ndim == 2 else 1


def on_mesh(mesh: Any) -> list[Any]:
    """Placements: rows sharded over the last dimension of `mesh`, copies over the first of two."""
    from torch.distributed.tensor import Replicate, Shard

    return [Replicate()] * (mesh.ndim - 1) + [Shard(0)]


def shard(full: Tensor, mesh: Any) -> Tensor:
    """Shard over `mesh` a tensor that every rank holds in full; the shard is a copy."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full.detach(), mesh, on_mesh(mesh), src_data_rank=None).clone()


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """Shard a tensor that every rank holds in full as `like` (of the same shape) is; a DTensor is returned as it is."""
    if is_dtensor(full):
        return full
    return shard(full, like.device_mesh) if is_dtensor(like) else full  # type: ignore[attr-defined]


def as_dtensor(local: Tensor, like: Tensor) -> Tensor:
    """A DTensor of as many rows as `like`, sharded like it, whose rows of this rank are `local`.

    `local` itself if `like` is not sharded.
    """
    if not is_dtensor(like):
        return local
    from torch.distributed.tensor import DTensor

    like_dtensor: Any = like
    shape = torch.Size((like_dtensor.shape[0], *local.shape[1:]))
    return DTensor.from_local(
        local.detach(),
        _mesh_on(local.device.type, like_dtensor.device_mesh),
        like_dtensor.placements,
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )


def _mesh_on(device_type: str, mesh: Any) -> Any:
    """The same ranks, with tensors on another device: what is in CPU memory must not travel to the GPU to be saved."""
    return mesh if device_type == mesh.device_type else mesh_of(device_type, mesh.size(-1))


def full_state_dict(model: Any) -> dict[str, Tensor] | None:
    """The full state dict of a sharded model in the main process; None if no weight is sharded.

    Tied weights remain one tensor; transformers recognises them by that.
    """
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    if not any(map(is_dtensor, state.values())):
        return None
    full_by_id: dict[int, Tensor] = {}
    for tensor in state.values():
        if id(tensor) not in full_by_id:
            full_by_id[id(tensor)] = full_on_main(tensor).detach()
    return {name: full_by_id[id(tensor)] for name, tensor in state.items()}
