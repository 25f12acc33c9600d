# SPDX-License-Identifier: Apache-2.0
"""Plain PyTorch works on logits a block of rows at a time: no row may know in which block it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import rlhf_fast as rf
from rlhf_fast.ops.reference import blocks

SHAPE = (3, 7, 33)
VOCAB = 29


def laid_out(x: Tensor, layout: str) -> Tensor:
    """x itself, or with rows that no view can put in one dimension."""
    if layout == "contiguous":
        return x.clone()
    return (
        torch.cat([x, x], 1)[:, : x.shape[1]] if layout == "sliced" else x.transpose(0, 1).contiguous().transpose(0, 1)
    )


def results(inputs: dict[str, Tensor], layout: str, kind: str) -> list[Tensor]:
    """Values and gradients of every op on logits, in place and not."""
    x, y = (laid_out(inputs[name], layout).requires_grad_() for name in ("x", "y"))
    options = {"mask": inputs["mask"], "temperature": inputs["temperature"], "vocab_size": VOCAB}
    kl = rf.token_kl(x, y, kind=kind, **options)
    found = [kl, *torch.autograd.grad((kl * inputs["weights"]).sum(), [x, y])]
    for inplace in (False, True):
        leaf = laid_out(inputs["x"], layout).requires_grad_()
        names = ("logprobs", "entropy", "logsumexp", "sum_sq_probs", "argmax")
        stats = rf.token_stats(leaf, inputs["targets"], outputs=names, inplace_backward=inplace, **options)
        assert stats.logprobs is not None and stats.entropy is not None and stats.logsumexp is not None
        loss = stats.logprobs.sum(-1) + stats.entropy - stats.logsumexp
        found += [*(value.detach() for value in stats), *torch.autograd.grad((loss * inputs["weights"]).sum(), leaf)]
    return found


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "transposed"])
@pytest.mark.parametrize("kind", ["reverse", "forward", "jsd", "tv"])
@pytest.mark.parametrize("rows", [1, 2, 5, 8, 14])
def test_blocks_of_any_size_give_the_same(
    layout: str, kind: str, rows: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {name: torch.randn(SHAPE, generator=generator) * 3 for name in ("x", "y")}
    inputs["x"][0, 1, 4] = inputs["y"][2, 3, 5] = -torch.inf
    inputs["x"][1, 2] = -torch.inf
    inputs["mask"] = torch.rand(SHAPE[:2], generator=generator) < 0.8
    inputs["temperature"] = 0.5 + torch.rand(SHAPE[:2], generator=generator)
    inputs["targets"] = torch.randint(VOCAB, (*SHAPE[:2], 2), generator=generator)
    inputs["weights"] = torch.randn(SHAPE[:2], generator=generator)
    with rf.use_backend("torch"):
        whole = results(inputs, "contiguous", kind)
        monkeypatch.setattr(blocks, "CPU_ENTRIES", rows * VOCAB)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        for got, wanted in zip(results(inputs, layout, kind), whole, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6, equal_nan=True)
