# SPDX-License-Identifier: Apache-2.0
"""Cutting a batch into micro-batches."""

from __future__ import annotations

import torch

from rlhf_fast.models.batches import Batch, in_micro_batches


def test_micro_batches_come_back_in_order() -> None:
    mask = torch.arange(6) < torch.tensor([2, 6, 3, 5, 1])[:, None]
    batch = Batch(torch.arange(30).view(5, 6), mask, mask)
    plan = batch.plan(2)
    assert [rows.tolist() for rows in plan] == [[1, 3], [2, 0], [4]]
    assert batch.rows(plan[1]).input_ids.shape == (2, 3)
    torch.testing.assert_close(in_micro_batches(lambda p: p.input_ids * p.mask, batch, plan), batch.input_ids * mask)
    torch.testing.assert_close(in_micro_batches(lambda p: p.input_ids[:, 0], batch, plan), batch.input_ids[:, 0])
