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


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, each (B, T), padded on the right."""
    input_ids, attention_mask = pad_right([example["input_ids"] for example in examples], pad_id)
    labels, _ = pad_right([example["labels"] for example in examples], IGNORED)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def pack(examples: Sequence[Example], pad_id: int, width: float) -> dict[str, Tensor]:
    """The same and `position_ids`, which begin at 0 for each example: rows of at most `width`, by first fit.

    An example's first token has no label, so nothing is predicted from another example. Pads count as one more example.
    """
    rows: list[list[Example]] = []
    for example in sorted(examples, key=lambda example: -len(example["input_ids"])):
        free = (row for row in rows if sum(len(e["input_ids"]) for e in row) + len(example["input_ids"]) <= width)
        row = next(free, None)
        if row is None:
            rows.append([example])
        else:
            row.append(example)
    packed_rows = [{name: [i for e in row for i in e[name]] for name in ("input_ids", "labels")} for row in rows]
    batch = collate(packed_rows, pad_id)
    columns = batch["input_ids"].shape[1]
    lengths = [[len(e["input_ids"]) for e in row] for row in rows]
    batch["position_ids"] = torch.stack(
        [torch.cat([torch.arange(n) for n in [*counts, columns - sum(counts)]]) for counts in lengths]
    )
    return batch


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
    """UserError if sequences packed into one row attend to each other in this model, so that their loss differs."""
    samples = list(examples[:3])
    try:
        packed = completion_logprobs(model, to_device(pack(samples, pad_id, 2**31))).sum()
    except TypeError as error:
        raise UserError(
            f"{type(model).__name__} cannot learn from packed rows ({error}); set packing to false"
        ) from None
    separate = sum(completion_logprobs(model, to_device(collate([example], pad_id))).sum() for example in samples)
    if not abs(float(packed - separate)) < 1e-3 * abs(float(separate)) + 1e-3:
        raise UserError(
            f"{type(model).__name__} lets packed demonstrations see one another: their log-probability is "
            f"{float(packed):.4f} packed and {float(separate):.4f} alone; set packing to false"
        )


def to_device(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch on the models' device."""
    return {name: tensor.to(device()) for name, tensor in batch.items()}
