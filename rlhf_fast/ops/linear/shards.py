# SPDX-License-Identifier: Apache-2.0
"""A head whose vocabulary is split into equal slices over the ranks of a process group, rank 0 with the first ids.

Every rank has all rows of hidden and the same targets. One gather of a few floats per token merges the statistics; the
gradient of hidden is summed over ranks, each rank keeps the gradient of its slice of the weight.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_fast.ops.linear.slices import Slices

NO_GROUP = -1

# Operators cannot take a process group, so they take its index in this list. The references are weak: a group that
# outlives destroy_process_group keeps gloo's threads, which abort the process at its end.
_groups: list[weakref.ref[Any]] = []
_places: dict[str, int] = {}  # by the group's name, which torch.compile can read
_agreed: set[tuple[int, int, int, str]] = set()  # shapes that the ranks have compared


class Shard:
    """This rank's slice of the vocabulary; all of it without a group."""

    def __init__(self, handle: int, columns: int) -> None:
        self.group = None if handle == NO_GROUP else _groups[handle]()
        if handle != NO_GROUP and self.group is None:
            raise RuntimeError(
                "rlhf_fast: the process_group of this graph was destroyed; compile it again with a new one"
            )
        self.ranks = 1 if self.group is None else dist.get_world_size(self.group)
        self.first = 0 if self.group is None else dist.get_rank(self.group) * columns
        self.columns = columns

    def counting(self, vocab_size: int) -> int:
        """How many of this rank's columns are among the first `vocab_size` of all (-1: all)."""
        return self.columns if vocab_size < 0 else max(0, min(self.columns, vocab_size - self.first))

    def merge(self, slices: Slices, factor: Tensor | float) -> Slices:
        """All slices of all ranks merged into one (1, n)."""
        own = slices.merge(factor)
        if self.group is None:
            return own
        target = own.target[0].t().double() if own.target is not None else None
        fields = [None if x is None or x is own.target else x for x in own]
        packed = torch.cat([x.double() for x in fields if x is not None] + ([] if target is None else [target]))
        gathered = packed.new_empty((self.ranks, *packed.shape))
        dist.all_gather(list(gathered.unbind()), packed.contiguous(), group=self.group)
        columns = iter(gathered.unbind(1))  # (ranks, n) each; ids are exact in float64 too
        all_ranks = [None if x is None else next(columns).to(x.dtype) for x in fields]
        if target is not None:
            all_ranks[Slices._fields.index("target")] = torch.stack(list(columns), -1)
        return Slices(*all_ranks).merge(factor)  # type: ignore[arg-type]

    def sum(self, x: Tensor) -> Tensor:
        """x summed over ranks, in place."""
        if self.group is not None and x.numel():
            dist.all_reduce(x, group=self.group)
        return x


def local_part(op: str, name: str, x: Any, process_group: Any) -> Any:
    """This rank's part of a DTensor sharded on dim 0, if `process_group` says that it is a slice of the vocabulary.

    FSDP2 also shards on dim 0, but there each rank has different rows of hidden, so the placement alone cannot tell.
    """
    if x is None or not hasattr(x, "placements"):
        return x
    mesh, placements = x.device_mesh, x.placements
    if all(p.is_replicate() for p in placements):
        return x.to_local()
    if process_group is None:
        raise ValueError(
            f"rlhf_fast.{op}: {name} must be whole, got a DTensor with placements {placements}; call the op within the "
            "forward of the FSDP2 module that holds it (rlhf_fast.hf does), gather it with full_tensor(), or, if the "
            "ranks hold slices of the vocabulary and the same hidden states, give process_group"
        )
    if mesh.ndim != 1 or not placements[0].is_shard(0):
        raise ValueError(
            f"rlhf_fast.{op}: {name} as a DTensor must be sharded on dim 0 over a mesh of one dimension, "
            f"got placements {placements} over a mesh of shape {tuple(mesh.shape)}"
        )
    return x.to_local()


def handle_of(op: str, process_group: Any, weight: Tensor) -> int:
    """The group as a number. The first time a shape is seen, the ranks check that their slices are equal.

    torch.compile can neither trace that nor keep the result.
    """
    if process_group is None:
        return NO_GROUP
    tracing = torch.compiler.is_compiling()
    handle = _places.get(process_group.group_name, NO_GROUP)
    if not tracing and (handle == NO_GROUP or _groups[handle]() is not process_group):
        _groups.append(weakref.ref(process_group))
        handle = _places[process_group.group_name] = len(_groups) - 1
    shape = (handle, weight.shape[0], weight.shape[1], str(weight.dtype))
    if shape not in _agreed:
        if tracing:
            raise RuntimeError(
                f"rlhf_fast.{op}: process_group must be known before torch.compile(fullgraph=True): call the "
                "op once without compiling, with this group and weights of this shape"
            )
        seen: list[Any] = [None] * dist.get_world_size(process_group)
        dist.all_gather_object(seen, shape[1:], group=process_group)
        if any(other != shape[1:] for other in seen):
            raise ValueError(
                f"rlhf_fast.{op}: weight must be an equal slice of the vocabulary on every rank of process_group, "
                f"got (V / ranks, H, dtype) by rank {seen}"
            )
        _agreed.add(shape)
    return handle
