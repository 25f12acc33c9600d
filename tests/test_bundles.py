# SPDX-License-Identifier: Apache-2.0
"""The conversion between bundles and torch's flat arguments."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from rlhf_fast.ops.linear.bundles import flatten, gradients_of, schema, unflatten


class Inner(NamedTuple):
    x: Tensor
    y: Tensor | None


class Outer(NamedTuple):
    inner: Inner
    scale: float


class Flags(NamedTuple):
    on: bool
    count: int


def test_there_and_back() -> None:
    outer, flags = Outer(Inner(torch.ones(1), None), 0.5), Flags(True, 3)
    flat = flatten(outer, flags)
    assert flat == (outer.inner.x, None, 0.5, True, 3)
    assert unflatten(flat, Outer, Flags) == [outer, flags]
    assert schema(Outer, Flags) == "Tensor x, Tensor? y, float scale, bool on, int count"
    assert schema(Outer, prefix="a_", mutated="x") == "Tensor(a!) a_x, Tensor? a_y, float a_scale"


def test_a_wrong_count_raises() -> None:
    with pytest.raises(TypeError, match="fewer values than Flags has fields"):
        unflatten((torch.ones(1), None, 0.5, True), Outer, Flags)
    with pytest.raises(TypeError, match="1 more values than Flags have fields"):
        unflatten((True, 3, 4), Flags)


def test_gradients_come_first_and_unneeded_ones_are_none() -> None:
    x, y = torch.ones(1), torch.zeros(1)
    assert gradients_of([x, y], [True, False], Outer, Flags) == (x, None, None, None, None)
    assert gradients_of([], [], Outer) == (None, None, None)
