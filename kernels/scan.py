# SPDX-License-Identifier: Apache-2.0
"""The recurrence of GAE as an associative scan, for gae.py and ppo.py, and how work is cut into programs.

Read from a row's last token back, the recurrence has one number of state for each lambda: what token t adds, for
the token before it, to reward minus value,

    U_t = gamma (V_t + lam A_t) = gamma lam r_t + (gamma - gamma lam) V_t + gamma lam U_{t+1}
    A_t = r_t - V_t + U_{t+1}

so that no next value need be carried across masked tokens. A token is the map U -> offset + decay U. A masked token
that is stepped over is the map (1, 0). A token that ends an episode takes nothing from those after it: decay 0 says
so, and what it then skips may be infinite or NaN. Every other decay is kept above 0, or the product of a thousand of
them would turn the infinite return of a legal infinite reward into 0 * inf = NaN.

A tile is [ROWS, GROUPS, 4] tokens. Groups run from the row's end (Triton's scan from back to front would cost five
shuffles more an element and operand), the four tokens of a group ascend in memory: a thread's 16 bytes of float32.

A program goes through its tokens from the end, tile by tile, and carries the state: one reading, one writing, one
launch. It has a long row, several short ones, or of packed tokens the sequences that end within its share. Where rows
are few and long, each is cut into parts: a first launch makes the map of each part, a second starts from the maps of
the parts after its own. That reads the input twice, for rows that would leave most of a GPU idle otherwise.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast._triton import INTERPRETED

VEC = tl.constexpr(4)  # tokens in a group
TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal float32
WHOLE, MAPS, REST = (tl.constexpr(i) for i in range(3))  # the passes: one launch, or the first and the second of two

# A tile is a block of one row, or short rows of 1024 tokens together. A kernel with many inputs takes half the largest,
# so that two programs fit into a multiprocessor's registers. The interpreter's are so small that the tests' rows have
# several blocks and parts.
MAX_GROUPS = 64 if INTERPRETED else 512
GROUPS_OF_SHORT_ROWS = 256
GROUPS_PER_WARP = 32
MAX_WARPS = 8
# Fewer rows than this are cut, if they are long; then this many programs are wanted. At an estimated 1.3 us a block, 64
# rows in one piece take an H100 as long as reading the input twice.
FEW_ROWS = 64
LONG_ROW = 4  # blocks
PROGRAMS = 256


# ------------------------------------------------------------------------------------------- on the host


class Plan(NamedTuple):
    """How (rows, length) tokens are cut up."""

    rows: int
    part: int  # tokens that a program has of its row: blocks in full
    parts: int  # of a row
    cut: bool  # the parts of a row depend on each other
    aligned: bool  # groups begin at multiples of a group; whether the tensors do, Triton sees for itself
    tile_rows: int
    groups: int

    @property
    def programs(self) -> int:
        return triton.cdiv(self.rows, self.tile_rows) * self.parts

    @property
    def passes(self) -> tuple[int, ...]:
        return (MAPS.value, REST.value) if self.cut else (WHOLE.value,)

    @property
    def constants(self) -> dict[str, int]:
        return {
            "ALIGNED": self.aligned,
            "ROWS": self.tile_rows,
            "GROUPS": self.groups,
            "PARTS": triton.next_power_of_2(self.parts) if self.cut else 1,
            "num_warps": min(MAX_WARPS, max(1, self.tile_rows * self.groups // GROUPS_PER_WARP)),
        }

    def maps(self, like: Tensor) -> Tensor | None:
        """What the first of two launches hands to the second: (rows, parts, 4)."""
        return like.new_empty((self.rows, self.parts, 4), dtype=torch.float32) if self.cut else None


def plan_for(rows: int, length: int, strides: list[int], light: bool = False, packed: int | None = None) -> Plan:
    """light: the kernel has few inputs. packed: how many sequences lie in one row of all tokens; if that is not cut, a
    program has those that end within its part, and its groups begin anywhere."""
    aligned = all(n % VEC.value == 0 for n in (length, *strides))
    max_groups = MAX_GROUPS if light and aligned else MAX_GROUPS // 2
    groups = min(max_groups, triton.next_power_of_2(triton.cdiv(length, VEC.value)))
    block = groups * VEC.value
    blocks = triton.cdiv(length, block)
    tile_rows = 1 if blocks > 1 else min(max(1, GROUPS_OF_SHORT_ROWS // groups), triton.next_power_of_2(rows))
    cut = blocks >= LONG_ROW and (rows if packed is None else packed) < FEW_ROWS
    part = block * blocks
    if cut:
        part = block * triton.cdiv(blocks, PROGRAMS // rows)
    elif packed is not None:
        part, aligned = block, False
    return Plan(rows, part, triton.cdiv(length, part), cut, aligned, tile_rows, groups)


def rows_of(x: Tensor | None) -> Tensor | None:
    """(B, T) or (total,) as rows of adjacent tokens; copied only where tokens of a row are not adjacent."""
    if x is None:
        return None
    x = x if x.dim() == 2 else x.unsqueeze(0)
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def strides_of(*tensors: Tensor | None) -> list[int]:
    return [0 if x is None or x.shape[0] == 1 else x.stride(0) for x in tensors]


# ------------------------------------------------------------------------------------------- on the device


@triton.jit
def tile_lanes(GROUPS: tl.constexpr):
    """[1, GROUPS, 4], places in a tile: groups from the end, tokens within a group ascending."""
    group = GROUPS - 1 - tl.arange(0, GROUPS)
    return group[None, :, None] * VEC + tl.arange(0, VEC)[None, None, :]


@triton.jit
def tokens_inside(
    row, rows, lane, start, begin, end,
    SNAP: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Which of the tokens start + lane a program has: of its tile, within [begin, end) and of rows that exist."""
    left = tl.minimum(end - start, BLOCK).to(tl.int32)
    if ALIGNED:
        left = left // VEC * VEC
    inside = lane < left
    if SNAP:
        inside = inside & (lane >= tl.maximum(begin - start, 0).to(tl.int32))
    if ROWS > 1:
        inside = inside & (row < rows)
    return inside


