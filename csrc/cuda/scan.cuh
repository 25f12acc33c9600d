// SPDX-License-Identifier: Apache-2.0
// First-order recurrences from right to left as an associative scan: over a thread's tokens, a warp, a tile, all tiles.
//
// Rows lie end to end in flat arrays, divided into tiles of kTile tokens, one block each. It is one pass over the data:
// a tile publishes its map for the tiles to its left, and combines, always in the same order, the maps of the tiles
// between it and the end of its sequence. (Where rows are many and long, gae_rows.cuh does without.)
#pragma once

#include "reduce.cuh"
#include "tokens.cuh"

namespace rlhf_fast {
namespace cuda {

// As a scale: the state to the right is ignored, even if it is infinite.
constexpr float kCut = -1.0f;

// The affine map that consecutive tokens apply to each of kChains recurrences: constant + scale * (state to the right).
template <int kChains>
struct Stretch {
  float constant[kChains];
  float scale[kChains];

  // No token.
  static __device__ __forceinline__ Stretch nothing() { return filled(0.0f, 1.0f); }
  // The end of a sequence.
  static __device__ __forceinline__ Stretch end() { return filled(0.0f, kCut); }

 private:
  static __device__ __forceinline__ Stretch filled(float constant, float scale) {
    Stretch s;
    for (float& x : s.constant) x = constant;
    for (float& x : s.scale) x = scale;
    return s;
  }
};

// The product of factors in [0, 1], 0 only if one of them is 0: over many tokens a plain product would underflow, and
// then an infinite state would be lost.
__device__ __forceinline__ float product(float a, float b) {
  return fmaxf(a * b, fminf(fminf(a, b), __FLT_DENORM_MIN__));
}

template <int kChains>
__device__ __forceinline__ Stretch<kChains> join(const Stretch<kChains>& left, const Stretch<kChains>& right) {
  Stretch<kChains> both = left;
#pragma unroll
  for (int c = 0; c < kChains; ++c) {
    if (left.scale[c] == kCut) continue;
    both.constant[c] = fmaf(left.scale[c], right.constant[c], left.constant[c]);
    both.scale[c] = right.scale[c] == kCut ? kCut : product(left.scale[c], right.scale[c]);
  }
  return both;
}

// Lane l gets the combined map of lanes l to 31.
template <int kChains>
__device__ __forceinline__ Stretch<kChains> scan_warp(Stretch<kChains> s) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const Stretch<kChains> right = shuffle_down(s, distance);
    if (lane + distance < kWarp) s = join(s, right);
  }
  return s;
}

// Given the combined map of lanes l to 31, the map of the lanes after l.
template <int kChains>
__device__ __forceinline__ Stretch<kChains> after_lane(const Stretch<kChains>& from_lane) {
  const Stretch<kChains> next = shuffle_down(from_lane, 1);
  return threadIdx.x % kWarp == kWarp - 1 ? Stretch<kChains>::nothing() : next;
}

// Sequence s is [begin_of(s), begin_of(s + 1)) of the flat arrays. Bounds in device memory are not checked, so they may
// affect what is computed, but never which addresses are read or written.
struct Sequences {
  const int64_t* bounds;  // cu_seqlens, or null:
  int64_t length;         // then all have this length
  int64_t count;
  int64_t total;  // tokens

  __device__ __forceinline__ int64_t begin_of(int64_t s) const { return bounds ? bounds[s] : s * length; }

