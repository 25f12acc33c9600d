# SPDX-License-Identifier: Apache-2.0
"""Batches of demonstrations: padded, or packed end to end in rows, which avoids pads and changes no result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.data.examples import pad_right
from rlhf_fast.errors import UserError
from rlhf_fast.models.batches import Batch
from rlhf_fast.models.heads import token_logprobs
from rlhf_fast.models.loading import device

Example = dict[str, list[int]]  # input_ids (T,) and labels (T,), -100 where a token is not learned
IGNORED = -100
LEAK = 1e-3  # nats: more than rounding of sums over several rows in one matmul, as of experts


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, each (B, T), padded on the right."""
    input_ids, attention_mask = pad_right([example["input_ids"] for example in examples], pad_id)
    labels, _ = pad_right([example["labels"] for example in examples], IGNORED)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def pack(examples: Sequence[Example], pad_id: int, width: float) -> dict[str, Tensor]:
    """The same and `position_ids`, which begin at 0 for each example: rows of at most `width`, by `in_rows`.

    An example's first token has no label, so nothing is predicted from another example. Pads count as one more example.
    """
    rows = [[examples[i] for i in row] for row in in_rows([len(example["input_ids"]) for example in examples], width)]
    packed_rows = [{name: [i for e in row for i in e[name]] for name in ("input_ids", "labels")} for row in rows]
    batch = collate(packed_rows, pad_id)
    columns = batch["input_ids"].shape[1]
    lengths = [[len(e["input_ids"]) for e in row] for row in rows]
    batch["position_ids"] = torch.stack(
        [torch.cat([torch.arange(n) for n in [*counts, columns - sum(counts)]]) for counts in lengths]
    )
    return batch


def in_rows(lengths: Sequence[int], width: float) -> list[list[int]]:
    """Which of the examples share a row: as few rows of at most `width` as first fit needs, all as short as it can.

    A batch is as wide as its widest row. So the rows are filled evenly: by bisection, the smallest width with which
    first fit needs no more rows.
    """
    rows = _first_fit(lengths, width)
    low = max(*lengths, -(-sum(lengths) // len(rows)))
    high = _widest(lengths, rows)
    while low < high:
        middle = (low + high) // 2
        narrower = _first_fit(lengths, middle)
        if len(narrower) <= len(rows):
            rows, high = narrower, min(middle, _widest(lengths, narrower))
        else:
            low = middle + 1
    return rows


def _first_fit(lengths: Sequence[int], width: float) -> list[list[int]]:
    """The longest first, each into the first row that has room."""
    rows: list[list[int]] = []
    room: list[float] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((n for n, free in enumerate(room) if lengths[i] <= free), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(width)
        rows[place].append(i)
        room[place] -= lengths[i]
    return rows


def _widest(lengths: Sequence[int], rows: list[list[int]]) -> int:
    return max(sum(lengths[i] for i in row) for row in rows)


def packed_width(model: Any, room: int) -> float:
    """Width of packed rows: unlimited for flash attention, which handles one row only; else the longest sequence."""
    return float("inf") if "flash" in str(model.config._attn_implementation) else room


def completion_logprobs(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """(B, T) log-probs of the labelled tokens, 0 elsewhere."""
    mask = batch["labels"] != IGNORED
    ids, attended = batch["input_ids"], batch["attention_mask"].bool()
    return token_logprobs(model, Batch(ids, attended, mask, positions=batch.get("position_ids")))


@torch.no_grad()
def check_packing(model: Any, examples: Sequence[Example], pad_id: int) -> None:
    """UserError if sequences packed into one row see each other in this model, so that their loss differs.

    A change of the first one's tokens must leave the others' log-probabilities as they are, to the last bits: unlike a
    comparison with separate rows this tells a small leak, as of a short convolution, from rounding.
    """
    samples = list(examples[:3]) if len(examples) > 1 else [*examples, *examples]
    batch = to_device(pack(samples, pad_id, 2**31))
    end = int((batch["position_ids"][0] == 0).nonzero()[1])  # of the first
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][:, :end] = (5 * other["input_ids"][:, :end] + 3) % model.get_input_embeddings().num_embeddings
    try:
        logprobs = completion_logprobs(model, batch)
        moved = float((completion_logprobs(model, other) - logprobs)[:, end:].abs().max())
    except TypeError as error:
        raise UserError(
            f"{type(model).__name__} cannot learn from packed rows ({error}); set packing to false"
        ) from None
    separate = float(
        sum(completion_logprobs(model, to_device(collate([example], pad_id))).sum() for example in samples)
    )
    packed = float(logprobs.sum())
    if moved > LEAK or not abs(packed - separate) < 1e-3 * abs(separate) + 1e-3:
        raise UserError(
            f"{type(model).__name__} lets packed demonstrations see one another: their log-probability is "
            f"{packed:.4f} packed and {separate:.4f} alone, and one moves others by {moved:.2g}; set packing to false"
        )


def to_device(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch on the models' device."""
    return {name: tensor.to(device()) for name, tensor in batch.items()}
