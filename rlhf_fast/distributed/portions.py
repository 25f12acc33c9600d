# SPDX-License-Identifier: Apache-2.0
"""Tensors a few at a time, where all at once would take too much memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor


def portions(tensors: Iterable[Tensor], most: int) -> Iterator[list[Tensor]]:
    """The tensors in order, in lists of at most `most` numbers and of one dtype and device; a larger one is alone."""
    portion: list[Tensor] = []
    for tensor in tensors:
        if portion:
            alike = (tensor.dtype, tensor.device) == (portion[0].dtype, portion[0].device)
            if not alike or sum(x.numel() for x in portion) + tensor.numel() > most:
                yield portion
                portion = []
        portion.append(tensor)
    if portion:
        yield portion
