# SPDX-License-Identifier: Apache-2.0
"""Tensors cut over the ranks along dim 0 (DTensors): this rank's part, the whole of it, and a whole one cut like it.

Every rank must call these in the same order, since they exchange parts; what is not cut passes through unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .ranks import ranks


def is_cut(tensor: Tensor) -> bool:
    """True of a tensor whose rows lie on several ranks."""
    return hasattr(tensor, "placements")


def own_part(tensor: Tensor) -> Tensor:
    """This rank's rows, in the storage of `tensor`; outside of autograd."""
    return tensor.detach().to_local() if is_cut(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """All rows on every rank, differentiable: gradients of the ranks are added up in float32, and each keeps its rows.

    Ranks work on other sequences each, so what each finds for the whole is a part of a sum (`Partial`).
    """
    if not is_cut(tensor):
        return tensor
    from torch.distributed.tensor import Partial, Replicate

    together = tensor.redistribute(placements=[Replicate()], backward_dtype=torch.float32)  # type: ignore[attr-defined]
    return together.to_local(grad_placements=[Partial()])  # type: ignore[no-any-return]


@torch.no_grad()
def gathered(tensor: Tensor) -> Tensor:
    """All rows, on the CPU of the main process, which saves them.

    The others get an empty tensor: what is saved is larger than what one process should hold.
    """
    if not is_cut(tensor):
        return tensor
    found = whole(tensor.detach())
    return found.cpu() if ranks().main else found.new_empty(0)


def cut(found: Tensor, mesh: Any) -> Tensor:
    """A tensor that every rank has whole, cut over the ranks of a mesh; what a rank keeps is a copy."""
    from torch.distributed.tensor import Shard, distribute_tensor

    return distribute_tensor(found.detach(), mesh, [Shard(0)], src_data_rank=None).clone()


def cut_like(found: Tensor, like: Tensor) -> Tensor:
    """A tensor that every rank has whole, cut like another of its shape."""
    return cut(found, like.device_mesh) if is_cut(like) else found  # type: ignore[attr-defined]


def joined(part: Tensor, like: Tensor) -> Tensor:
    """This rank's rows taken for a part of something that is cut like `like`."""
    if not is_cut(like):
        return part
    from torch.distributed.tensor import DTensor

    other: Any = like
    return DTensor.from_local(
        part.detach(), other.device_mesh, other.placements, run_check=False, shape=other.shape, stride=other.stride()
    )


def whole_state(model: Any) -> dict[str, Tensor] | None:
    """The state dict of a model with cut weights, whole in the main process; None where no weight is cut.

    Weights that are one tensor stay one, by which transformers knows that they are tied.
    """
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    if not any(map(is_cut, state.values())):
        return None
    found: dict[int, Tensor] = {}
    for tensor in state.values():
        if id(tensor) not in found:
            found[id(tensor)] = gathered(tensor).detach()
    return {name: found[id(tensor)] for name, tensor in state.items()}
