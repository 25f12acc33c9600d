# SPDX-License-Identifier: Apache-2.0
"""Splitting a batch of sequences into micro-batches of rows of similar length, so that few pads are computed.

The split changes speed and memory, never results: each row's result depends on that row alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

NO_ROWS = torch.empty(0, dtype=torch.int64)  # an empty micro-batch


class MicroBatch(NamedTuple):
    """The largest micro-batch: a forward pass of one process."""

    rows: int
    tokens: int = 0  # pads included, unless it is a single row; 0: no limit

    @classmethod
    def of(cls, options: Any) -> MicroBatch:
        """Of a phase's options `micro_batch_size` and `micro_batch_tokens`."""
        return cls(options.micro_batch_size, options.micro_batch_tokens)


def in_groups(units: Sequence[tuple[int, int]], most: MicroBatch) -> list[range]:
    """Indices of consecutive units, each (rows, longest row), in groups within `most`; a unit alone may exceed it."""
    groups: list[range] = []
    rows = width = 0
    for i, (count, longest) in enumerate(units):
        rows, width = rows + count, max(width, longest)
        if groups and rows <= most.rows and (not most.tokens or rows * width <= most.tokens):
            groups[-1] = range(groups[-1].start, i + 1)
        else:
            groups.append(range(i, i + 1))
            rows, width = count, longest
    return groups


class Support(NamedTuple):
    """The ids that top-k or top-p sampling kept for each sampled token, tokens in row-major order of the mask."""

    ids: Tensor  # (total,) int64
    offsets: Tensor  # (N + 1,) int64: token n kept ids[offsets[n]:offsets[n + 1]]

    @classmethod
    def of_counts(cls, ids: Tensor, counts: Tensor) -> Support:
        """From the ids of all tokens, concatenated, and the number of ids of each token (N,)."""
        return cls(ids=ids, offsets=torch.nn.functional.pad(counts.cumsum(0), (1, 0)))

    @classmethod
    def concatenate(cls, supports: Sequence[Support]) -> Support:
        """The tokens of all supports, in order."""
        counts = torch.cat([support.offsets.diff() for support in supports])
        return cls.of_counts(torch.cat([support.ids for support in supports]), counts)

    def take(self, tokens: Tensor) -> Support:
        """The support of the tokens with the indices `tokens` (n,)."""
        begin, counts = self.offsets[tokens], self.offsets.diff()[tokens]
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        within = torch.arange(int(offsets[-1]), device=counts.device) - offsets[:-1].repeat_interleave(counts)
        return Support(ids=self.ids[begin.repeat_interleave(counts) + within], offsets=offsets)

    def to(self, device: torch.device | str) -> Support:
        """A copy on `device`."""
        return Support(ids=self.ids.to(device), offsets=self.offsets.to(device))


class Batch(NamedTuple):
    """Sequences padded on the right, and a mask of the tokens whose log-probabilities or values are wanted."""

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) bool
    mask: Tensor  # (B, T) bool, True = wanted (a completion's tokens); False at the first token of a sequence
    support: Support | None = None  # of the tokens of `mask`, if top-k or top-p removed some ids
    positions: Tensor | None = None  # (B, T) if a row holds several sequences: each begins at 0
    copy: Batch | None = None  # on the CPU, of a batch that is elsewhere

    def on_cpu(self) -> Batch:
        """Ids and masks on the CPU, where they can be read without waiting for a GPU; this waits once if there is no
        `copy`."""
        if self.copy is not None or self.input_ids.device.type == "cpu":
            return self.copy or self
        ids, attention, mask = torch.stack([self.input_ids, self.attention_mask.long(), self.mask.long()]).cpu()
        return Batch(ids, attention.bool(), mask.bool())

    def with_copy(self) -> Batch:
        """The same batch; its micro-batches know their layout without waiting for a GPU."""
        return self if self.input_ids.device.type == "cpu" else self._replace(copy=self.on_cpu())

    def rows(self, index: Tensor) -> Batch:
        """The rows with the indices `index` (n,), padded to the longest of them; one column if there are none."""
        copy = self.on_cpu()
        width = int(copy.attention_mask[index.cpu()].sum(1).max()) if len(index) else 1
        support = None
        if self.support is not None:
            numbers = torch.zeros_like(self.input_ids)
            numbers[self.mask] = torch.arange(len(self.support.offsets) - 1, device=numbers.device)
            support = self.support.take(numbers[index][self.mask[index]])
        return Batch(
            input_ids=self.input_ids[index, :width],
            attention_mask=self.attention_mask[index, :width],
            mask=self.mask[index, :width],
            support=support,
            positions=None if self.positions is None else self.positions[index, :width],
            copy=None if copy is self else copy.rows(index.cpu()),
        )

    def plan(self, size: int, index: Tensor | None = None, unit: int = 1, tokens: int = 0) -> list[Tensor]:
        """Row indices (all, or those of `index`) in micro-batches of at most `size` rows, longest prompts' rows first.

        With `tokens`, a micro-batch of more than one row (or unit) also has at most so many tokens, pads included.

        Longest first, so that a micro-batch that is too large runs out of memory at once and not after an hour. Rows of
        one prompt stay next to each other, so that the prompt is read once. With `unit`, that many consecutive rows
        stay together, even if they are more than `size`.
        """
        index = torch.arange(len(self.input_ids)) if index is None else index
        units, copy = index.view(-1, unit), self.on_cpu()
        lengths = copy.attention_mask.sum(1)[units].amax(1)
        begins = copy.mask.long().argmax(1)[units[:, 0]]
        prompts = [tuple(copy.input_ids[u[0], :n].tolist()) for u, n in zip(units, begins.tolist(), strict=True)]
        longest: dict[tuple[int, ...], int] = {}
        for prompt, length in zip(prompts, lengths.tolist(), strict=True):
            longest[prompt] = max(length, longest.get(prompt, 0))
        order = sorted(range(len(units)), key=lambda i: (-longest[prompts[i]], prompts[i], -int(lengths[i])))
        most = max(1, size // unit)
        parts: list[list[int]] = []
        for i in order:
            width = max(int(lengths[i]), *(int(lengths[j]) for j in parts[-1])) if parts else 0
            full = not parts or len(parts[-1]) == most
            if full or (tokens and (len(parts[-1]) + 1) * unit * width > tokens):
                parts.append([])
            parts[-1].append(i)
        return [units[part].flatten() for part in parts]


def in_micro_batches(function: Callable[[Batch], Tensor], batch: Batch, plan: list[Tensor]) -> Tensor:
    """Outputs of `function` on each micro-batch, without autograd, in batch order: (B,), (B, T) or (B, T, n)."""
    batch = batch.with_copy()
    with torch.no_grad():  # not inference_mode: FSDP cannot use its tensors in a backward
        outputs = [function(batch.rows(index)) for index in plan]
    shape = [len(batch.input_ids), *outputs[0].shape[1:]]
    if outputs[0].dim() > 1:
        shape[1] = batch.input_ids.shape[1]
    result = torch.zeros(shape, dtype=outputs[0].dtype, device=outputs[0].device)
    for index, output in zip(plan, outputs, strict=True):
        if output.dim() > 1:
            result[index, : output.shape[1]] = output
        else:
            result[index] = output
    return result
