# SPDX-License-Identifier: Apache-2.0
"""How a step's samples are divided: prompts, samples of each, minibatches, micro-batches."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from rlhf_fast.models.batches import NO_ROWS, Batch, MicroBatch
from rlhf_fast.models.fsdp import pad_to_ranks


class Sizes(NamedTuple):
    """The numbers of a step, over all ranks."""

    prompts: int
    samples: int  # of each prompt
    minibatches: int
    micro_batch: MicroBatch
    pairs: bool = False  # a prompt's samples form pairs, and stay together

    @property
    def units(self) -> int:
        """What minibatches share."""
        return self.prompts if self.pairs else self.prompts * self.samples

    def micro_batches(self, batch: Batch, model: Any, rows: Tensor | None = None, unit: int = 1) -> list[Tensor]:
        """The row indices of each forward pass over `batch` (or its `rows`); `unit` consecutive rows stay together."""
        plan = batch.plan(self.micro_batch.rows, rows, unit, tokens=self.micro_batch.tokens)
        return pad_to_ranks(plan, model, NO_ROWS)
