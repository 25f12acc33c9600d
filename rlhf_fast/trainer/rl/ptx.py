# SPDX-License-Identifier: Apache-2.0
"""Demonstrations in the policy's update (PPO-ptx, Ouyang et al. 2022, arXiv 2203.02155, eq. 2).

Each optimizer step also raises the log-likelihood of some demonstrations, so that what RL does not reward is not
forgotten: ptx_coef times the mean negative log-likelihood of their completions' tokens is added to the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.data.encoding import encode_example
from rlhf_fast.data.examples import Demonstration, pad_right
from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.errors import UserError
from rlhf_fast.models.batches import NO_ROWS, Batch, MicroBatch
from rlhf_fast.models.fsdp import pad_to_ranks
from rlhf_fast.models.heads import token_logprobs

from .prompts import draw


class PtxOptions(NamedTuple):
    """Options of learning from demonstrations."""

    coef: float
    size: int  # demonstrations in an optimizer step, over all ranks
    max_length: int
    micro_batch: MicroBatch
    seed: int


@dataclass
class Demonstrations:
    """Encoded demonstrations, some of which each optimizer step learns from."""

    batch: Batch  # of all of them
    options: PtxOptions

    def backward(self, policy: Any, number: int) -> dict[str, Tensor]:
        """Add the gradients of optimizer step `number`'s demonstrations; returns this rank's part of the mean loss."""
        options = self.options
        order = draw(number * options.size, options.size, len(self.batch.input_ids), options.seed + 1)
        rows = torch.tensor(order)[ranks().index :: ranks().count]
        tokens = ranks().total([float(self.batch.mask[rows].sum())])[0]
        loss = torch.zeros((), device=self.batch.mask.device)
        plan = self.batch.plan(options.micro_batch.rows, rows, tokens=options.micro_batch.tokens)
        for part in pad_to_ranks(plan, policy, NO_ROWS):
            mean = -token_logprobs(policy, self.batch.rows(part)).sum() / tokens
            (options.coef * mean).backward()
            loss += mean.detach()
        return {"loss/ptx": loss}


def encode_demonstrations(
    lines: Sequence[Demonstration], tokenizer: Any, device: torch.device, options: PtxOptions
) -> Demonstrations:
    """The demonstrations that fit; an optimizer step uses as many as samples."""
    max_length = options.max_length
    encoded = [encode_example(tokenizer, line.prompt, line.completion, where=line.where) for line in lines]
    fitting = [one for one in encoded if len(one.ids) <= max_length and one.completion]
    if not fitting:
        raise UserError(f"ptx_file: none of {len(lines)} demonstrations has at most max_length {max_length} tokens")
    input_ids, attention = (x.to(device) for x in pad_right([one.ids for one in fitting], tokenizer.pad_token_id))
    starts = torch.tensor([max(1, one.prompt_length) for one in fitting], device=device)
    columns = torch.arange(input_ids.shape[1], device=device)
    mask = attention.bool() & (columns >= starts[:, None])
    return Demonstrations(Batch(input_ids, attention.bool(), mask).with_copy(), options)
