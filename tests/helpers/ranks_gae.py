# SPDX-License-Identifier: Apache-2.0
"""Four processes, each with a part of every row, against the whole rows: `python ranks_gae.py STORE`, one line a case.

They are forks of one process, which has imported everything and computed nothing.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import rlhf_fast as rf
from rlhf_fast.distributed.sequence import gae_over_ranks

RANKS, ROWS, LENGTH = 4, 7, 22
CUTS = {2: (0, 15, LENGTH), 4: (0, 3, 9, 10, LENGTH)}  # unequal parts, one of a single token


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(0)
    rewards, values, bootstrap = (torch.randn(ROWS, LENGTH, generator=g, dtype=torch.float64) for _ in range(3))
    chance = torch.rand(3, ROWS, LENGTH, generator=g)
    mask = chance[0] < 0.7
    mask[0] = False  # a row without tokens, one without any in the last parts, one without any in the middle ones
    mask[1, 9:] = False
    mask[2, 3:10] = False
    flags = {"mask": mask, "dones": chance[1] < 0.1, "truncated": chance[2] < 0.1, "bootstrap_values": bootstrap}
    return (
        rewards.to(dtype),
        values.to(dtype),
        {k: v.to(dtype) if v.is_floating_point() else v for k, v in flags.items()},
    )


def rows_of(rank: int, count: int, group: Any) -> None:
    """This rank's part of what the op gives for whole rows."""
    part = slice(CUTS[count][rank], CUTS[count][rank + 1])
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-6)):
        rewards, values, flags = inputs(dtype)
        for names in ((), ("mask",), ("mask", "dones"), ("mask", "truncated", "bootstrap_values"), tuple(flags)):
            for options in ({}, {"gamma": 0.97, "lam": 0.8}, {"gamma": 0.9, "lam": 0.0}, {"mask_mode": "zero"}):
                given = {name: flags[name] for name in names}
                whole = rf.gae(rewards, values, **given, **options)
                mine = gae_over_ranks(
                    rewards[:, part], values[:, part], group, **{k: v[:, part] for k, v in given.items()}, **options
                )
                for found, wanted in zip(mine, whole, strict=True):
                    assert found.dtype == wanted.dtype
                    torch.testing.assert_close(found, wanted[:, part], rtol=tolerance, atol=10 * tolerance)
                    assert names == () or not found[~flags["mask"][:, part]].any()


def infinite(rank: int, count: int, group: Any) -> None:
    """An infinite reward at the end of a row reaches no token before a done, and no masked one."""
    part = slice(CUTS[count][rank], CUTS[count][rank + 1])
    rewards, values, flags = inputs(torch.float64)
    rewards[:, -1] = torch.inf
    flags["dones"][3:, CUTS[count][1]] = True
    for names in (("mask",), ("dones",), ("mask", "dones")):
        given = {name: flags[name] for name in names}
        whole = rf.gae(rewards, values, **given)
        mine = gae_over_ranks(rewards[:, part], values[:, part], group, **{k: v[:, part] for k, v in given.items()})
        assert whole.advantages.isinf().any() and not whole.advantages.isnan().any()
        for found, wanted in zip(mine, whole, strict=True):
            torch.testing.assert_close(found, wanted[:, part], rtol=1e-12, atol=1e-11)


def per_token(rank: int, count: int, group: Any) -> None:
    """The other ops need no messages: a part of the rows gives that part of the result, bit for bit."""
    g = torch.Generator().manual_seed(1)
    logits, other = (torch.randn(3, LENGTH, 50, generator=g) for _ in range(2))
    targets = torch.randint(50, (3, LENGTH), generator=g)
    mask = torch.rand(3, LENGTH, generator=g) < 0.7
    part = slice(CUTS[count][rank], CUTS[count][rank + 1])
    for whole, mine in (
        (rf.token_logprobs(logits, targets), rf.token_logprobs(logits[:, part], targets[:, part])),
        (rf.token_kl(logits, other), rf.token_kl(logits[:, part], other[:, part])),
        (rf.approx_kl(logits[..., 0], other[..., 0]), rf.approx_kl(logits[:, part, 0], other[:, part, 0])),
    ):
        assert torch.equal(whole[:, part], mine)
    whole = rf.masked_whiten(logits[..., 0], mask)
    mine = rf.masked_whiten(logits[:, part, 0], mask[:, part], process_group=group)
    torch.testing.assert_close(mine, whole[:, part], rtol=1e-5, atol=1e-6)


def refused(rank: int, count: int, group: Any) -> None:
    rewards = torch.zeros(2, 3)
    for wrong in ({"dones": torch.ones(2).bool()}, {"mask": torch.ones(2).bool()}, {"mask_mode": "skip"}, {"lam": 2.0}):
        try:
            gae_over_ranks(rewards, rewards, group, **wrong)
        except ValueError as error:
            assert next(iter(wrong)) in str(error), error
        else:
            raise AssertionError(f"{wrong} was accepted")


def main(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    for case in (rows_of, infinite, per_token, refused):
        case(rank % 2, 2, pairs[rank // 2])
        case(rank, RANKS, dist.group.WORLD)
        print(f"{case.__name__} done", flush=True)
    dist.barrier()


if __name__ == "__main__":
    children = []
    for rank in range(RANKS):
        if (child := os.fork()) == 0:
            code = 1
            try:
                main(rank, sys.argv[1])
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    sys.exit(sum(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children))