  // The sequence that contains `token`; `count` after the last one.
  __device__ __forceinline__ int64_t of(int64_t token) const {
    if (!bounds) {
      // Of 32 bits where they suffice: one of 64 takes three times the instructions.
      const bool is_short = ((token | length) >> 32) == 0;
      const int64_t s = is_short ? static_cast<uint32_t>(token) / static_cast<uint32_t>(length) : token / length;
      return s < count ? s : count;
    }
    int64_t low = 0, high = count;
    while (low < high) {
      const int64_t middle = low + (high - low + 1) / 2;
      if (bounds[middle] <= token) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
};

// Goes over a thread's tokens from right to left, one sequence after the other: walk(tokens) gets one bit for each of
// its tokens, enter(sequence) is called before each sequence but the first. `behind` is the sequence of the token to
// the right of the thread's last.
template <class Enter, class Walk>
__device__ __forceinline__ void for_each_sequence(const Sequences& sequences, int64_t first, int64_t behind,
                                                  const Enter& enter, const Walk& walk) {
  int64_t sequence = behind;
  for (int end = kTokens;;) {
    const int64_t begins = sequences.begin_of(sequence);
    const int begin = begins <= first ? 0 : (begins < first + end ? static_cast<int>(begins - first) : end);
    walk(bits_between(begin, end));
    if (begin == 0 || sequence == 0) return;
    enter(--sequence);
    end = begin;
  }
}

// Whether tiles need the maps of tiles to their right, because some sequence ends inside a later tile.
inline bool needs_links(const Sequences& s) { return s.total > kTile && (s.bounds || kTile % s.length != 0); }

// The memory for that: a ticket counter, and for each tile and chain a word with constant and scale, which never equals
// kUnpublished (-1.7e38).
inline int64_t link_bytes(const Sequences& s, int chains) {
  return needs_links(s) ? (1 + tiles_of(s.total) * chains) * static_cast<int64_t>(sizeof(uint64_t)) : 0;
}
struct Links {
  uint64_t* tickets;  // null where no tile waits
  uint64_t* words;

  explicit Links(uint64_t* memory) : tickets(memory), words(memory ? memory + 1 : nullptr) {}
};

// The tile of this block. Tiles are taken from the last to the first, so the tiles to the right, which this one may
// wait for, belong to blocks that are already running.
__device__ __forceinline__ int64_t take_tile(const Links& links) {
  if (!links.tickets) return gridDim.x - 1 - blockIdx.x;
  RF_SHARED(unsigned, ticket, 1);
  if (threadIdx.x == 0) ticket[0] = take_ticket(links.tickets);
  __syncthreads();
  return gridDim.x - 1 - ticket[0];
}

inline cudaError_t clear_links(const Sequences& s, int chains, uint64_t* links, cudaStream_t stream) {
  const int64_t bytes = link_bytes(s, chains);
  return bytes == 0 ? cudaSuccess : cudaMemsetAsync(links, kUnpublishedByte, static_cast<size_t>(bytes), stream);
}

struct LinkWord {
  float constant;
  float scale;
};

template <int kChains>
__device__ __forceinline__ void publish_stretch(const Stretch<kChains>& s, int64_t tile, const Links& links) {
#pragma unroll
  for (int c = 0; c < kChains; ++c) {
    publish(bit_cast<uint64_t>(LinkWord{s.constant[c], s.scale[c]}), links.words + tile * kChains + c);
  }
}

template <int kChains>
__device__ __forceinline__ Stretch<kChains> wait_for_stretch(int64_t tile, const Links& links) {
  Stretch<kChains> s;
#pragma unroll
  for (int c = 0; c < kChains; ++c) {
    const auto word = bit_cast<LinkWord>(wait_for(links.words + tile * kChains + c));
    s.constant[c] = word.constant;
    s.scale[c] = word.scale;
  }
  return s;
}

// The state to the right of a tile, computed by one whole warp; lane 0 holds the tile's own map. If the tile's last
// sequence goes on past the tile, this waits for all tiles to the right that it reaches. Without links no tile waits.
template <int kChains>
__device__ __forceinline__ Stretch<kChains> state_behind(int64_t tile, const Stretch<kChains>& own,
                                                         const Sequences& sequences, const Links& links) {
  const Stretch<kChains> end = Stretch<kChains>::end();
  if (!links.words) return end;
  const int lane = threadIdx.x % kWarp;
  if (lane == 0) publish_stretch(own, tile, links);
  const int64_t next = (tile + 1) * kTile, sequence = sequences.of(next);
  if (sequence == sequences.count || sequences.begin_of(sequence) == next) return end;
  const int64_t bound = sequences.begin_of(sequence + 1);
  const int64_t stop = bound < sequences.total ? bound : sequences.total;
  Stretch<kChains> between = Stretch<kChains>::nothing();
  for (int64_t first = tile + 1; first * kTile < stop; first += kWarp) {
    Stretch<kChains> mine = Stretch<kChains>::nothing();
    if ((first + lane) * kTile < stop) mine = wait_for_stretch<kChains>(first + lane, links);
    between = join(between, broadcast_warp(scan_warp(mine)));
  }
  return join(between, end);
}

// Block-wide suffix scan: from each thread's map, the recurrence state entering its last token. The first warp calls
// `behind` with the map of warps l to the last in lane l; it returns the state to the right of the block's last token.
template <int kChains, class Behind>
__device__ __forceinline__ Stretch<kChains> scan_block(const Stretch<kChains>& own, Stretch<kChains>* warps,
                                                       const Behind& behind) {
  constexpr int kWarps = kTileThreads / kWarp;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Stretch<kChains> from_lane = scan_warp(own), after = after_lane(from_lane);
  if (lane == 0) warps[warp] = from_lane;
  __syncthreads();
  if (warp == 0) {
    const Stretch<kChains> from_warp = scan_warp(lane < kWarps ? warps[lane] : Stretch<kChains>::nothing());
    const Stretch<kChains> after_warp = join(after_lane(from_warp), behind(from_warp));
    if (lane < kWarps) warps[lane] = after_warp;
  }
  __syncthreads();
  return join(after, warps[warp]);
}

// The same scan where tiles wait for the tiles to their right.
template <int kChains>
__device__ __forceinline__ Stretch<kChains> scan_tile(const Stretch<kChains>& own, int64_t tile,
                                                      const Sequences& sequences, const Links& links) {
  RF_SHARED(Stretch<kChains>, warps, kTileThreads / kWarp);
  return scan_block(own, warps,
                    [&](const Stretch<kChains>& from_warp) { return state_behind(tile, from_warp, sequences, links); });
}

}  // namespace cuda
}  // namespace rlhf_fast
