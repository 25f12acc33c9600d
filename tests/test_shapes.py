# SPDX-License-Identifier: Apache-2.0
"""Sizes that torch leaves open: one graph for many of them in torch.compile, torch.export and AOTInductor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import rlhf_fast as rf

SIZES = [(2 + i, 3 + 2 * i) for i in range(12)]
HIDDEN, WIDTH = 8, 37


def inputs_of(rows: tuple[int, int]) -> dict[str, Tensor]:
    """What any op takes, for (B, T) rows; 37 columns of logits."""
    g = torch.Generator().manual_seed(rows[0])
    count = rows[0] * rows[1]
    hidden, logits = (torch.randn(*rows, width, generator=g) for width in (HIDDEN, WIDTH))
    old, advantages, values = (torch.randn(*rows, generator=g) for _ in range(3))
    return {
        "hidden": hidden.requires_grad_(), "logits": logits.requires_grad_(),
        "weight": torch.randn(WIDTH, HIDDEN, generator=torch.Generator().manual_seed(0)).requires_grad_(),
        "targets": torch.randint(4, rows, generator=g), "mask": torch.rand(*rows, generator=g) < 0.7,
        "old": old, "advantages": advantages, "values": values, "scores": torch.randn(rows[0], generator=g),
        "support_ids": torch.arange(4).repeat(count), "support_offsets": torch.arange(count + 1) * 4,
    }  # fmt: skip


OPS: dict[str, Any] = {
    "linear_token_logprobs": lambda x: rf.linear_token_logprobs(x["hidden"], x["weight"], x["targets"], mask=x["mask"]),
    "linear_token_kl": lambda x: rf.linear_token_kl(
        x["hidden"], x["weight"], x["hidden"].detach() + 1, x["weight"].detach(), mask=x["mask"]
    ),
    "linear_policy_loss": lambda x: (
        rf.linear_policy_loss(x["hidden"], x["weight"], x["targets"], x["old"], x["advantages"], mask=x["mask"]).loss
    ),
    "linear_sampled_logprobs": lambda x: rf.linear_sampled_logprobs(
        x["hidden"], x["weight"], x["targets"], x["support_ids"], x["support_offsets"], mask=x["mask"]
    ),
    "token_logprobs": lambda x: rf.token_logprobs(x["logits"], x["targets"], mask=x["mask"]),
    "token_kl": lambda x: rf.token_kl(x["logits"], x["logits"].detach() * 2, mask=x["mask"]),
    "token_kl_and_grad": lambda x: rf.token_kl_and_grad(x["logits"], x["logits"].detach() * 2, x["old"])[0],
    "approx_kl": lambda x: rf.approx_kl(x["values"] + x["logits"][..., 0], x["old"], mask=x["mask"]),
    "gae": lambda x: rf.gae(x["advantages"], x["values"], mask=x["mask"])[0],
    "ppo_advantages": lambda x: (
        rf.ppo_advantages(x["scores"], x["old"], x["old"] + 1, x["values"], x["mask"], kl_coef=0.1).advantages
    ),
    "masked_whiten": lambda x: rf.masked_whiten(x["values"], x["mask"]),
}

every_op = pytest.mark.parametrize("op", OPS)


@every_op
def test_two_graphs_serve_twelve_sizes(op: str) -> None:
    """Forward and backward: the first size gets a graph, the second one that holds for all others."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(OPS[op], fullgraph=True, backend=counter)
    for rows in SIZES:
        x = inputs_of(rows)
        got = compiled(x)
        torch.testing.assert_close(got, OPS[op](x))
        if got.requires_grad:
            got.sum().backward()
            assert any(leaf.grad is not None for leaf in (x["hidden"], x["logits"]))
    assert counter.frame_count <= 2


class Module(torch.nn.Module):
    def __init__(self, *ops: str) -> None:
        super().__init__()
        self.ops = ops

    def forward(self, x: dict[str, Tensor]) -> Any:
        return {op: OPS[op]({k: v.detach() for k, v in x.items()}) for op in self.ops}


def exported(*ops: str) -> torch.export.ExportedProgram:
    batch, time = torch.export.Dim("batch", min=2), torch.export.Dim("time", min=2)
    shapes: dict[str, Any] = {name: {0: batch, 1: time} for name in inputs_of((3, 5))}
    shapes |= {"scores": {0: batch}, "weight": {}}
    shapes |= {name: {0: torch.export.Dim.AUTO} for name in ("support_ids", "support_offsets")}
    return torch.export.export(Module(*ops), (detached((3, 5)),), dynamic_shapes=(shapes,))


def detached(rows: tuple[int, int]) -> dict[str, Tensor]:
    return {k: v.detach() for k, v in inputs_of(rows).items()}


def test_export_leaves_packed_sequences_open() -> None:
    """The number of tokens and that of sequences, equal or not, with flags that could be per token or per row."""

    class Packed(torch.nn.Module):
        def forward(self, rewards: Tensor, dones: Tensor, cu_seqlens: Tensor) -> Tensor:
            return rf.gae(rewards, rewards, dones=dones, cu_seqlens=cu_seqlens, lam=0.9).advantages

    def inputs(*bounds: int) -> tuple[Tensor, Tensor, Tensor]:
        return torch.arange(float(bounds[-1])), torch.arange(bounds[-1]) % 3 == 0, torch.tensor(bounds)

    tokens, sequences = torch.export.Dim("tokens", min=2), torch.export.Dim("bounds", min=2)
    shapes = ({0: tokens}, {0: tokens}, {0: sequences})
    module = torch.export.export(Packed(), inputs(0, 4, 7), dynamic_shapes=shapes).module()
    for bounds in ((0, 4, 7), (0, 2, 9, 10), (0, 1, 2)):
        torch.testing.assert_close(module(*inputs(*bounds)), Packed()(*inputs(*bounds)))


@every_op
def test_export_leaves_the_batch_open(op: str) -> None:
    module = exported(op).module()
    for rows in ((3, 5), (7, 2), (4, 11)):
        torch.testing.assert_close(module(detached(rows)), Module(op)(detached(rows)))


# Of the C++ compiler, which would else take longer than the test.
QUICK = {
    f"aot_inductor.{name}": value
    for name, value in (("precompile_headers", False), ("compile_wrapper_opt_level", "O0"))
    if hasattr(torch._inductor.config.aot_inductor, name)
}


def test_aot_inductor(tmp_path: Path) -> None:
    """Ops in one compiled package, which is run with sizes that it was not compiled for."""
    with torch._inductor.config.patch(QUICK):
        path = torch._inductor.aoti_compile_and_package(exported(*OPS), package_path=str(tmp_path / "ops.pt2"))
    package = torch._inductor.aoti_load_package(path)
    for rows in ((3, 5), (7, 2)):
        torch.testing.assert_close(package(detached(rows)), Module(*OPS)(detached(rows)))
