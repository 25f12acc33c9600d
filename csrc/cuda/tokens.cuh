// SPDX-License-Identifier: Apache-2.0
// Flat arrays of tokens, eight consecutive tokens per thread; rows of any length need no alignment of their own.
#pragma once

#include "vec.cuh"

namespace rlhf_fast {
namespace cuda {

constexpr int kTokens = 8;
#ifdef RF_SMALL_BLOCKS
constexpr int kTileThreads = 64;  // few, so that small tests have many tiles
#else
constexpr int kTileThreads = 256;
#endif
constexpr int kTileBlocks = 4;  // blocks per multiprocessor to compile for: allows 64 registers a thread
constexpr int64_t kTile = int64_t{kTileThreads} * kTokens;

inline int64_t tiles_of(int64_t total) { return (total + kTile - 1) / kTile; }

// Whether all pointers are aligned to 16 bytes (null is).
template <class... Pointers>
bool aligned(const Pointers*... pointers) {
  return (... && (reinterpret_cast<uintptr_t>(pointers) % 16 == 0));
}

// A thread's position in arrays of `total` tokens.
struct Place {
  int64_t first;  // its first token, possibly past the end of the arrays
  int count;      // how many of its kTokens exist
  bool packs;  // access 16 bytes at a time: the tile is full and the arrays are aligned; same in all threads of a block
};

__device__ __forceinline__ Place place_in_tile(int64_t tile, int64_t total, bool arrays_aligned) {
  const int64_t first = tile * kTile + static_cast<int64_t>(threadIdx.x) * kTokens, left = total - first;
  return {first, static_cast<int>(left < 0 ? 0 : (left < kTokens ? left : kTokens)),
          arrays_aligned && (tile + 1) * kTile <= total};
}

template <class T>
struct Eight {
  T values[kTokens];
};

// Loads leave conversions to the caller, so that all arrays of a tile are on their way before the first is waited for.
// From a 16-byte boundary:
template <class T>
__device__ __forceinline__ Eight<T> load_whole(const T* from) {
  Eight<T> eight;
#pragma unroll
  for (int i = 0; i < kTokens; i += kPack<T>) {
    const Pack<T> pack = load_pack(from + i);
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) eight.values[i + j] = pack.values[j];
  }
  return eight;
}

template <class T>
__device__ __forceinline__ Eight<T> load_tokens(const T* x, const Place& place) {
  if (place.packs) return load_whole(x + place.first);
  Eight<T> eight;
#pragma unroll
  for (int j = 0; j < kTokens; ++j) eight.values[j] = j < place.count ? x[place.first + j] : T{};
  return eight;
}

template <class T, int kArrays>
struct Loads {
  Eight<T> of[kArrays];
};

// Several arrays of one type: whether by 16 bytes is decided once for all.
template <class T, class... Arrays>
__device__ __forceinline__ Loads<T, sizeof...(Arrays)> load_together(const Place& place, const Arrays*... arrays) {
  constexpr int kArrays = sizeof...(Arrays);
  const T* const from[kArrays] = {static_cast<const T*>(arrays)...};
  Loads<T, kArrays> loads;
  if (place.packs) {
#pragma unroll
    for (int k = 0; k < kArrays; ++k) loads.of[k] = load_whole(from[k] + place.first);
    return loads;
  }
#pragma unroll
  for (int j = 0; j < kTokens; ++j) {
#pragma unroll
    for (int k = 0; k < kArrays; ++k) loads.of[k].values[j] = j < place.count ? from[k][place.first + j] : T{};
  }
  return loads;
}

// A byte a token; those that do not exist are 0.
__device__ __forceinline__ uint64_t load_whole_flags(const bool* from) {
  return *reinterpret_cast<const uint64_t*>(from);
}

__device__ __forceinline__ uint64_t load_flags(const bool* flags, const Place& place) {
  if (place.packs) return load_whole_flags(flags + place.first);
  const uint8_t* x = reinterpret_cast<const uint8_t*>(flags) + place.first;
  uint64_t bytes = 0;
#pragma unroll
  for (int j = 0; j < kTokens; ++j) {
    if (j < place.count) bytes |= static_cast<uint64_t>(x[j]) << 8 * j;
  }
  return bytes;
}

// One bit for each of four bytes that is not 0.
__device__ __forceinline__ unsigned bits_of(uint32_t bytes) {
  const uint32_t high = ((bytes & 0x7f7f7f7fu) + 0x7f7f7f7fu) | bytes;  // in the highest bit of each
  return (high >> 7 & 0x01010101u) * 0x01020408u >> 24;                 // gathered by the product
}

// One bit per token.
__device__ __forceinline__ unsigned bits_of(uint64_t bytes) {
  return bits_of(static_cast<uint32_t>(bytes)) | bits_of(static_cast<uint32_t>(bytes >> 32)) << 4;
}

// Tokens [begin, end), one bit each.
__device__ __forceinline__ unsigned bits_between(int begin, int end) { return (1u << end) - (1u << begin); }

// Neighbouring lanes swap halves, so that each store of a warp fills whole sectors of 32 bytes: first those of the even
// lane, then those of the odd one. `to` is the thread's own, on a 16-byte boundary; of a pair both exist or none.
__device__ __forceinline__ void store_whole(const float (&x)[kTokens], float* to, bool exists) {
  constexpr int kHalf = kTokens / 2;
  const int lane = threadIdx.x % kWarp;
  const bool odd = lane % 2 == 1;
  Pack<float> even_lane, odd_lane;
#pragma unroll
  for (int k = 0; k < kHalf; ++k) {
    const float given = odd ? x[k] : x[kHalf + k];
    const float got = bit_cast<float>(__shfl_sync(kFullWarp, bit_cast<uint32_t>(given), lane ^ 1));
    even_lane.values[k] = odd ? got : x[k];
    odd_lane.values[k] = odd ? x[kHalf + k] : got;
  }
  if (!exists) return;
  float* pair = to - (odd ? kHalf : 0);
  store_pack(even_lane, pair);
  store_pack(odd_lane, pair + kTokens);
}

// What a thread writes of its tokens to an array.
struct Results {
  const float (&values)[kTokens];
  float* to;
};

// Of several arrays at once, so that whether by 16 bytes is decided once.
template <class... Arrays>
__device__ __forceinline__ void store_tokens(const Place& place, const Arrays&... results) {
  if (place.packs) return (store_whole(results.values, results.to + place.first, true), ...);
#pragma unroll
  for (int j = 0; j < kTokens; ++j) {
    if (j < place.count) (..., (results.to[place.first + j] = results.values[j]));
  }
}

}  // namespace cuda
}  // namespace rlhf_fast
