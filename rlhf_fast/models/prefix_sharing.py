# SPDX-License-Identifier: Apache-2.0
"""Prefix sharing: no pads, and a prompt is read once for all its completions.

Samples of one prompt are next to each other in a batch. All tokens are packed into one row: first each group's common
prompt, then the rest of each sample:

    prompt a a a
    prompt b b       ->   prompt question  a a a b b c c c d d d e
    prompt c c c
    question d d d
    question e

Positions begin at 0 in each prompt and continue in each of its completions. `attention.py` lets a completion see only
its prompt and itself. So the states equal those of separate rows, up to rounding, and the rest of the trunk computes
real tokens only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .attention import NAME, AttentionBlock, block_of, is_replaceable, registered

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

KERNELS_OF = {"cpu": ("blocks",)}  # elsewhere FlexAttention first
WORTH_IT = 0.93  # pack if tokens / entries of the padded batch is below this; else copying takes longer than it saves


class PrefixGroup(NamedTuple):
    """Rows of the batch with a common prefix, and its length; of a single row, the prefix is all of it."""

    rows: list[int]
    prefix: int


class PackedRow(NamedTuple):
    """The tokens of a batch in one row of N: the prefixes of all groups, then the completions."""

    input_ids: Tensor  # (1, N)
    positions: Tensor  # (1, N)
    blocks: tuple[AttentionBlock, ...]  # which queries see which keys; none with `flex`
    flex: BlockMask | None  # the same, for FlexAttention
    places: Tensor  # (B, T) index into the packed row of each token of the batch


def pack(model: Any, input_ids: Tensor, mask: Tensor) -> PackedRow | None:
    """Pack rows (B, T) padded on the right into one row; None if that saves little or the model does not support it.

    `input_ids` and `mask` are on the CPU; the result is where the model is, and nothing waits for that device.
    The choice depends on the batch alone, so that all passes over it agree.
    """
    lengths = mask.sum(1).tolist()
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    if window and max(lengths) > window:
        return None
    same = ((input_ids[1:] == input_ids[:-1]) & mask[1:] & mask[:-1]).long().cumprod(1).sum(1).tolist()
    groups = _groups(lengths, same)
    tokens = sum(group.prefix + sum(lengths[i] - group.prefix for i in group.rows) for group in groups)
    if tokens > WORTH_IT * len(lengths) * max(lengths):
        return None
    kernel = packing_kernel(model)
    return _pack(model, input_ids, lengths, groups, kernel) if kernel else None


def _pack(model: Any, input_ids: Tensor, lengths: list[int], groups: list[PrefixGroup], kernel: str) -> PackedRow:
    steps = torch.arange(input_ids.shape[1])
    first = torch.tensor([group.rows[0] for group in groups])
    prefix = torch.tensor([group.prefix for group in groups])
    begin = prefix.cumsum(0) - prefix  # index of each prefix in the packed row
    is_prefix = steps[: int(prefix.max())] < prefix[:, None]  # (G, P)
    prompts = (begin[:, None] + steps[: is_prefix.shape[1]]) * is_prefix
    seen = [(prompts, prompts, steps[None, : is_prefix.shape[1]], is_prefix)]
    ids = [input_ids[first, : is_prefix.shape[1]][is_prefix]]
    positions = [steps[: is_prefix.shape[1]].expand_as(is_prefix)[is_prefix]]

    group_of = torch.tensor([g for g, group in enumerate(groups) for _ in group.rows])  # (B,)
    ends, shared = torch.tensor(lengths), prefix[group_of]  # rows of a group are next to each other
    own = ends - shared
    start = int(prefix.sum()) + own.cumsum(0) - own
    real = steps < ends[:, None]  # (B, T)
    in_prefix = steps < shared[:, None]
    places = torch.where(in_prefix, begin[group_of][:, None] + steps, start[:, None] + steps - shared[:, None]) * real
    longer = own.nonzero().squeeze(1)
    if len(longer):
        longest = int(own.max())
        real_queries = steps[:longest] < own[longer][:, None]  # (R, C)
        last = shared[longer][:, None] + steps[:longest]  # last key that a completion's token sees: itself
        queries = (start[longer][:, None] + steps[:longest]) * real_queries
        keys = places[longer, : int(ends[longer].max())]
        seen.append((queries, keys, last, real_queries))
        ids.append(input_ids[real & ~in_prefix])
        positions.append(last[real_queries])
    blocks: tuple[AttentionBlock, ...] = ()
    flex = None
    if kernel == "flex":
        from .flex import block_mask

        numbers = torch.arange(len(groups) + len(lengths))
        segments = numbers.repeat_interleave(torch.cat([prefix, own]))
        prefixes = torch.cat([numbers[: len(groups)], group_of]).repeat_interleave(torch.cat([prefix, own]))
        flex = block_mask(segments, prefixes, model.device)
    else:
        blocks = tuple(block_of(model, *block) for block in seen)
    packed_ids, packed_positions, places = (
        x.to(model.device, non_blocking=True) for x in (torch.cat(ids)[None], torch.cat(positions)[None], places)
    )
    return PackedRow(packed_ids, packed_positions, blocks, flex, places)


def _groups(lengths: list[int], same: list[int]) -> list[PrefixGroup]:
    """Group rows by `same`, the length of each row's common prefix with the next; each keeps a token of its own."""
    groups: list[PrefixGroup] = []
    for i, length in enumerate(lengths):
        if groups and i:
            rows, prefix = groups[-1]
            common = min(prefix if len(rows) > 1 else lengths[rows[0]] - 1, same[i - 1], length - 1)
            # A row that shares less shortens the group's prefix: it joins only if that computes no more tokens.
            if common > 1 and common * len(rows) >= (prefix if len(rows) > 1 else 0) * (len(rows) - 1):
                groups[-1] = PrefixGroup([*rows, i], common)
                continue
        groups.append(PrefixGroup([i], length))
    return groups


