# SPDX-License-Identifier: Apache-2.0
"""Reading a prompt once for all its completions: rows that begin alike share the hidden states of what they share.

Samples of one prompt stand next to each other. Their prompt is put into one row, their completions behind it:

    prompt a a a          prompt a a a b b c c c
    prompt b b       ->
    prompt c c c

Positions go on from the prompt in each completion, and a mask lets each see the prompt and itself only. So the states
are those of separate rows, to rounding, and the trunk works on fewer tokens: 30 % fewer for eight short answers to a
short question, most of them for short answers to a long one. Attention over the long row is dense, which costs more the
longer the completions are: `layout` shares only where the arithmetic of the whole layer is less.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

LONGEST_ROW = 4096  # of the mask, which grows with its square
WORTH_IT = 0.93  # shared over plain cost, from which sharing pays for what it moves


class Layout(NamedTuple):
    """Rows (G, L) in which completions follow their common prefix."""

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
    groups = _groups(lengths, same)
    longest = max(prefix + sum(lengths[i] - prefix for i in rows) for rows, prefix in groups)
    if not _pays(model, groups, lengths, longest) or not can_share(model):
        return None
    return _layout(input_ids, lengths, groups, longest)


def _layout(input_ids: Tensor, lengths: list[int], groups: list[tuple[list[int], int]], longest: int) -> Layout:
    ids, positions = (input_ids.new_zeros((len(groups), longest)) for _ in range(2))
    owner = torch.full_like(ids, -2)  # whose token: -1 all of the row's, -2 nobody's
    row, column = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    steps = torch.arange(max(longest, input_ids.shape[1]), device=ids.device)
    for g, (rows, prefix) in enumerate(groups):
        ids[g, :prefix], positions[g, :prefix], owner[g, :prefix] = input_ids[rows[0], :prefix], steps[:prefix], -1
        place = prefix
        for i in rows:
            own = lengths[i] - prefix
            where = slice(place, place + own)
            ids[g, where], positions[g, where], owner[g, where] = (
                input_ids[i, prefix : lengths[i]], steps[prefix : lengths[i]], i
            )  # fmt: skip
            row[i] = g
            column[i, :prefix], column[i, prefix : lengths[i]] = steps[:prefix], steps[where]
            place += own
    seen = (owner[:, None, :] == owner[:, :, None]) | ((owner == -1)[:, None, :] & (owner >= 0)[:, :, None])
    causal = steps[:longest, None] >= steps[None, :longest]
    return Layout(ids, positions, seen & causal, row, column)


def _groups(lengths: list[int], same: list[int]) -> list[tuple[list[int], int]]:
    """(rows, length of their common prefix); `same` is that of each row and the next. Each keeps a token of its own."""
    groups: list[tuple[list[int], int]] = []
    for i, length in enumerate(lengths):
        if groups and i:
            rows, prefix = groups[-1]
            common = min(prefix if len(rows) > 1 else lengths[rows[0]] - 1, same[i - 1], length - 1)
            # A row that shares less would shorten what the others share: it must lose nothing to join.
            if common > 1 and common * len(rows) >= (prefix if len(rows) > 1 else 0) * (len(rows) - 1):
                groups[-1] = ([*rows, i], common)
                continue
        groups.append(([i], length))
    return groups


def _pays(model: Any, groups: list[tuple[list[int], int]], lengths: list[int], longest: int) -> bool:
    """Compare multiplications in one layer: weights of the layer for each token, and attention."""
    config = model.config
    window = getattr(config, "sliding_window", None)
    if longest > LONGEST_ROW or (window and max(lengths) > window) or len(groups) == len(lengths):
        return False
    if "flash" in str(config._attn_implementation) or "flex" in str(config._attn_implementation):
        return False
    wide = config.hidden_size
    weights = 4 * wide * wide + 3 * wide * (getattr(config, "intermediate_size", None) or 4 * wide)
    attention = 2 * wide

    def cost(rows: int, length: int) -> float:
        return rows * length * (weights + attention * length)

    return cost(len(groups), longest) < WORTH_IT * cost(len(lengths), max(lengths))


def shared_states(model: Any, found: Layout) -> Tensor:
    """(B, T, H) last hidden states, as separate rows would have them; those of pads mean nothing."""
    bias = torch.zeros(found.visible.shape, dtype=model.dtype, device=found.visible.device)
    bias.masked_fill_(~found.visible, torch.finfo(model.dtype).min)
    output = model.base_model(
        input_ids=found.input_ids, attention_mask=bias[:, None], position_ids=found.positions, use_cache=False
    )
    return output.last_hidden_state[found.row, found.column]


_known: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


@torch.no_grad()
def can_share(model: Any) -> bool:
    """Whether this model takes such a mask and such positions at their word; tried once, on a few tokens."""
    if model not in _known:
        ids = torch.tensor([[3, 4, 5, 6, 7, 8], [3, 4, 5, 9, 10, 11]], device=model.device) % model.config.vocab_size
        try:
            shared = shared_states(model, _layout(ids, [6, 6], [([0, 1], 3)], 9)).float()
            alone = model.base_model(input_ids=ids, use_cache=False).last_hidden_state.float()
            tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
            _known[model] = bool((shared - alone).abs().max() < tolerance * alone.abs().max())
        except (TypeError, ValueError, RuntimeError, AttributeError):
            _known[model] = False
    return _known[model]
