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
    return tensor.detach().to_local() if is_cut(tensor) else tensor  # type: ignore[operator]


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
def gathered(part: Tensor, like: Tensor) -> Tensor:
    """Of `part`, this rank's rows of something cut like `like`: all rows, on the CPU of the main process, which saves.

    The others get an empty tensor: what is saved is larger than what one process should hold.
    """
    if not is_cut(like):
        return part
    from torch.distributed.tensor import DTensor

    cut: Any = like
    found = whole(
        DTensor.from_local(
            part, cut.device_mesh, cut.placements, run_check=False, shape=cut.shape, stride=cut.stride()
        )
    )
    return found.cpu() if ranks().main else found.new_empty(0)


def cut_like(found: Tensor, like: Tensor) -> Tensor:
    """This rank's rows of a tensor that every rank has whole."""
    if not is_cut(like):
        return found
    from torch.distributed.tensor import distribute_tensor

    cut: Any = like
    return own_part(distribute_tensor(found, cut.device_mesh, cut.placements, src_data_rank=None)).clone()


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
            found[id(tensor)] = gathered(own_part(tensor), tensor).detach()
    return {name: found[id(tensor)] for name, tensor in state.items()}
