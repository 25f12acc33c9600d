# SPDX-License-Identifier: Apache-2.0
"""Dynamic sampling (DAPO, Yu et al. 2025, arXiv 2503.14476, section 3.2): a batch of prompts that teach something.

An objective that compares the samples of a prompt learns nothing if all their rewards are equal: the prompt is too easy
or too hard. Such prompts are dropped and replaced by others, a full round at a time, until the batch is full. All ranks
see all samples before they select, so that they take equally many rounds and get the batch that one rank would.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.rollout.rollout import Rollout

from .objectives.objective import equal_up_to_rounding


def refill(
    draw: Callable[[int], Rollout],
    rewards: Callable[[Rollout], Tensor],
    wanted: int,
    rounds: int,
) -> tuple[Rollout, dict[str, float]]:
    """This rank's share of the samples of `wanted` prompts, and figures of the rounds.

    `draw(n)` samples round n, this rank's share of `wanted` new prompts. `rewards` (B,) that differ by rounding only
    are equal. After `rounds` extra rounds the batch is filled up with prompts of equal rewards, oldest first.
    """
    rollout = draw(0)
    if not rounds:
        return rollout, {}
    device, samples, extra = rollout.input_ids.device, len(rollout.texts) * ranks().count // wanted, 0
    pool = Rollout.concatenate(ranks().every(rollout.to("cpu")))
    while True:
        rounding = None if pool.rounding is None else pool.rounding.view(-1, samples)
        teaches = ~equal_up_to_rounding(rewards(pool).double().view(-1, samples), rounding)
        if int(teaches.sum()) >= wanted or extra == rounds:
            break
        extra += 1
        pool = Rollout.concatenate([pool, *ranks().every(draw(extra).to("cpu"))])
    count, order = int(teaches.sum()), (~teaches).long().argsort(stable=True)
    mine = order[:wanted][ranks().share(wanted, "prompts_per_step")]
    rows = (mine[:, None] * samples + torch.arange(samples)).flatten()
    assert pool.scores is not None  # `draw` scores what it samples
    figures = {
        "sample/extra_rounds": float(extra),
        "sample/dropped": float(len(teaches) - count - max(0, wanted - count)),
        "sample/unfilled": float(max(0, wanted - count)),
        "sample/scores_drawn": float(pool.scores.mean()),
    }
    return pool.rows(rows).to(device), figures
