# SPDX-License-Identifier: Apache-2.0
"""A key-value cache that grows in place; transformers' own is copied in full for every token."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

LEAST_ROOM = 64  # tokens


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values (B, heads, T, D): views of buffers with room for more tokens."""

    keys: Tensor
    values: Tensor
    buffers: list[Tensor]
    length: int

    def __init__(self, layer: DynamicLayer, index: Tensor) -> None:
        """The rows `index` (B,) of another layer's."""
        vars(self).update(vars(layer))
        self.reorder_cache(index)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values, the new ones (B, heads, n, D) last."""
        length = self.length + key_states.shape[-2]
        if length > self.buffers[0].shape[-2]:
            self.buffers = [_with_room(x[..., : self.length, :], key_states.shape[-2]) for x in self.buffers]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[..., self.length : length, :] = new
        self._show(length)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select these rows, in this order; a row may be repeated."""
        length = self.keys.shape[-2]
        self.buffers = [_with_room(x.index_select(0, beam_idx), 1) for x in (self.keys, self.values)]
        self._show(length)

    def _show(self, length: int) -> None:
        self.length = length
        self.keys, self.values = (x[..., :length, :] for x in self.buffers)


def _with_room(states: Tensor, more: int) -> Tensor:
    """A copy of states (B, heads, T, D), with room for `more` tokens and half as many as there are."""
    rows, heads, length, size = states.shape
    buffer = states.new_empty((rows, heads, length + max(more, LEAST_ROOM, length // 2), size))
    buffer[..., :length, :] = states
    return buffer


def take_rows(cache: Any, index: Tensor) -> None:
    """Keep the rows `index` of transformers' cache, in that order; plain attention layers grow in place from now on.

    Other layers (sliding windows, convolution and recurrence states) keep their own class.
    """
    for place, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.get_seq_length() > 0:
            cache.layers[place] = GrowingLayer(layer, index)
        else:
            layer.reorder_cache(index)
