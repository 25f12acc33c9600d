# SPDX-License-Identifier: Apache-2.0
"""Dynamic sampling (DAPO, Yu et al. 2025, arXiv 2503.14476, section 3.2): a batch of prompts that teach something.

An objective that compares the samples of a prompt learns nothing where all of them earned the same: the prompt is too
easy, or hopeless. Such prompts are dropped and others are asked in their place, in whole rounds, until the batch is
full. All ranks see all samples before they choose, so that they take as many rounds, and the batch is that of one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.models.batches import Batch, Support
from rlhf_fast.rollout.rollout import Rollout


def refill(
    draw: Callable[[int], Rollout], earned: Callable[[Rollout], Tensor], wanted: int, rounds: int
) -> tuple[Rollout, dict[str, float]]:
    """This rank's share of the samples of `wanted` prompts, and what it took to find them.

    `draw(n)` samples other prompts for every n, this rank's share of `wanted`; `earned` (B,) is what samples are worth.
    After `rounds` beyond the first the batch is filled up with prompts whose samples earned the same, oldest first.
    """
    rollout = draw(0)
    if not rounds:
        return rollout, {}
    device, samples, extra = rollout.input_ids.device, len(rollout.texts) * ranks().count // wanted, 0
    pool = joined(ranks().every(moved(rollout, "cpu")))
    while True:
        groups = earned(pool).view(-1, samples)
        teaches = groups.amax(1) > groups.amin(1)
        if int(teaches.sum()) >= wanted or extra == rounds:
            break
        extra += 1
        pool = joined([pool, *ranks().every(moved(draw(extra), "cpu"))])
    found, order = int(teaches.sum()), (~teaches).long().argsort(stable=True)
    mine = order[:wanted][ranks().share(wanted, "prompts_per_step")]
    rows = (mine[:, None] * samples + torch.arange(samples)).flatten()
    assert pool.scores is not None  # `draw` scores what it samples
    figures = {
        "sample/extra_rounds": float(extra),
        "sample/dropped": float(len(teaches) - found - max(0, wanted - found)),
        "sample/unfilled": float(max(0, wanted - found)),
        "sample/scores_drawn": float(pool.scores.mean()),
    }
    return moved(chosen(pool, rows), device), figures


def joined(parts: Sequence[Rollout]) -> Rollout:
    """One behind the other, padded to one width."""
    width = max(part.input_ids.shape[1] for part in parts)
    input_ids, attention, response = (
        torch.cat([pad(x, (0, width - x.shape[1])) for x in tensors])
        for tensors in zip(*((p.input_ids, p.attention_mask, p.response_mask) for p in parts), strict=True)
    )
    supports = [part.support for part in parts if part.support is not None]
    support = None
    if supports:
        counts = torch.cat([one.offsets.diff() for one in supports])
        support = Support(torch.cat([one.ids for one in supports]), pad(counts.cumsum(0), (1, 0)))
    return Rollout(
        input_ids,
        attention,
        response,
        [text for part in parts for text in part.texts],
        torch.cat([part.ended for part in parts]),
        support,
        torch.cat([part.scores for part in parts if part.scores is not None]),
    )


def chosen(rollout: Rollout, rows: Tensor) -> Rollout:
    """Those rows, cut to the longest of them."""
    batch = Batch(rollout.input_ids, rollout.attention_mask, rollout.response_mask, rollout.support).rows(rows)
    texts, scores = [rollout.texts[row] for row in rows.tolist()], rollout.scores
    return Rollout(*batch[:3], texts, rollout.ended[rows], batch.support, None if scores is None else scores[rows])


def moved(rollout: Rollout, device: torch.device | str) -> Rollout:
    """On another device."""
    tensors: dict[str, Any] = {
        name: value.to(device) for name, value in vars(rollout).items() if isinstance(value, Tensor)
    }
    support = None if rollout.support is None else Support(*(x.to(device) for x in rollout.support))
    return replace(rollout, support=support, **tensors)
