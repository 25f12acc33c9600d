# SPDX-License-Identifier: Apache-2.0
"""Attention over a packed row by PyTorch's FlexAttention: the kernel skips blocks of tokens that do not see each other.

Used on GPUs, where a mask of all queries and keys takes gigabytes for long samples. Tested on a CPU by PyTorch's plain
definition of it; never run on a GPU.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128  # tokens: FlexAttention's own default


def block_mask(segments: Tensor, prefixes: Tensor, device: torch.device) -> BlockMask:
    """Which tokens of a packed row see which: a token sees those before it of its own segment and of its prefix.

    Args:
        segments: (N,) int64 on the CPU, ascending: the segment of each token; a segment is a group's common prefix or
            the rest of one sample.
        prefixes: (N,) int64 on the CPU: the segment of the prefix that the token continues; its own in a prefix.
        device: Where the attention runs. Nothing here waits for it.
    """
    own, prefix, *blocks = (_there(x, device) for x in (segments, prefixes, *_blocks(segments, prefixes)))

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & ((own[key] == own[query]) | (own[key] == prefix[query]))

    count = len(segments)
    partial, full = (_listed(x) for x in blocks)  # on the device: BlockMask.to would wait for it
    return BlockMask.from_kv_blocks(*partial, *full, BLOCK, sees, (count, count))


def _there(x: Tensor, device: torch.device) -> Tensor:
    """A copy to a GPU waits for nothing only from pinned memory."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def _blocks(segments: Tensor, prefixes: Tensor) -> tuple[Tensor, Tensor]:
    """(n, n) bool: blocks of queries and keys of which some tokens may see each other, and those of which all do."""
    first, last = _ranges(segments)
    first_prefix, last_prefix = _ranges(prefixes)
    queries, keys = torch.arange(len(first))[:, None], torch.arange(len(first))
    own = (first <= last[:, None]) & (last >= first[:, None])
    shared = (first <= last_prefix[:, None]) & (last >= first_prefix[:, None])
    one_segment = first == last
    same = one_segment[:, None] & one_segment & (first[:, None] == first)
    one_prefix = first_prefix == last_prefix
    continues = one_prefix[:, None] & one_segment & (first_prefix[:, None] == first)
    full = (same | continues) & (keys < queries)
    return (own | shared) & (keys <= queries) & ~full, full


def _ranges(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest of the numbers (N,) in each block (n,)."""
    missing = -len(numbers) % BLOCK
    blocks = torch.cat([numbers, numbers[-1:].expand(missing)]).view(-1, BLOCK)
    return blocks.amin(1), blocks.amax(1)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """FlexAttention's form of a (n, n) bool: (1, 1, n) how many keys' blocks, and (1, 1, n, n) which, those first."""
    counts = blocks.sum(1, dtype=torch.int32)
    order = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return counts[None, None], order.contiguous()[None, None]


def attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scaling: float) -> Tensor:
    """(1, N, heads, D') from query (1, heads, N, D), key (1, key heads, N, D) and value (1, key heads, N, D')."""
    heads = query.shape[1]
    share = heads & (heads - 1) == 0  # the kernel's own sharing of keys wants a power of two
    if not share and key.shape[1] != heads:
        key, value = (x.repeat_interleave(heads // key.shape[1], dim=1) for x in (key, value))
    out = _kernel(query.device.type)(query, key, value, block_mask=mask, scale=scaling, enable_gqa=share)
    return out.transpose(1, 2)


@cache
def _kernel(device: str) -> Any:
    """Compiled, which is what makes it fast; on a CPU, for tests, as it is."""
    return flex_attention if device == "cpu" else torch.compile(flex_attention, dynamic=True)
