# SPDX-License-Identifier: Apache-2.0
"""Four processes as two groups that share a model each (HSDP), and as four copies: further cases of ranks_fsdp.py."""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from offloads import moved_to_host
from ranks_checkpoints import moments_of, state_of
from ranks_fsdp import CONFIGS, batches, compare, loss_of, whole
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from rlhf_fast.distributed import ranks as ranks_module
from rlhf_fast.distributed.dtensors import copies, is_dtensor
from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.models import optimizers
from rlhf_fast.models.activations import checkpoint_activations, offload_activations
from rlhf_fast.models.fsdp import shard_size, sharded, unsharded
from rlhf_fast.models.optim import AdamW
from rlhf_fast.run.checkpoint import load_state
from rlhf_fast.run.folder import RunFolder

FOLDER = Path(os.environ["RANKS_FOLDER"])


def plain(name: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name], dtype=dtype).eval()


def mesh() -> None:
    """Two groups of two: gradients, norms, weights and state are those of a whole model."""
    compare(plain("tied"), False, 1e-5, size=2)
    compare(plain("untied", torch.bfloat16), False, 2e-2, size=2, kind="adamw-offload")
    offloaded = plain("untied")
    checkpoint_activations(offloaded)
    offload_activations(offloaded)
    compare(offloaded.train(), False, 1e-5, size=2)
    cut = sharded(plain("untied"), True, 2)
    assert shard_size(cut) == 2 and {copies(p) for p in cut.parameters()} == {2}
    with unsharded(cut):
        for one, other in zip(cut.parameters(), plain("untied").parameters(), strict=True):
            assert not is_dtensor(one) and torch.equal(one, other)


def offloaded() -> None:
    """Of a sharded model no weight goes to CPU memory with the activations; the step is the same, bit for bit."""
    for autocast in (False, True):  # which casts a weight while it is gathered; autograd keeps that
        steps: list[list[torch.Tensor]] = []
        with moved_to_host(least=1) as moved, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for offload in (False, True):
                model = sharded(plain("untied"), True, 2)
                if offload:
                    offload_activations(model)
                optimizer = AdamW(model.parameters(), lr=1e-3)
                learn(model, optimizer)
                steps.append([p.to_local() for p in model.parameters()])  # type: ignore[attr-defined]
        assert all(torch.equal(one, other) for one, other in zip(*steps, strict=True))
        weights, shapes = {p.shape for p in model.parameters()}, [x.shape for x, _ in moved]
        assert shapes and not [shape for shape in shapes if shape in weights or shape[::-1] in weights]


def learn(model: Any, optimizer: AdamW) -> None:
    loss_of(model, batches()[ranks().index].rows(torch.arange(3)), critic=False).backward()
    optimizer.step(0.5)


def trained(kind: Any, steps: int, size: int = 2) -> tuple[Any, AdamW]:
    model = sharded(plain("biased", torch.bfloat16), True, size)
    optimizer = AdamW(model.parameters(), lr=1e-3, kind=kind)
    for _ in range(steps):
        learn(model, optimizer)
    return model, optimizer


def resumes() -> None:
    """Every optimizer goes on bit for bit in the same groups; other groups, and one process, read the same."""
    optimizers.LEAST_8BIT = 0
    for kind in ("adamw", "adamw-offload", *(("adamw-8bit",) if find_spec("bitsandbytes") else ())):
        model, optimizer = trained(kind, 2)
        run = RunFolder.create(FOLDER / kind)
        run.save_checkpoint(2, state_of(optimizer, 2))
        saved = {name: whole(x) for name, x in optimizer.state_dict()["weights"].items()}
        learn(model, optimizer)
        run.shard_writer.wait()
        folder = run.path / "checkpoints" / "step-2"
        again, resumed = trained(kind, 1)
        resumed.load_state_dict(load_state(folder, "optimizer", shard_size=2)["optimizer"])
        learn(again, resumed)
        for one, other in zip(*map(moments_of, (state_of(optimizer, 3), state_of(resumed, 3))), strict=True):
            assert torch.equal(one.to_local(), other.to_local()), kind
        for one, other in zip(model.parameters(), again.parameters(), strict=True):
            assert torch.equal(one.to_local(), other.to_local()), kind
        _, spread = trained(kind, 1, size=0)
        spread.load_state_dict(load_state(folder, "optimizer", shard_size=4)["optimizer"])
        for name, x in spread.state_dict()["weights"].items():
            full = whole(x)
            assert not ranks().main or torch.equal(full, saved[name]), (kind, name)
        if ranks().main:
            save_file(saved, FOLDER / f"{kind}.safetensors")
            _stored_once(folder, kind, model)


def _stored_once(folder: Path, kind: str, model: Any) -> None:
    """Two groups have the same rows, and one of them writes each."""
    sizes: dict[str, int] = {}
    for path in (folder / "shards").iterdir():
        for name, x in load_file(path).items():
            if not name.endswith("_scales"):
                sizes[name] = sizes.get(name, 0) + x.numel()
    total = sum(p.numel() for p in model.parameters())
    assert sum(sizes.values()) == 3 * total, kind


def buckets() -> None:
    """Gradients of copies are summed a bucket at a time, in the order of the weights, and come to the whole sum."""
    model = plain("untied")
    other = copy.deepcopy(model)
    mine, alone = AdamW(model.parameters(), lr=1e-3), AdamW(other.parameters(), lr=1e-3)
    loss_of(model, batches()[ranks().index], critic=False).backward()
    sizes: list[int] = []
    really, ranks_module.BUCKET = torch.distributed.all_reduce, 5000

    def counted(tensor: torch.Tensor, *rest: Any, **options: Any) -> Any:
        sizes.append(tensor.numel())
        return really(tensor, *rest, **options)

    torch.distributed.all_reduce = counted
    norm = mine.step(0.5)
    torch.distributed.all_reduce = really
    numbers = [p.numel() for p in model.parameters()]
    assert sum(sizes) == sum(numbers) and len(sizes) <= 2 * sum(numbers) / 5000 + 1 < len(numbers), sizes
    assert all(size <= max(5000, *numbers) for size in sizes)
    for batch in batches():
        loss_of(other, batch, critic=False).backward()
    for _, master in alone.pairs:  # its step sums over ranks too
        assert master.grad is not None
        master.grad /= ranks().count
    assert_close(torch.tensor(alone.step(0.5)), torch.tensor(norm), rtol=1e-5, atol=0)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert_close(one, two, rtol=0, atol=1e-5)
    same = ranks().every([float(p.detach().sum()) for p in model.parameters()])
    assert len(list(groupby(same))) == 1


def sft_groups() -> None:
    """SFT with models sharded over two groups of two, each process with several micro-batches."""
    import phases

    job = phases.cut_jobs(Path(os.environ["RANKS_DATA"]))["sft-fsdp"]
    phases.run(replace(job, fsdp_size=2, micro_batch_size=2), FOLDER / "sft_groups")
