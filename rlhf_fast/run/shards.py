# SPDX-License-Identifier: Apache-2.0
"""Sharded tensors of a checkpoint, by torch.distributed.checkpoint: each rank writes and reads its own rows.

No rank holds a whole tensor. The files are safetensors, one a rank, in the checkpoint's folder `shards/`; each says
where its rows begin, so another number of ranks, or one process, can read them. A copy of the rows in CPU memory is
written by a thread while training goes on; an error of that thread is raised by the next `wait`.
"""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.distributed.dtensors import mesh_of, on_mesh
from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.errors import UserError

SHARDS = "shards"


class ShardWriter:
    """Writes one checkpoint at a time in the background."""

    def __init__(self) -> None:
        """Nothing is being written."""
        self.seconds = 0.0  # duration of the last write that succeeded
        self._running: Future[None] | None = None
        self._folder = Path()

    def start(self, folder: Path, shards: Mapping[str, Tensor], then: Callable[[], None]) -> None:
        """Copy `shards` (DTensors), and return; a thread writes them below `folder` and then calls `then`.

        Every rank must call it, with tensors of the same names. When `then` runs on a rank, all ranks have written.
        """
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict_saver import async_save

        self.wait()
        writer = HuggingFaceStorageWriter(str(folder / SHARDS), save_distributed=True)
        written: Any = async_save(dict(shards), storage_writer=writer, process_group=_group_for_threads())
        executor = ThreadPoolExecutor(1, "checkpoint")
        self._running, self._folder = executor.submit(self._after, written, then), folder
        executor.shutdown(wait=False)

    def wait(self) -> None:
        """Wait until nothing is being written.

        UserError on every rank if a rank could not write; the unfinished folder is then removed.
        """
        running, self._running = self._running, None
        if running is None:
            return
        error = running.exception()
        failed = [(rank, text) for rank, text in enumerate(ranks().every(_text(error))) if text]
        if failed:
            rank, text = failed[0]
            if ranks().main:  # all have stopped to write; on a full disk the next checkpoint needs the room
                shutil.rmtree(self._folder, ignore_errors=True)
            failure = UserError(f"writing the checkpoint {self._folder} failed in process {rank}: {text}")
            failure.on_every_rank = True
            raise failure from error

    def _after(self, written: Future[Any], then: Callable[[], None]) -> None:
        start = time.monotonic()
        written.result()
        then()
        self.seconds = time.monotonic() - start


def _text(error: BaseException | None) -> str:
    """In one line; torch's error holds those of the ranks, each with a traceback."""
    causes = list(getattr(error, "failures", {}).values())
    first = causes[0][0] if causes else error
    return "" if first is None else f"{type(first).__name__}: {first}"


@lru_cache(maxsize=1)
def _group_for_threads() -> Any:
    """A group of its own, so that messages of the thread and of training cannot be taken for each other."""
    return torch.distributed.new_group(backend="gloo")


def describe(name: str, tensor: Tensor) -> dict[str, Any]:
    """What `load` needs to know of a DTensor, as JSON."""
    return {"name": name, "shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}


def load(folder: Path, described: Mapping[str, Mapping[str, Any]], shard_size: int | None) -> dict[str, Tensor]:
    """Read tensors into CPU memory: whole, or this rank's rows, as DTensors over groups of `shard_size` ranks.

    Raises:
        OSError, ValueError: a file cannot be read.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load as read

    empty = torch.empty if shard_size is None else partial(_empty_shard, mesh_of("cpu", shard_size))
    tensors = {name: empty(one["shape"], dtype=getattr(torch, one["dtype"])) for name, one in described.items()}
    try:
        with warnings.catch_warnings():  # of each rank reading for itself, which is what we want
            warnings.simplefilter("ignore", UserWarning)
            read(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder / SHARDS)), no_dist=True)
    except CheckpointException as error:
        raise ValueError(_text(error)) from None
    return tensors


def _empty_shard(mesh: Any, shape: list[int], dtype: torch.dtype) -> Tensor:
    from torch.distributed import tensor as dtensors

    return dtensors.empty(shape, dtype=dtype, device_mesh=mesh, placements=on_mesh(mesh))
