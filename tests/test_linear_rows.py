# SPDX-License-Identifier: Apache-2.0
"""Which rows take part: a mask, indices of the caller's, indices with padding; and what the host waits for."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from helpers.linear_heads import both
from helpers.tools import NAN, randint, randn, random_mask, with_gradients
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import rlhf_fast as rf
from rlhf_fast.ops import _check

ROWS, HIDDEN, VOCABULARY = (4, 9), 16, 149


class Case:
    """One call of each linear op on the same rows."""

    def __init__(self, generator: torch.Generator) -> None:
        count = ROWS[0] * ROWS[1]
        self.leaves = {
            "hidden": randn(*ROWS, HIDDEN, generator=generator),
            "weight": randn(VOCABULARY, HIDDEN, generator=generator),
        }
        self.mask = random_mask(*ROWS, generator=generator)
        self.rows = self.mask.flatten().nonzero().squeeze(-1)
        self.targets = randint(4, *ROWS, generator=generator)
        self.per_token = [randn(*ROWS, generator=generator) for _ in range(2)]
        self.ref = randn(*ROWS, HIDDEN, generator=generator), randn(VOCABULARY, HIDDEN, generator=generator)
        self.temperature = 0.5 + torch.rand(ROWS, generator=generator)
        self.support = torch.arange(4).repeat(count), torch.arange(count + 1) * 4

    def call(self, op: str, hidden: Tensor, weight: Tensor, **which: Any) -> dict[str, Tensor]:
        which["temperature"] = self.temperature
        if op == "linear_token_stats":
            out = rf.linear_token_stats(hidden, weight, self.targets, **which)
            return {"logprobs": out.logprobs, "entropy": out.entropy}
        if op == "linear_token_kl":
            return {"kl": rf.linear_token_kl(hidden, weight, *self.ref, **which)}
        if op == "linear_sampled_logprobs":
            return {"logprobs": rf.linear_sampled_logprobs(hidden, weight, self.targets, *self.support, **which)}
        out = rf.linear_policy_loss(
            hidden, weight, self.targets, *self.per_token, ref_hidden=self.ref[0], ref_weight=self.ref[1],
            estimator="exact", kl_coef=0.1, entropy_coef=0.01, **which,
        )  # fmt: skip
        return {"loss": out.loss, "logprobs": out.logprobs, "clip_fraction": out.clip_fraction}


every_op = pytest.mark.parametrize(
    "op", ["linear_token_stats", "linear_token_kl", "linear_sampled_logprobs", "linear_policy_loss"]
)


@both
@every_op
def test_indices_do_what_a_mask_does(backend: str, op: str, generator: torch.Generator) -> None:
    """Also shuffled, and with padding among them; what lies in rows that do not take part reaches nothing."""
    case = Case(generator)
    expected = with_gradients(lambda **x: case.call(op, **x, mask=case.mask), case.leaves)
    case.leaves["hidden"][~case.mask] = NAN
    case.temperature[~case.mask] = NAN
    for x in case.per_token:
        x[~case.mask] = NAN
    padded = torch.cat([torch.tensor([-1]), case.rows.flip(0), torch.tensor([-1, -1])])
    for rows in (case.rows, case.rows.int(), padded):
        got = with_gradients(lambda rows=rows, **x: case.call(op, **x, rows=rows), case.leaves)
        torch.testing.assert_close(got, expected)


@both
@every_op
def test_no_rows_and_padding_alone(backend: str, op: str, generator: torch.Generator) -> None:
    case = Case(generator)
    for rows in (torch.empty(0, dtype=torch.int64), torch.tensor([-1, -1])):
        outputs, grads = with_gradients(lambda rows=rows, **x: case.call(op, **x, rows=rows), case.leaves)
        assert all(bool((x == 0).all()) for x in (*outputs.values(), *grads.values()))


class Looks(TorchDispatchMode):
    """Counts what makes the host wait for a device: sizes that depend on values, and values themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.nonzero.default, torch.ops.aten._local_scalar_dense.default):
            self.seen[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", ["linear_token_stats", "linear_token_kl", "linear_policy_loss"])
def test_the_host_waits_once_for_a_mask_and_never_for_indices(
    op: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where values are not looked at: forward and backward together."""
    monkeypatch.setattr(_check, "can_look", lambda x: False)
    case = Case(generator)
    for which, wanted in (({"mask": case.mask}, 1), ({"rows": case.rows}, 0)):
        leaves = {k: v.clone().requires_grad_() for k, v in case.leaves.items()}
        with Looks() as looks:
            outputs = case.call(op, **leaves, **which)
            total = sum(x.sum() for x in outputs.values() if x.requires_grad)
        with Looks() as backward:
            total.backward()
        assert looks.seen["aten::nonzero"] == wanted, looks.seen
        assert not looks.seen["aten::_local_scalar_dense"]
        assert not backward.seen["aten::nonzero"], backward.seen


def test_what_rows_must_be(generator: torch.Generator) -> None:
    case = Case(generator)

    def call(**which: Any) -> Any:
        return rf.linear_token_logprobs(**case.leaves, targets=case.targets, **which)

    for rows, error, words in (
        ([0, 1], TypeError, "rows must be an int64 or int32 tensor of indices, got list"),
        (torch.tensor([0.0]), TypeError, "rows must be an int64 or int32 tensor of indices, got torch.float32"),
        (torch.tensor([[0]]), ValueError, r"rows must have one dimension, got \(1, 1\)"),
        (torch.tensor([0, 36]), ValueError, "rows must be between 0 and 35, or -1 for padding, got 36"),
        (torch.tensor([-2]), ValueError, "rows must be between 0 and 35, or -1 for padding, got -2"),
        (torch.tensor([3, 5, 3]), ValueError, "rows must differ, got 3 more than once"),
    ):
        with pytest.raises(error, match=words):
            call(rows=rows)
    with pytest.raises(ValueError, match="mask and rows say the same"):
        call(rows=case.rows, mask=case.mask)


def test_the_default_device_is_not_that_of_the_inputs(generator: torch.Generator) -> None:
    """As under torch.set_default_device("cuda") with tensors on the CPU."""
    case = Case(generator)
    wanted = rf.linear_token_logprobs(**case.leaves, targets=case.targets, rows=case.rows)
    count = case.targets.numel()
    with torch.device("meta"):
        got = rf.linear_token_logprobs(**case.leaves, targets=case.targets, rows=case.rows)
        kept = rf.linear_sampled_logprobs(
            **case.leaves,
            targets=case.targets,
            support_ids=case.targets.flatten(),
            support_offsets=torch.arange(count + 1, device="cpu"),
        )
    assert torch.equal(got, wanted)
    assert not bool(kept.any())  # one kept id has probability 1