@triton.jit
def load_tokens(ptr, stride, row, start, lane, inside, ALIGNED: tl.constexpr):
    """Tokens start + lane of rows; row and start have 64 bits, as B * T may exceed 2^31."""
    if ALIGNED:
        stride = stride // VEC * VEC
    return tl.load(ptr + (row * stride + start) + lane, inside, other=0)


@triton.jit
def store_tokens(ptr, stride, row, start, lane, inside, x, ALIGNED: tl.constexpr):
    if ALIGNED:
        stride = stride // VEC * VEC
    tl.store(ptr + (row * stride + start) + lane, x, inside)


@triton.jit
def apply(decay, offset, state, CUTS: tl.constexpr):
    """The state before the tokens of a map, from that after them."""
    if CUTS:
        return tl.where(decay > 0, offset + decay * state, offset)
    return offset + decay * state


@triton.jit
def _then(later_decay, later_offset, decay, offset):
    return tl.maximum(later_decay * decay, TINY), apply(decay, offset, later_offset, False)


@triton.jit
def _then_with_cuts(later_decay, later_offset, decay, offset):
    least = tl.minimum(tl.minimum(later_decay, decay), TINY)  # 0 if one of them is
    return tl.maximum(later_decay * decay, least), apply(decay, offset, later_offset, True)


@triton.jit
def then(later_decay, later_offset, decay, offset, CUTS: tl.constexpr):
    """The map of later tokens and, applied to its result, that of earlier ones, as one map."""
    if CUTS:
        return _then_with_cuts(later_decay, later_offset, decay, offset)
    return _then(later_decay, later_offset, decay, offset)


@triton.jit
def token_maps(reward, value, counts, cut, gamma, decay, CUTS: tl.constexpr):
    """Each token's map of the state; those that do not count are stepped over."""
    # 0 * value: before an infinite value the row is NaN, as it is in the definition
    offsets = decay * reward + (gamma - decay) * value + 0.0 * value
    decays = tl.where(counts, tl.maximum(decay, TINY), 1.0)
    if CUTS:
        decays = tl.where(cut, 0.0, decays)
    return decays, offsets


@triton.jit
def _scan(decay, offset, CUTS: tl.constexpr):
    """[ROWS, GROUPS] maps -> the maps of all groups up to and with each."""
    if CUTS:
        return tl.associative_scan((decay, offset), 1, _then_with_cuts)
    return tl.associative_scan((decay, offset), 1, _then)


