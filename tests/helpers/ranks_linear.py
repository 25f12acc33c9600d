# SPDX-License-Identifier: Apache-2.0
"""What each of two processes does in test_linear_sharded.py: `python ranks_linear.py RANK STORE CASE ...`."""

from __future__ import annotations

import gc
import os
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import rlhf_fast as rf
from rlhf_fast.ops.linear import tiles

RANKS, ROWS, HIDDEN, VOCABULARY = 2, (3, 5), 8, 46
HALF = VOCABULARY // RANKS


def inputs(dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Differentiable and other tensors, the same on every rank."""
    g = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    moving = {"hidden": normal(*ROWS, HIDDEN), "weight": 0.4 * normal(VOCABULARY, HIDDEN), "bias": normal(VOCABULARY)}
    fixed = {
        "targets": torch.randint(VOCABULARY, ROWS, generator=g),
        "mask": torch.rand(ROWS, generator=g) < 0.8,
        "old": 0.5 * normal(*ROWS) - 4,
        "advantages": normal(*ROWS),
        "ref_hidden": normal(*ROWS, HIDDEN),
        "ref_weight": 0.4 * normal(VOCABULARY, HIDDEN),
        "a": normal(2, HIDDEN),
        "b": normal(VOCABULARY, 2),
        "temperature": 0.5 + torch.rand(ROWS, generator=g),
    }
    return moving, fixed


def slice_of(x: Tensor, rank: int) -> Tensor:
    return x[rank * HALF : (rank + 1) * HALF]


def compare(rank: int, call: Callable[..., Any], **shared: Tensor) -> None:
    """`call(leaves, cut, group)` on whole tensors, and on this rank's slices; values and gradients must agree.

    cut takes a whole (V, ...) tensor to what the call should get.
    """
    moving, _ = inputs()
    results = []
    for cut, group in ((lambda x: x, None), (lambda x: slice_of(x, rank), dist.group.WORLD)):
        leaves = {k: v.clone().requires_grad_() for k, v in {**moving, **shared}.items()}
        out = call({k: cut(v) if v.shape[:1] == (VOCABULARY,) else v for k, v in leaves.items()}, cut, group)
        outputs = [x for x in (out if isinstance(out, tuple) else (out,)) if x is not None]
        loss = sum((torch.sin(x) * (i + 1)).sum() for i, x in enumerate(outputs) if x.requires_grad)
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        results.append((outputs, dict(zip(leaves, grads, strict=True))))
    (whole, whole_grads), (mine, my_grads) = results
    for a, b in zip(mine, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
    for name, grad in my_grads.items():
        wanted = whole_grads[name]
        if grad is None:
            assert wanted is None
        elif grad.shape[:1] == (VOCABULARY,):
            torch.testing.assert_close(slice_of(grad, rank), slice_of(wanted, rank), rtol=2e-4, atol=2e-5)
        else:
            torch.testing.assert_close(grad, wanted, rtol=2e-4, atol=2e-5)


def stats(rank: int) -> None:
    _, x = inputs()
    outputs = ("logprobs", "entropy", "logsumexp", "sum_sq_probs", "argmax")
    for options in ({}, {"softcap": 3.0, "logit_scale": 0.7}, {"vocab_size": 40}, {"vocab_size": 20},
                    {"mask": x["mask"], "temperature": x["temperature"]}, {"memory_budget": 0}):  # fmt: skip
        targets = x["targets"] % options.get("vocab_size", VOCABULARY)
        several = torch.stack([targets, (targets + 7) % options.get("vocab_size", VOCABULARY)], -1)
        for t in (targets, several):
            compare(rank, lambda leaves, cut, group, t=t, o=options: tuple(
                rf.linear_token_stats(**leaves, targets=t, outputs=outputs, process_group=group, **o)))  # fmt: skip
    compare(rank, lambda leaves, cut, group: rf.linear_token_logprobs(
        leaves["hidden"], leaves["weight"], x["targets"], lora=(leaves["a"], leaves["b"], 0.5), process_group=group
    ), a=x["a"], b=x["b"])  # fmt: skip


def offset(rank: int) -> None:
    """A common offset of 1e4 in the bias costs no digits, as it costs none on one rank."""
    moving, x = inputs()
    moving["hidden"] = moving["hidden"].round()
    moving["weight"] = moving["weight"].round()
    moving["bias"] = moving["bias"].round()
    whole = rf.linear_token_stats(**moving, targets=x["targets"])
    moved = {**moving, "weight": slice_of(moving["weight"], rank), "bias": slice_of(moving["bias"], rank) + 1e4}
    mine = rf.linear_token_stats(**moved, targets=x["targets"], process_group=dist.group.WORLD)
    torch.testing.assert_close(mine.logprobs, whole.logprobs, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(mine.entropy, whole.entropy, rtol=1e-6, atol=2e-6)


def kl(rank: int) -> None:
    _, x = inputs()
    for kind in ("reverse", "forward", "jsd", "tv"):
        for options in ({}, {"temperature": x["temperature"], "mask": x["mask"], "softcap": 4.0}):
            compare(rank, lambda leaves, cut, group, k=kind, o=options: rf.linear_token_kl(
                **leaves, kind=k, process_group=group, **o), ref_hidden=x["ref_hidden"],
                ref_weight=x["ref_weight"])  # fmt: skip


def policy(rank: int, **options: Any) -> None:
    _, x = inputs()
    targets = x["targets"] % options.get("vocab_size", VOCABULARY)

    def loss(leaves: dict[str, Tensor], cut: Any, group: Any, exact: bool) -> Any:
        reference = {"ref_logprobs": x["old"]}
        if exact:
            reference = {"ref_hidden": x["ref_hidden"], "ref_weight": cut(x["ref_weight"])}
        return rf.linear_policy_loss(
            leaves["hidden"], leaves["weight"], targets, x["old"], x["advantages"], bias=leaves["bias"],
            mask=x["mask"], kl_coef=0.1, estimator="exact" if exact else "k3", entropy_coef=0.01,
            temperature=0.8, process_group=group, **reference, **options,
        )  # fmt: skip

    for exact in (False, True):
        compare(rank, lambda leaves, cut, group, e=exact: tuple(loss(leaves, cut, group, e)))


def blocks(rank: int) -> None:
    """Several blocks of rows, where fewer columns of the last rank count, or none: all ranks need as many blocks."""
    _, x = inputs()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("CPU_TILE", 4 * 40), ("CPU_ROW_TILE", 4 * 60), ("CPU_MIN_ROWS", 2)):
            patch.setattr(tiles, name, value)
        for vocab_size in (30, 20):
            for options in ({"vocab_size": vocab_size}, {"vocab_size": vocab_size, "memory_budget": 0}):
                policy(rank, **options)
                for kind in ("reverse", "jsd"):
                    compare(rank, lambda leaves, cut, group, k=kind, o=options: rf.linear_token_kl(
                        **leaves, kind=k, process_group=group, **o), ref_hidden=x["ref_hidden"],
                        ref_weight=x["ref_weight"])  # fmt: skip


def sampled(rank: int) -> None:
    _, x = inputs()
    count = x["targets"].numel()
    ids = torch.stack([(x["targets"].flatten() + step) % VOCABULARY for step in (5, 0, 11, 30)], 1).flatten()
    offsets = torch.arange(count + 1) * 4
    compare(rank, lambda leaves, cut, group: rf.linear_sampled_logprobs(
        leaves["hidden"], leaves["weight"], x["targets"], ids, offsets, bias=leaves["bias"], softcap=5.0,
        process_group=group))  # fmt: skip


def compiled(rank: int) -> None:
    """fullgraph: the collectives are inside the operators. An eager call must come first, in which the ranks agree."""
    moving, x = inputs()
    weight, bias = slice_of(moving["weight"], rank), slice_of(moving["bias"], rank)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        logprobs = rf.linear_token_logprobs(
            hidden, weight, x["targets"], bias=bias, mask=x["mask"], process_group=dist.group.WORLD
        )
        return logprobs.square().sum()

    try:
        torch.compile(loss, fullgraph=True)(moving["hidden"], weight)
    except Exception as error:
        assert "call the op once without compiling" in str(error), error
    else:
        raise AssertionError("the ranks agreed while torch.compile traced")
    torch._dynamo.reset()
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        leaves = [y.clone().requires_grad_() for y in (moving["hidden"], weight)]
        value = function(*leaves)
        results.append((value, *torch.autograd.grad(value, leaves)))
    torch.testing.assert_close(*results)


def unequal(rank: int) -> None:
    moving, x = inputs()
    mine = moving["weight"][: HALF - rank]
    try:
        rf.linear_token_logprobs(moving["hidden"], mine, x["targets"], process_group=dist.group.WORLD)
    except ValueError as error:
        assert "weight must be an equal slice of the vocabulary on every rank" in str(error), error
    else:
        raise AssertionError("unequal slices were taken")


def dtensor(rank: int) -> None:
    """A weight that is a DTensor sharded on dim 0 is taken with its group alone, and so is its gradient's placement."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    moving, x = inputs()
    mesh = init_device_mesh("cpu", (RANKS,))
    weight = distribute_tensor(moving["weight"], mesh, [Shard(0)]).requires_grad_()
    hidden = moving["hidden"].clone().requires_grad_()
    with pytest.raises(ValueError, match="weight must be whole, got a DTensor .* give process_group"):
        rf.linear_token_logprobs(hidden, weight, x["targets"])
    got = rf.linear_token_logprobs(hidden, weight, x["targets"], process_group=mesh.get_group())
    got.sum().backward()
    leaves = {k: moving[k].clone().requires_grad_() for k in ("hidden", "weight")}
    whole = rf.linear_token_logprobs(**leaves, targets=x["targets"])
    whole.sum().backward()
    torch.testing.assert_close(got, whole)
    torch.testing.assert_close(hidden.grad, leaves["hidden"].grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad.to_local(), slice_of(leaves["weight"].grad, rank), rtol=1e-4, atol=1e-5)


class Model(nn.Module):
    """A trunk and a head; the loss is taken inside forward, where FSDP2 has the head's weight together."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.trunk = nn.Linear(HIDDEN, HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        return rf.linear_token_logprobs(self.trunk(x), self.lm_head.weight, targets).sum()


def fsdp(rank: int) -> None:
    """Each rank has tokens of its own; gradients are averaged over ranks as FSDP2 does for any module."""
    from torch.distributed.fsdp import fully_shard

    moving, x = inputs()
    mine = slice(0, 2) if rank == 0 else slice(1, 3)
    alone, wrapped = Model(), fully_shard(Model())
    wrapped(moving["hidden"][mine], x["targets"][mine]).backward()
    losses = [alone(moving["hidden"][s], x["targets"][s]) for s in (slice(0, 2), slice(1, 3))]
    (sum(losses) / 2).backward()
    whole = wrapped.lm_head.weight.grad.full_tensor()
    torch.testing.assert_close(whole, alone.lm_head.weight.grad, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    number, store = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    for case in sys.argv[3:]:
        dist.init_process_group("gloo", init_method=f"file://{store}-{case}", rank=number, world_size=RANKS)
        group = weakref.ref(dist.group.WORLD)
        globals()[case](number)
        dist.destroy_process_group()
        gc.collect()  # frames of the case that refer to each other
        if case not in ("dtensor", "fsdp", "compiled"):  # torch itself keeps the groups of its meshes and graphs
            assert group() is None, "the ops keep the group: its threads may abort the process at its end"
        print(f" {case} done ", flush=True)
    os._exit(0)  # past the end of Python, where the threads of those groups may still ask for it
