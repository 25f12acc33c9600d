# SPDX-License-Identifier: Apache-2.0
"""What each of two processes does in test_hf_sharded.py: `python -m helpers.ranks_hf RANK STORE CASE ...`."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import rlhf_fast as rf

RANKS = 2


def model(tied: bool = False) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    made = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(3)
    return made


def rows(rank: int) -> Tensor:
    """Each rank has tokens of its own."""
    return torch.randint(1, 64, (2, 7), generator=torch.Generator().manual_seed(rank))


def loss(wrapped: Any, rank: int) -> Tensor:
    stats = rf.hf.token_stats(wrapped, rows(rank))
    assert stats.logprobs is not None and stats.entropy is not None
    return (stats.logprobs + 0.1 * stats.entropy).sum()


def compare(wrapped: Any, alone: Any, rank: int) -> None:
    """This rank's values, and gradients averaged over ranks, are those of one process; twice, as in training."""
    for _ in range(2):
        for each in (wrapped, alone):
            each.zero_grad()
        mine = loss(wrapped, rank)
        mine.backward()
        wanted = [loss(alone, r) for r in range(RANKS)]
        (sum(wanted) / RANKS).backward()
        torch.testing.assert_close(mine, wanted[rank], rtol=1e-5, atol=1e-5)
        parameters = dict(getattr(wrapped, "module", wrapped).named_parameters())
        for name, parameter in alone.named_parameters():
            grad = parameters[name].grad
            assert grad is not None, f"{name} got no gradient"
            grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            torch.testing.assert_close(grad, parameter.grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def ddp(rank: int) -> None:
    compare(DistributedDataParallel(model()), model(), rank)


def fsdp(rank: int) -> None:
    """Layers, trunk and head each in a group of their own."""
    from torch.distributed.fsdp import fully_shard

    wrapped = model()
    for layer in wrapped.model.layers:
        fully_shard(layer)
    fully_shard(wrapped.model)
    fully_shard(wrapped.lm_head)
    compare(fully_shard(wrapped), model(), rank)


def fsdp_root(rank: int) -> None:
    """Layers alone, and the rest, with a tied head, in the model's own group."""
    from torch.distributed.fsdp import fully_shard

    wrapped = model(tied=True)
    for layer in wrapped.model.layers:
        fully_shard(layer)
    compare(fully_shard(wrapped), model(tied=True), rank)


if __name__ == "__main__":
    number, store = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    for case in sys.argv[3:]:
        dist.init_process_group("gloo", init_method=f"file://{store}-{case}", rank=number, world_size=RANKS)
        globals()[case](number)
        dist.destroy_process_group()
        print(f" {case} done ", flush=True)
    os._exit(0)  # past the end of Python, where threads of the meshes' groups may still ask for it
