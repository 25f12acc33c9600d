# SPDX-License-Identifier: Apache-2.0
"""The processes of a distributed run, as accelerate sets them up from torchrun's or `accelerate launch`'s environment.

Every rank holds full models (or its shard of them, see `models/fsdp.py`) and works on its share of each batch. Token
counts, whitening, the KL controller and metrics are computed over all ranks, and gradients are summed in float32 before
the optimizer steps. So the number of ranks changes the speed, and the results only by rounding.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from rlhf_fast.errors import UserError

from .limits import longest_wait
from .portions import portions

T = TypeVar("T")
BUCKET = 8 * 2**20  # numbers in one all-reduce; a copy of so many is made, never of a larger tensor


class Ranks:
    """This process among the ranks; a single process is rank 0 of 1, and nothing communicates."""

    def __init__(self) -> None:
        """Join the process group that the launcher described, if any."""
        from accelerate import PartialState

        _rejoin()
        # Without a GPU, cpu=True is needed, or accelerate starts no process group.
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=longest_wait())
        self.index, self.count, self.device = state.process_index, state.num_processes, state.device
        self._alone = self.count == 1
        if self.count > 1:  # threads of a group that still exists may abort the process at exit
            atexit.register(torch.distributed.destroy_process_group)

    @property
    def main(self) -> bool:
        """True in the one process that writes files and prints."""
        return self.index == 0

    @property
    def group(self) -> Any:
        """The process group for ops that take one; None with a single process."""
        return torch.distributed.group.WORLD if self.count > 1 else None

    def share(self, count: int, what: str) -> slice:
        """This rank's slice of `count` items; UserError unless they divide evenly."""
        if count % self.count:
            raise UserError(f"{what} must be a multiple of the {self.count} processes, got {count}")
        each = count // self.count
        return slice(self.index * each, (self.index + 1) * each)

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Add each tensor to those of the other ranks, in place; small ones travel together, of one dtype and device.

        All ranks must give tensors of the same shapes in the same order.
        """
        if self._alone:
            return
        for bucket in portions(tensors, BUCKET):
            _all_reduce(bucket)

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums over the ranks, in float64."""
        sums = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        self.sum_([sums])
        return sums.tolist()

    def any(self, flag: bool) -> bool:
        """True if `flag` is true on some rank, so that all ranks take the same branch."""
        return bool(self.total([float(flag)])[0])

    def every(self, value: T) -> list[T]:
        """The value of every rank, in order of rank."""
        if self._alone:
            return [value]
        values: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values

    def cat(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, concatenated on the CPU; for small ones, such as metrics."""
        return torch.cat(self.every(tensor.detach().cpu()))

    def all_or_none(self, work: Callable[[], T]) -> T:
        """Result of `work()`. If it raises a UserError on any rank, all ranks raise it, so that all react alike."""
        result, error = None, None
        try:
            result = work()
        except UserError as caught:
            error = caught
        for rank_error in self.every(error):
            if rank_error is not None:
                rank_error.on_every_rank = True
                raise rank_error
        return result  # type: ignore[return-value]

    def once(self, work: Callable[[], T]) -> T:
        """Run `work` in the main process only; every rank gets its result."""
        return self.every(self.all_or_none(lambda: work() if self.main else None))[0]  # type: ignore[return-value]

    def wait(self) -> None:
        """Barrier: wait until all ranks have called this."""
        if not self._alone:
            torch.distributed.barrier()

    def all_raised(self, error: BaseException) -> bool:
        """True if every rank raised this error, so that they can still communicate."""
        return self._alone or getattr(error, "on_every_rank", False)

    def leave(self) -> None:
        """Stop communicating: a rank has failed, and the others would wait for it forever."""
        self._alone = True


def _rejoin() -> None:
    """After a restart by torchrun, join under keys of this restart: the launcher's store still has the addresses of the
    processes that were killed, and whoever reads those first cannot connect."""
    from torch._C._distributed_c10d import PrefixStore, TCPStore  # what torch.distributed has them from

    restarts, count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), int(os.environ.get("WORLD_SIZE", "1"))
    alone = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"  # each node counts its own restarts
    if restarts == "0" or count == 1 or not alone or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):
        return
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(*address, count, is_master=False)
    torch.distributed.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        store=PrefixStore(f"restart-{restarts}", store),
        rank=int(os.environ["RANK"]),
        world_size=count,
        timeout=longest_wait(),
    )


def _all_reduce(bucket: list[Tensor]) -> None:
    """Sum the tensors over the ranks, in place, in one message."""
    if len(bucket) == 1:
        torch.distributed.all_reduce(bucket[0])
    else:
        joined = torch.cat([x.flatten() for x in bucket])
        torch.distributed.all_reduce(joined)
        sums = joined.split([x.numel() for x in bucket])
        torch._foreach_copy_(bucket, [total.view_as(x) for total, x in zip(sums, bucket, strict=True)])


@lru_cache(maxsize=1)
def ranks() -> Ranks:
    """The one `Ranks` of this process."""
    return Ranks()


def first_to_fail() -> bool:
    """True in the first process that calls this: its error is the one to print.

    Later errors of other ranks are the same error, or follow from this rank's exit: their next collective fails, or the
    launcher kills them.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not torch.distributed.is_initialized() or ranks().count == 1:
        return True
    atexit.unregister(torch.distributed.destroy_process_group)  # it could wait for ranks that wait for this one
    from torch.distributed.distributed_c10d import _get_default_store

    try:
        return int(_get_default_store().add("rlhf_fast/failed", 1)) == 1
    except RuntimeError:  # the rank that hosts the store has exited, and printed its error
        return False
