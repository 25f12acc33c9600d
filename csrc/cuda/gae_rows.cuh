// SPDX-License-Identifier: Apache-2.0
// GAE of many long rows on a GPU: a block goes along a whole row, tile by tile from its end, and keeps the state
// itself, so that no block waits for another and nothing has to be cleared. A tile is read while the one behind it is
// worked on.
#pragma once

#include "gae_tokens.cuh"

namespace rlhf_fast {
namespace cuda {

// Blocks that should fit on a multiprocessor: leaves 80 registers a thread, or 128 for two recurrences.
template <int kChains>
constexpr int kWalkBlocks = kChains == 1 ? 3 : 2;
constexpr int64_t kPair = 2 * kTokens;  // tokens of two lanes, which store together

// Whether gae_rows_kernel serves: rows that fill the GPU, are no shorter than half a tile, and begin and end with the
// pairs of lanes that store together.
inline bool walks_rows(const GaeArgs& a, const Sequences& sequences, int multiprocessors) {
  return !sequences.bounds && needs_links(sequences) && sequences.count >= multiprocessors &&
         sequences.count <= 0x7fffffff && sequences.length >= kTile / 2 && sequences.length % kPair == 0 &&
         aligned(a.rewards, a.values, a.mask, a.dones, a.truncated, a.advantages, a.returns);
}

// A thread's tokens in the tile that ends `turn` tiles before the row's end; none before the row's begin.
__device__ __forceinline__ Place place_in_row(int64_t begin, int64_t end, int64_t turn) {
  const int64_t first = end - (turn + 1) * kTile + static_cast<int64_t>(threadIdx.x) * kTokens;
  return first >= begin ? Place{first, kTokens, true} : Place{begin, 0, false};
}

template <class T>
__device__ __forceinline__ GaeLoads<T> load_whole_gae(const GaeArgs& a, const Place& place) {
  if (place.count == 0) return {};
  return {load_whole(static_cast<const T*>(a.rewards) + place.first),
          load_whole(static_cast<const T*>(a.values) + place.first),
          a.mask ? load_whole_flags(a.mask + place.first) : 0, a.dones ? load_whole_flags(a.dones + place.first) : 0,
          a.truncated ? load_whole_flags(a.truncated + place.first) : 0};
}

// Block b has row b.
template <class T, int kChains>
__global__ void __launch_bounds__(kTileThreads, kWalkBlocks<kChains>)
    gae_rows_kernel(const __grid_constant__ GaeArgs a) {
  constexpr int kWarps = kTileThreads / kWarp;
  RF_SHARED(Stretch<kChains>, warps, 2 * kWarps);  // turns alternate: one writes while another's are still read
  const int64_t begin = blockIdx.x * a.length, end = begin + a.length, turns = (a.length + kTile - 1) / kTile;
  const Decays<kChains> decays(a, blockIdx.x);
  Stretch<kChains> behind = Stretch<kChains>::end();  // the state behind the tile; the first warp's
  Place next_place = place_in_row(begin, end, 0);
  GaeLoads<T> next = load_whole_gae<T>(a, next_place);
  for (int64_t turn = 0; turn < turns; ++turn) {
    const Place place = next_place;
    Tokens tokens = tokens_of(a, place, next);
    if (turn + 1 < turns) {
      next_place = place_in_row(begin, end, turn + 1);
      next = load_whole_gae<T>(a, next_place);
    }
    constexpr unsigned kAll = (1u << kTokens) - 1;
    Stretch<kChains> own = Stretch<kChains>::nothing();
    go_back<false>(a.gamma, decays, kAll, &tokens, &own);
    finish_scales(decays, tokens.cuts != 0, &own);
    const auto state_behind_tile = [&](const Stretch<kChains>& from_warp) {
      const Stretch<kChains> now = behind;
      behind = join(broadcast_warp(from_warp), now);
      return now;
    };
    Stretch<kChains> state = scan_block(own, warps + turn % 2 * kWarps, state_behind_tile);
    go_back<true>(a.gamma, decays, kAll, &tokens, &state);
    store_whole(tokens.rewards, a.advantages + place.first, place.count != 0);
    store_whole(tokens.values, a.returns + place.first, place.count != 0);
  }
}

template <class T, int kChains>
cudaError_t launch_gae_rows(const GaeArgs& a, int64_t rows, cudaStream_t stream) {
  const auto kernel = gae_rows_kernel<T, kChains>;
  RF_LAUNCH(kernel, rows, kTileThreads, stream, a);
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace rlhf_fast
