# SPDX-License-Identifier: Apache-2.0
"""Decoding with a cache: read prompts once, then one token per row and step; and a test that a model supports it."""

from __future__ import annotations

import inspect
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf_fast.errors import UserError
from rlhf_fast.models.attention import choose_attention
from rlhf_fast.models.heads import check_head, position_ids

CACHES = ("past_key_values", "cache_params")  # its names in transformers' trunks


class Decoder:
    """The trunk of a model and its cache over some rows of tokens."""

    hidden: Tensor  # (B, H) last hidden states of the rows

    def __init__(self, model: Any, prompts: list[list[int]], pad_id: int, samples: int, room: int) -> None:
        """Read each prompt (token ids) once, for `samples` rows each that will get at most `room` more tokens."""
        from .cache import take_rows

        self.trunk, self.take_rows = model.base_model, take_rows
        device, width = model.device, max(map(len, prompts))
        ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts], device=device)
        real = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        padded = any(len(p) < width for p in prompts)
        self.width = width
        self.mask = pad(real, (0, room), value=1) if padded else None  # (B, width + room)
        self.positions = position_ids(self.mask) if self.mask is not None and self._takes("position_ids") else None
        output = self.trunk(input_ids=ids, use_cache=True, **self._columns(0, width))
        names = [name for name in CACHES if getattr(output, name, None) is not None]
        if not names:
            raise TypeError("its forward gives no cache of what it has read")
        self.cache_name, self.cache = names[0], getattr(output, names[0])
        self.hidden = output.last_hidden_state[:, -1]
        self.keep(torch.arange(len(prompts), device=device).repeat_interleave(samples))

    def step(self, tokens: Tensor) -> Tensor:
        """(B, H) hidden states of the next token (B,) of each row."""
        self.width += 1
        columns = self._columns(self.width - 1, self.width)
        output = self.trunk(input_ids=tokens[:, None], use_cache=True, **{self.cache_name: self.cache}, **columns)
        self.hidden = output.last_hidden_state[:, -1]
        return self.hidden

    def keep(self, index: Tensor) -> None:
        """Select the rows `index`, in that order; a row may be repeated."""
        self.take_rows(self.cache, index)
        self.hidden = self.hidden[index]
        self.mask = None if self.mask is None else self.mask[index]
        self.positions = None if self.positions is None else self.positions[index]

    def _takes(self, name: str) -> bool:
        return name in inspect.signature(self.trunk.forward).parameters

    def _columns(self, start: int, stop: int) -> dict[str, Tensor]:
        """The trunk's mask and position arguments for these columns; empty if no row has pads."""
        arguments = {} if self.mask is None else {"attention_mask": self.mask[:, :stop]}
        return arguments if self.positions is None else {**arguments, "position_ids": self.positions[:, start:stop]}


_known: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def reads_padded_prompts(model: Any) -> bool:
    """Whether prompts of different lengths can be read together, padded on the left; tested once, on a few tokens.

    Raises:
        UserError: the model cannot be sampled from: its hidden states token by token, with its cache, differ from those
            of one pass over the sequence.
    """
    if model not in _known:
        _known[model] = _test_cache(model)
    return _known[model]


def _tokens(model: Any, count: int, start: int = 1009) -> list[int]:
    """Some ids of the vocabulary."""
    embedded, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    size = min(len(embedded), len(embedded if head is None else head.weight))
    return [(start + 7919 * i) % size for i in range(count)]


@torch.no_grad()
def _test_cache(model: Any) -> bool:
    long, short = _tokens(model, 7), _tokens(model, 4, start=313)
    try:
        check_head(model, torch.tensor([long], device=model.device))
        unpadded = max(_gap(model, [long]), _gap(model, [short]))
    except UserError:
        raise
    except Exception as error:  # any model's own error
        raise UserError(f"{type(model).__name__} cannot be sampled from: {type(error).__name__}: {error}") from error
    # A cache that is wrong for a third of the tokens exceeds this; bfloat16 alone moves a few tokens to other experts.
    bound = 3e-3 if model.dtype == torch.float32 else 0.15
    if not unpadded < bound:
        raise UserError(
            f"{type(model).__name__} cannot be sampled from: hidden states with its cache are {unpadded:.1g} "
            "(relative) off from those without it. Use a model whose cache transformers supports"
        )
    try:
        return _gap(model, [long, short]) < bound
    except Exception:  # fall back to one length at a time
        return False


def _gap(model: Any, prompts: list[list[int]]) -> float:
    """Relative error of hidden states with the cache against those without: the largest mean over a prompt's rows.

    Two samples per prompt, of which the very first is removed after one token.
    """
    choose_attention(model)
    rows = [list(p) for p in prompts for _ in range(2)]
    decoder = Decoder(model, prompts, pad_id=_tokens(model, 1, start=77)[0], samples=2, room=4)
    errors: list[list[Tensor]] = [[] for _ in prompts]
    remaining = list(range(len(rows)))
    for step in range(4):
        for place, row in enumerate(remaining):
            ids = torch.tensor([rows[row]], device=model.device)
            uncached = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, -1].float()
            errors[row // 2].append((decoder.hidden[place].float() - uncached).norm() / uncached.norm())
        if step == 1:
            remaining = remaining[1:]
            decoder.keep(torch.arange(1, len(rows), device=model.device))
        if step < 3:
            tokens = _tokens(model, len(remaining), start=2003 + 31 * step)
            for row, token in zip(remaining, tokens, strict=True):
                rows[row].append(token)
            decoder.step(torch.tensor(tokens, device=model.device))
    return max(float(torch.stack(each).mean()) for each in errors)
