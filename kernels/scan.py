# SPDX-License-Identifier: Apache-2.0
"""The recurrence of GAE as an associative scan, for gae.py and ppo.py, and the division of work into programs.

From a row's last token to its first, the recurrence has one number of state for each lambda: what token t adds to the
reward minus value of the token before it,

    U_t = gamma (V_t + lam A_t) = gamma lam r_t + (gamma - gamma lam) V_t + gamma lam U_{t+1}
    A_t = r_t - V_t + U_{t+1}

so that no next value has to be carried across masked tokens. A token is the map U -> offset + decay U. A skipped masked
token is the map (1, 0). A token that ends an episode has decay 0, which means that the state after it is ignored, even
if it is infinite or NaN. Every other decay is kept above 0: otherwise the product of a thousand of them could be 0, and
an infinite return, from a legal infinite reward, would become 0 * inf = NaN.

A tile is [ROWS, GROUPS, 4] tokens. Groups run from the row's end (Triton's reverse scan would take five more shuffles
per element and operand); the four tokens of a group are in memory order: 16 bytes of float32 for a thread.

A program goes over its tokens from the end, tile by tile, and carries the state: it reads once and writes once, in one
launch. It has one long row, several short ones, or, of packed tokens, the sequences that end within its part. Few long
rows are divided into parts: a first launch computes the map of each part, a second one starts from the maps of the
later parts. This reads the input twice, but without it most of the GPU would be idle.
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

# A tile is a block of one row, or several short rows with 1024 tokens in total. A kernel with many inputs uses half the
# largest tile, so that two programs fit into a multiprocessor's registers. In the interpreter tiles are so small that
# the tests' rows have several blocks and parts.
MAX_GROUPS = 64 if INTERPRETED else 512
GROUPS_OF_SHORT_ROWS = 256
GROUPS_PER_WARP = 32
MAX_WARPS = 8
# Long rows are divided into parts if there are fewer than FEW_ROWS, aiming at PROGRAMS programs. At an estimated 1.3 us
# a block, 64 undivided rows take an H100 as long as reading the input twice.
FEW_ROWS = 64
LONG_ROW = 4  # blocks
PROGRAMS = 256


# ------------------------------------------------------------------------------------------- on the host


class Plan(NamedTuple):
    """How (rows, length) tokens are divided into programs."""

    rows: int
    part: int  # tokens of a row per program, a multiple of the block
    parts: int  # of a row
    cut: bool  # the parts of a row depend on each other
    aligned: bool  # groups begin at multiples of their size; Triton itself checks the tensors' alignment
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
        """The buffer between the two launches: (rows, parts, 4)."""
        return like.new_empty((self.rows, self.parts, 4), dtype=torch.float32) if self.cut else None


def plan_for(rows: int, length: int, strides: list[int], light: bool = False, packed: int | None = None) -> Plan:
    """light: the kernel has few inputs. packed: number of sequences in one row of all tokens; if the parts are
    independent, a program has the sequences that end within its part, and its groups begin anywhere."""
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
    """[1, GROUPS, 4], positions in a tile: groups from the last to the first, tokens within a group ascending."""
    group = GROUPS - 1 - tl.arange(0, GROUPS)
    return group[None, :, None] * VEC + tl.arange(0, VEC)[None, None, :]


@triton.jit
def tokens_inside(
    row, rows, lane, start, begin, end,
    SNAP: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Which of the tokens start + lane belong to the program: in its tile, within [begin, end), in existing rows."""
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
    """The state before the tokens of a map, from the state after them."""
    if CUTS:
        return tl.where(decay > 0, offset + decay * state, offset)
    return offset + decay * state


@triton.jit
def _then(later_decay, later_offset, decay, offset):
    return tl.maximum(later_decay * decay, TINY), apply(decay, offset, later_offset, False)


@triton.jit
def _then_with_cuts(later_decay, later_offset, decay, offset):
    least = tl.minimum(tl.minimum(later_decay, decay), TINY)  # 0 if one of them is 0
    return tl.maximum(later_decay * decay, least), apply(decay, offset, later_offset, True)


