// SPDX-License-Identifier: Apache-2.0
// Reductions over the threads of a block, always in the same order.
#pragma once

#include "compat.cuh"

namespace rlhf_fast {
namespace cuda {

// Shuffles any plain struct of 4-byte words between the lanes of a warp.
template <class T>
struct Words {
  static_assert(sizeof(T) % 4 == 0, "travels in words of 4 bytes");
  uint32_t words[sizeof(T) / 4];
};

template <class T>
__device__ __forceinline__ T shuffle_down(const T& value, int distance) {
  auto words = bit_cast<Words<T>>(value);
#pragma unroll
  for (uint32_t& word : words.words) word = __shfl_down_sync(kFullWarp, word, distance);
  return bit_cast<T>(words);
}

template <class T>
__device__ __forceinline__ T broadcast_warp(const T& value) {
  auto words = bit_cast<Words<T>>(value);
#pragma unroll
  for (uint32_t& word : words.words) word = __shfl_sync(kFullWarp, word, 0);
  return bit_cast<T>(words);
}

// merge must be commutative.
template <class T, class Merge>
__device__ __forceinline__ T reduce_warp(T value, const Merge& merge) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const T other = shuffle_down(value, distance);
    value = merge(value, other);
  }
  return value;  // complete in lane 0
}

// The block's value, in every thread. `scratch` is shared memory with one T per warp; it may be reused after the next
// barrier.
template <int kThreads, class T, class Merge>
__device__ __forceinline__ T reduce_block(T value, const Merge& merge, T* scratch) {
  constexpr int kWarps = kThreads / kWarp;
  static_assert(kWarps <= kWarp && (kWarps & (kWarps - 1)) == 0, "a power of two");
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  value = reduce_warp(value, merge);
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  value = scratch[lane % kWarps];  // every warp merges all of them in the same order
#pragma unroll
  for (int distance = kWarps / 2; distance > 0; distance /= 2) {
    const T other = shuffle_down(value, distance);
    value = merge(value, other);
  }
  return broadcast_warp(value);
}

}  // namespace cuda
}  // namespace rlhf_fast
