# SPDX-License-Identifier: Apache-2.0
"""Rows without waste: a prompt is read once for all its completions, and short rows share one long row.

Samples of one prompt stand next to each other. Their prompt is put into a row, their completions behind it; such groups
are then packed into rows of like length:

    prompt a a a          prompt a a a b b c c c
    prompt b b       ->   question d d d query e
    prompt c c c
    question d d d
    query e

Positions begin at 0 with each prompt and go on from it in each of its completions, and a mask lets a completion see its
prompt and itself only. So the states are those of separate rows, to rounding, and the trunk works on hardly more tokens
than there are. Attention over a row is dense, which costs more the longer it is: `layout` takes what needs the least
arithmetic in all.
"""

from __future__ import annotations

import heapq
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

LONGEST_ROW = 4096  # of the mask, which grows with its square
WORTH_IT = 0.93  # packed over plain cost, from which packing pays for what it moves


class Group(NamedTuple):
    """Rows of the batch that begin alike, and the length of what they share: all of it, if it is one row."""

    rows: list[int]
    prefix: int


class Layout(NamedTuple):
    """Rows (G, L) of groups, one behind the other; in each, completions follow their common prefix."""

    input_ids: Tensor  # (G, L)
    positions: Tensor  # (G, L)
    visible: Tensor  # (G, L, L) bool
    row: Tensor  # (B, T) where the state of each token of the batch is
    column: Tensor  # (B, T)


def layout(model: Any, input_ids: Tensor, mask: Tensor) -> Layout | None:
    """How rows padded on the right are put together; None if separate rows are cheaper, or the model cannot do it.

    The batch alone decides, so that all passes over it agree.
    """
    lengths = mask.sum(1).tolist()
    same = ((input_ids[1:] == input_ids[:-1]) & mask[1:] & mask[:-1]).long().cumprod(1).sum(1).tolist()
    packed = _cheapest(model, lengths, same)
    if packed is None or not can_pack(model):
        return None
    return _layout(input_ids, lengths, packed)


def _layout(input_ids: Tensor, lengths: list[int], packed: list[list[Group]]) -> Layout:
    longest = max(sum(_size(group, lengths) for group in groups) for groups in packed)
    ids, positions, first = (input_ids.new_zeros((len(packed), longest)) for _ in range(3))
    owner = torch.full_like(ids, -1)  # whose token: of the row of the batch, -1 what several share
    row, column = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    steps = torch.arange(max(longest, input_ids.shape[1]), device=ids.device)
    for g, groups in enumerate(packed):
        place = 0
        for rows, prefix in groups:
            start, shared = place, slice(place, place + prefix)
            ids[g, shared], positions[g, shared] = input_ids[rows[0], :prefix], steps[:prefix]
            place += prefix
            for i in rows:
                where = slice(place, place + lengths[i] - prefix)
                ids[g, where], positions[g, where] = input_ids[i, prefix : lengths[i]], steps[prefix : lengths[i]]
                owner[g, where] = i
                row[i] = g
                column[i, :prefix], column[i, prefix : lengths[i]] = steps[shared], steps[where]
                place = where.stop
            first[g, start:place] = start
        first[g, place:] = place  # pads see each other
    shared_or_own = (owner[:, None, :] == -1) | (owner[:, None, :] == owner[:, :, None])
    begun = steps[None, None, :longest] >= first[:, :, None]
    causal = steps[:longest, None] >= steps[None, :longest]
    return Layout(ids, positions, shared_or_own & begun & causal, row, column)


def _size(group: Group, lengths: list[int]) -> int:
    return group.prefix + sum(lengths[i] - group.prefix for i in group.rows)


def _groups(lengths: list[int], same: list[int]) -> list[Group]:
    """`same` is the length of the common prefix of each row and the next. Each keeps a token of its own."""
    groups: list[Group] = []
    for i, length in enumerate(lengths):
        if groups and i:
            rows, prefix = groups[-1]
            common = min(prefix if len(rows) > 1 else lengths[rows[0]] - 1, same[i - 1], length - 1)
            # A row that shares less would shorten what the others share: it must lose nothing to join.
            if common > 1 and common * len(rows) >= (prefix if len(rows) > 1 else 0) * (len(rows) - 1):
                groups[-1] = Group([*rows, i], common)
                continue
        groups.append(Group([i], length))
    return groups


def _cheapest(model: Any, lengths: list[int], same: list[int]) -> list[list[Group]] | None:
    """The groups of each row, from many short rows to one long row, prompts shared or not; None for the batch as it is.

    Multiplications in one layer are compared: weights of the layer for each token, and attention, which counts for more
    than its share because of the softmax (fitted on two Zen 4 cores, rows of 30 to 480 tokens).
    """
    config = model.config
    window = getattr(config, "sliding_window", None)
    if window and max(lengths) > window:
        return None
    if "flash" in str(config._attn_implementation) or "flex" in str(config._attn_implementation):
        return None
    wide = config.hidden_size
    weights = 4 * wide * wide + 3 * wide * (getattr(config, "intermediate_size", None) or 4 * wide)
    attention = 3 * wide

    def cost(rows: int, length: int) -> float:
        return rows * length * (weights + attention * length)

    best, found = WORTH_IT * cost(len(lengths), max(lengths)), None
    for groups in (_groups(lengths, same), [Group([i], length) for i, length in enumerate(lengths)]):
        count = len(groups)
        while count:
            packed, longest = _packed(groups, lengths, count)
            if longest <= LONGEST_ROW and cost(count, longest) < best:
                best, found = cost(count, longest), packed
            count //= 2
    return found


def _packed(groups: list[Group], lengths: list[int], count: int) -> tuple[list[list[Group]], int]:
    """`groups` in `count` rows of like length, and the longest of these: the largest first, each into the shortest."""
    rows: list[list[Group]] = [[] for _ in range(count)]
    filled = [(0, row) for row in range(count)]
    for group in sorted(groups, key=lambda group: -_size(group, lengths)):
        length, row = heapq.heappop(filled)
        rows[row].append(group)
        heapq.heappush(filled, (length + _size(group, lengths), row))
    return rows, max(length for length, _ in filled)


def packed_states(model: Any, found: Layout) -> Tensor:
    """(B, T, H) last hidden states, as separate rows would have them; those of pads mean nothing."""
    bias = torch.zeros(found.visible.shape, dtype=model.dtype, device=found.visible.device)
    bias.masked_fill_(~found.visible, torch.finfo(model.dtype).min)
    output = model.base_model(
        input_ids=found.input_ids, attention_mask=bias[:, None], position_ids=found.positions, use_cache=False
    )
    return output.last_hidden_state[found.row, found.column]


_known: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


@torch.no_grad()
def can_pack(model: Any) -> bool:
    """Whether this model takes such a mask and such positions at their word; tried once, on a few tokens."""
    if model not in _known:
        rows = [[3, 4, 5, 6, 7, 8], [3, 4, 5, 9, 10, 11], [12, 13, 14, 15, 16, 17]]
        ids = torch.tensor(rows, device=model.device) % model.config.vocab_size
        try:
            shared = packed_states(model, _layout(ids, [6, 6, 6], [[Group([0, 1], 3), Group([2], 6)]])).float()
            alone = model.base_model(input_ids=ids, use_cache=False).last_hidden_state.float()
            tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
            _known[model] = bool((shared - alone).abs().max() < tolerance * alone.abs().max())
        except (TypeError, ValueError, RuntimeError, AttributeError):
            _known[model] = False
    return _known[model]