@triton.jit
def then(later_decay, later_offset, decay, offset, CUTS: tl.constexpr):
    """One map for later tokens followed by earlier ones."""
    if CUTS:
        return _then_with_cuts(later_decay, later_offset, decay, offset)
    return _then(later_decay, later_offset, decay, offset)


@triton.jit
def token_maps(reward, value, counts, cut, gamma, decay, CUTS: tl.constexpr):
    """Each token's map of the state; the identity where `counts` is False."""
    # 0 * value: as in the definition, the tokens before an infinite value are NaN
    offsets = decay * reward + (gamma - decay) * value + 0.0 * value
    decays = tl.where(counts, tl.maximum(decay, TINY), 1.0)
    if CUTS:
        decays = tl.where(cut, 0.0, decays)
    return decays, offsets


@triton.jit
def _scan(decay, offset, CUTS: tl.constexpr):
    """[ROWS, GROUPS] maps -> the combined map of all groups up to and including each."""
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
    """[ROWS, GROUPS, 4] maps of tokens -> [ROWS, GROUPS] combined maps of all groups up to and including each."""
    d0, d1, d2, d3 = _split(decay, ROWS, GROUPS)
    o0, o1, o2, o3 = _split(offset, ROWS, GROUPS)
    d, o = then(d3, o3, d2, o2, CUTS)
    d, o = then(d, o, d1, o1, CUTS)
    d, o = then(d, o, d0, o0, CUTS)
    return _scan(d, o, CUTS)


@triton.jit
def _of_last_group(x, GROUPS: tl.constexpr):
    """[ROWS, GROUPS] -> [ROWS], the value of the last group, which has the earliest tokens."""
    return tl.sum(tl.where(tl.arange(0, GROUPS)[None, :] == GROUPS - 1, x, 0.0), 1)


@triton.jit
def with_tile(part_decay, part_offset, decay, offset, CUTS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """The map [ROWS] of a part of each row, extended by the tokens of one more tile."""
    d, o = _scan_groups(decay, offset, CUTS, ROWS, GROUPS)
    d, o = _of_last_group(d, GROUPS), _of_last_group(o, GROUPS)
    return then(part_decay, part_offset, d, o, CUTS)


@triton.jit
def next_states(
    decay, offset,  # [ROWS, GROUPS, 4], maps of the tile's tokens
    later_decay, later_offset,  # maps of the tokens one group later, (1, 0) after the tile's end
    state,  # [ROWS], the state after the tile
    CUTS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """The state after each token, U_{t+1}, and the state before the tile.

    A scan gives each group the combined map including its own, but a group needs the map of the groups after it, and
    Triton has no shift. So each group scans the map of the next one, whose tokens are read again, from the L1 cache.
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
    """Stores the map of each row's part in maps_ptr: (rows, parts, 4)."""
    at = maps_ptr + (tl.reshape(row, [ROWS]) * parts + part) * 4 + slot
    tl.store(at, decay)
    tl.store(at + 1, offset)


@triton.jit
def state_after(maps_ptr, part, parts, state, CUTS: tl.constexpr, PARTS: tl.constexpr):
    """The state after a part, [1], from the state at the row's end; maps_ptr: (parts, 4), decay and offset first."""
    later = PARTS - 1 - tl.arange(0, PARTS)[None, :]
    there = (later > part) & (later < parts)
    d, o = _scan(tl.load(maps_ptr + later * 4, there, 1.0), tl.load(maps_ptr + later * 4 + 1, there, 0.0), CUTS)
    return apply(_of_last_group(d, PARTS), _of_last_group(o, PARTS), state, CUTS)


@triton.jit
def any_after(flags_ptr, part, parts, PARTS: tl.constexpr):
    """Whether a later part has its flag set, [1] of 0 or 1; flags_ptr: (parts, 4), of which one column is read."""
    later = tl.arange(0, PARTS)[None, :]
    return tl.max((tl.load(flags_ptr + later * 4, (later > part) & (later < parts), 0.0) != 0).to(tl.int32), 1)