@triton.jit
def _split(x, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    even, odd = tl.split(tl.reshape(x, [ROWS, GROUPS, 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _join(x0, x1, x2, x3, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    return tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), [ROWS, GROUPS, 4])


@triton.jit
def _scan_groups(decay, offset, CUTS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """[ROWS, GROUPS, 4] maps of tokens -> [ROWS, GROUPS] maps of all groups up to and with each."""
    d0, d1, d2, d3 = _split(decay, ROWS, GROUPS)
    o0, o1, o2, o3 = _split(offset, ROWS, GROUPS)
    d, o = then(d3, o3, d2, o2, CUTS)
    d, o = then(d, o, d1, o1, CUTS)
    d, o = then(d, o, d0, o0, CUTS)
    return _scan(d, o, CUTS)


@triton.jit
def _of_last_group(x, GROUPS: tl.constexpr):
    """[ROWS, GROUPS] -> [ROWS], what stands at the last group, the earliest tokens."""
    return tl.sum(tl.where(tl.arange(0, GROUPS)[None, :] == GROUPS - 1, x, 0.0), 1)


@triton.jit
def with_tile(part_decay, part_offset, decay, offset, CUTS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """The map of a part of each row, [ROWS], so far, and the one that the tokens of one more tile make of it."""
    d, o = _scan_groups(decay, offset, CUTS, ROWS, GROUPS)
    d, o = _of_last_group(d, GROUPS), _of_last_group(o, GROUPS)
    return then(part_decay, part_offset, d, o, CUTS)


@triton.jit
def next_states(
    decay, offset,  # [ROWS, GROUPS, 4], maps of the tile's tokens
    later_decay, later_offset,  # of the tokens one group on, (1, 0) after the tile's end
    state,  # [ROWS], after the tile
    CUTS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """The state after each token, U_{t+1}, and the state before the tile.

    A scan hands each group the maps up to and with its own, but what a group needs is those after it, and Triton has no
    shift. So a group scans the map of the one that follows it, whose tokens are read again, from the first-level cache.
    """
    d, o = _scan_groups(later_decay, later_offset, CUTS, ROWS, GROUPS)
    d0, d1, d2, d3 = _split(decay, ROWS, GROUPS)
    o0, o1, o2, o3 = _split(offset, ROWS, GROUPS)
    u3 = apply(d, o, state[:, None], CUTS)
    u2 = apply(d3, o3, u3, CUTS)
    u1 = apply(d2, o2, u2, CUTS)
    u0 = apply(d1, o1, u1, CUTS)
    before = _of_last_group(apply(d0, o0, u0, CUTS), GROUPS)
    return _join(u0, u1, u2, u3, ROWS, GROUPS), before


@triton.jit
def store_map(maps_ptr, row, parts, part, slot, decay, offset, ROWS: tl.constexpr):
    """One row's part, to maps_ptr: (rows, parts, 4)."""
    at = maps_ptr + (tl.reshape(row, [ROWS]) * parts + part) * 4 + slot
    tl.store(at, decay)
    tl.store(at + 1, offset)


@triton.jit
def state_after(maps_ptr, part, parts, state, CUTS: tl.constexpr, PARTS: tl.constexpr):
    """The state after a part, [1], from that at the row's end; maps_ptr: (parts, 4), decay and offset first."""
    later = PARTS - 1 - tl.arange(0, PARTS)[None, :]
    there = (later > part) & (later < parts)
    d, o = _scan(tl.load(maps_ptr + later * 4, there, 1.0), tl.load(maps_ptr + later * 4 + 1, there, 0.0), CUTS)
    return apply(_of_last_group(d, PARTS), _of_last_group(o, PARTS), state, CUTS)


@triton.jit
def any_after(flags_ptr, part, parts, PARTS: tl.constexpr):
    """Whether a part after this one has its flag set, [1] of 0 or 1; flags_ptr: (parts, 4), of which it reads one."""
    later = tl.arange(0, PARTS)[None, :]
    return tl.max((tl.load(flags_ptr + later * 4, (later > part) & (later < parts), 0.0) != 0).to(tl.int32), 1)
