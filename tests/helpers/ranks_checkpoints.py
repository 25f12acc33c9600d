# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of sharded models, written and read by two processes: further cases of ranks_fsdp.py."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from ranks_fsdp import CONFIGS, batches, loss_of, whole
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from rlhf_fast.distributed.dtensors import is_dtensor
from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.errors import UserError
from rlhf_fast.models.fsdp import sharded
from rlhf_fast.models.optim import AdamW
from rlhf_fast.run.checkpoint import checkpoints as saved_steps
from rlhf_fast.run.checkpoint import damaged_file, load_state
from rlhf_fast.run.folder import RunFolder

FOLDER = Path(os.environ["RANKS_FOLDER"])


def state_of(optimizer: AdamW, step: int) -> dict[str, Any]:
    return {"step": step, "optimizer": optimizer.state_dict(), "rng": torch.arange(5)}


def trained() -> tuple[Any, AdamW]:
    """A sharded model after a step; the same in every call."""
    torch.manual_seed(0)
    model = sharded(AutoModelForCausalLM.from_config(CONFIGS["biased"]).eval(), True)
    optimizer = AdamW(model.parameters(), lr=1e-3)
    learn(model, optimizer)
    return model, optimizer


def learn(model: Any, optimizer: AdamW) -> None:
    loss_of(model, batches()[ranks().index].rows(torch.arange(3)), critic=False).backward()
    optimizer.step()


class Messages(TorchDispatchMode):
    """Counts the bytes that this thread's collectives are given."""

    bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented
        if "c10d" in function.namespace:
            self.bytes += sum(x.nbytes for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        return function(*args, **(kwargs or {}))


def checkpoints() -> None:
    """Each rank writes its rows while training goes on; nothing is gathered; a byte that changes is noticed."""
    run = RunFolder.create(FOLDER / "written")
    model, optimizer = trained()
    for step in (1, 2):
        saved = {name: whole(x) for name, x in optimizer.state_dict()["weights"].items()}
        with Messages() as messages:
            run.save_checkpoint(step, state_of(optimizer, step))
        assert 0 < messages.bytes < 4096, messages.bytes  # a path and errors; the state has 150 kB
        learn(model, optimizer)  # what is written later is the copy
    run.shard_writer.wait()
    assert run.shard_writer.seconds > 0
    folder = run.path / "checkpoints" / "step-2"
    files = sorted(folder.rglob("*.*"))
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    numbers = [sum(x.numel() for x in load_file(path).values()) for path in sorted((folder / "shards").iterdir())]
    total = 3 * sum(p.numel() for p in model.parameters())
    assert total > 30_000 and len(numbers) == 2 and sum(numbers) == total and max(numbers) < 0.55 * total, numbers
    plain = load_file(folder / "state.safetensors")
    assert all(x.numel() <= 5 for x in plain.values())  # Adam's counts, and "rng"
    mine = load_state(folder, "optimizer", shard_size=2)
    assert all(map(is_dtensor, mine["optimizer"]["weights"].values()))
    back = {name: whole(x) for name, x in mine["optimizer"]["weights"].items()}
    if ranks().main:
        alone = load_state(folder)["optimizer"]
        for name, weight in saved.items():
            assert torch.equal(back[name], weight) and torch.equal(alone["weights"][name], weight), name
        save_file(saved, FOLDER / "expected.safetensors")
    fresh, other = trained()
    learn(fresh, other)
    other.load_state_dict(mine["optimizer"])
    assert all(
        torch.equal(a.to_local(), b.to_local())
        for a, b in zip(*map(moments_of, (mine, state_of(other, 2))), strict=True)
    )


def moments_of(state: dict[str, Any]) -> list[Any]:
    return [x for one in state["optimizer"]["moments"].values() for x in one.values() if x.dim()]


def failed_write() -> None:
    """A rank that cannot write: the next save says so on every rank, and the checkpoint before is the newest."""
    run = RunFolder.create(FOLDER / "failed")
    _, optimizer = trained()
    run.save_checkpoint(1, state_of(optimizer, 1))
    run.shard_writer.wait()
    really = HuggingFaceStorageWriter.write_data

    def full(*args: Any) -> Any:
        if ranks().index == 1:
            raise OSError(28, "No space left on device")
        return really(*args)

    HuggingFaceStorageWriter.write_data = full  # type: ignore[method-assign]
    run.save_checkpoint(2, state_of(optimizer, 2))
    try:
        run.save_checkpoint(3, state_of(optimizer, 3))
    except UserError as error:
        assert "step-2.tmp failed in process" in str(error) and "No space left on device" in str(error), error
        assert error.on_every_rank
    else:
        raise AssertionError("a failed write was not noticed")
    ranks().wait()
    assert not (run.path / "checkpoints" / "step-2.tmp").exists()  # the disk may be full
    HuggingFaceStorageWriter.write_data = really  # type: ignore[method-assign]
    assert [path.name for path in saved_steps(run.path)] == ["step-1"]
    run.save_checkpoint(3, state_of(optimizer, 3))
    run.shard_writer.wait()
    assert [path.name for path in saved_steps(run.path)] == ["step-1", "step-3"]


def killed_write() -> None:
    """A rank that is killed while it writes: the other notices, and the checkpoint before is the newest. Comes last."""
    run = RunFolder.create(FOLDER / "killed")
    _, optimizer = trained()
    run.save_checkpoint(1, state_of(optimizer, 1))
    really = HuggingFaceStorageWriter.write_data
    run.shard_writer.wait()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher would end the other one too early

    def killed(*args: Any) -> Any:
        written = really(*args)
        if ranks().index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return written

    HuggingFaceStorageWriter.write_data = killed  # type: ignore[method-assign]
    ranks().wait()
    run.save_checkpoint(2, state_of(optimizer, 2))
    ranks().leave()
    try:
        run.shard_writer.wait()
    except UserError:
        assert [path.name for path in saved_steps(run.path)] == ["step-1"]
        assert damaged_file(run.path / "checkpoints" / "step-1") is None
        return
    raise AssertionError("the killed process was not noticed")