def packed_states(model: Any, packed: PackedRow) -> Tensor:
    """(B, T, H) last hidden states, as from separate rows; those of pads are meaningless."""
    # Not reset afterwards: checkpointed layers run again in the backward. Without a packed row it is "sdpa".
    if model.config._attn_implementation != NAME:
        model.set_attn_implementation(registered())
    unmasked = torch.zeros(
        (1, 1, 1, 1), dtype=model.dtype, device=packed.input_ids.device
    )  # so that transformers builds no mask
    output = model.base_model(
        input_ids=packed.input_ids,
        attention_mask=unmasked,
        position_ids=packed.positions,
        use_cache=False,
        packed_row=packed,
    )
    return output.last_hidden_state[0][packed.places]


_known: WeakKeyDictionary[Any, str | None] = WeakKeyDictionary()


@torch.no_grad()
def packing_kernel(model: Any) -> str | None:
    """What attends over this model's packed rows: "flex" (`flex.py`), "blocks" (`attention.py`), or None: neither.

    Tested once per model, on a few tokens: the first that gives the states of separate rows. FlexAttention is for
    GPUs: on a CPU it has no backward.
    """
    if getattr(model, "dropout_is_on", False):
        return None  # neither has dropout
    if model not in _known:
        before = model.config._attn_implementation
        supported = before in ("sdpa", "eager", NAME) and is_replaceable(model)
        kernels = KERNELS_OF.get(model.device.type, ("flex", "blocks"))
        _known[model] = next((kernel for kernel in kernels if supported and _agrees(model, kernel)), None)
        if supported and _known[model] is None:
            model.set_attn_implementation(before)
    return _known[model]


@contextmanager
def _backward_after(model: Any) -> Iterator[Callable[[Tensor], bool]]:
    """Inside, a pass remembers what a gradient needs; yields what takes it back from the states to the embeddings and
    says whether it arrives there. FlexAttention's backward is a kernel of its own, which may be missing where the
    forward is there."""
    embedded: list[Tensor] = []

    def keep(module: Any, given: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    def backward(states: Tensor) -> bool:
        (gradient,) = torch.autograd.grad(states.square().sum(), embedded[-1:])
        return bool(gradient.isfinite().all() and gradient.any())

    hook = model.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield backward
    finally:
        hook.remove()


def _agrees(model: Any, kernel: str) -> bool:
    """Whether packed states are close on the median row: rounding alone may move the states of unusual tokens far; and
    whether a gradient comes through FlexAttention.

    And whether a change of one completion leaves all others as they are, to the last bits: some recurrent layers carry
    so little from row to row that it is less than rounding in 16 bits.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = (torch.arange(60) * 7919 + 1009).view(10, 6) % vocabulary
    ids[1::2, :3] = ids[0::2, :3]
    try:
        separate = model.base_model(input_ids=ids.to(model.device), use_cache=False).last_hidden_state.float()
        pairs = [PrefixGroup([i, i + 1], 3) for i in range(0, 6, 2)] + [PrefixGroup([i], 6) for i in range(6, 10)]
        with nullcontext() if kernel == "blocks" else _backward_after(model) as backward:
            packed = packed_states(model, _pack(model, ids, [6] * 10, pairs, kernel)).float()
            if backward is not None and not backward(packed):
                return False
        other = ids.clone()
        other[0, 3:] = (5 * other[0, 3:] + 3) % vocabulary
        moved = packed_states(model, _pack(model, other, [6] * 10, pairs, kernel)).float() - packed
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False
    error, leak = ((x.flatten(1).norm(dim=1) / separate.flatten(1).norm(dim=1)) for x in (packed - separate, moved))
    return bool(error.median() < (1e-3 if model.dtype == torch.float32 else 0.08)) and bool(leak[1:].max() < 1e-3)
