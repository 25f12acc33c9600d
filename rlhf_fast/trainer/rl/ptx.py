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

from rlhf_fast.data.dropped import Dropped
from rlhf_fast.data.encoding import encode_example
from rlhf_fast.data.examples import Demonstration, pad_right
from rlhf_fast.data.limits import Limits
from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.errors import UserError
from rlhf_fast.models.batches import NO_ROWS, Batch, MicroBatch
from rlhf_fast.models.fsdp import pad_to_ranks
from rlhf_fast.models.heads import token_logprobs
from rlhf_fast.models.loading import reading_limits
from rlhf_fast.run.progress import notice

from .prompts import draw


class PtxOptions(NamedTuple):
    """Options of learning from demonstrations."""

    coef: float
    limits: Limits  # the user's; the model's are added
    micro_batch: MicroBatch
    seed: int
    stride: int  # demonstrations of an optimizer step of full size; a smaller step leaves the rest of them out


@dataclass
class Demonstrations:
    """Encoded demonstrations, some of which each optimizer step learns from."""

    batch: Batch  # of all of them
    options: PtxOptions

    def backward(self, policy: Any, number: int, count: int) -> dict[str, Tensor]:
        """Add the gradients of the demonstrations of optimizer step `number`, `count` over all ranks.

        Returns this rank's part of the mean loss.
        """
        options = self.options
        order = draw(number * options.stride, count, len(self.batch.input_ids), options.seed + 1)
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
    lines: Sequence[Demonstration], policy: Any, tokenizer: Any, options: PtxOptions
) -> Demonstrations:
    """The demonstrations, as SFT encodes them: a completion that is too long is truncated, without its end.

    Reports what is dropped or truncated. Raises UserError if no demonstration is usable.
    """
    limits = reading_limits(policy, options.limits)
    dropped, truncated = Dropped("ptx_file", limits.strict), 0
    sequences: list[list[int]] = []
    prompt_lengths: list[int] = []
    for line in lines:
        try:
            ids, start, *_ = encode_example(tokenizer, line.prompt, line.completion, where=line.where)
            prompt = limits.prompt_of(ids, start, tokenizer, line.where)
        except UserError as error:
            limits.leave_out(dropped, error)
            continue
        ids = prompt + ids[start:]
        if len(ids) > limits.max_length:
            truncated += 1
            if limits.overlong == "error":
                raise UserError(f"{line.where}: it has {len(ids)} tokens, more than max_length {limits.max_length}")
        sequences.append(ids[: limits.max_length])
        prompt_lengths.append(max(1, len(prompt)))
    dropped.report(len(sequences))
    if truncated:
        notice(f"{truncated} of {len(sequences)} rows of ptx_file were longer than {limits.max_length} and were cut")
    device = ranks().device
    input_ids, attention = (x.to(device) for x in pad_right(sequences, tokenizer.pad_token_id))
    starts = torch.tensor(prompt_lengths, device=device)
    columns = torch.arange(input_ids.shape[1], device=device)
    mask = attention.bool() & (columns >= starts[:, None])
    return Demonstrations(Batch(input_ids, attention.bool(), mask).with_copy(), options)
