// SPDX-License-Identifier: Apache-2.0
// Whitening on a GPU: count, sum and sum of squares of the real tokens, in double, then the whitened tokens.
#pragma once

#include "reduce.cuh"
#include "tokens.cuh"

namespace rlhf_fast {
namespace cuda {

// In the order of the op's output `moments`.
struct Moments {
  double count;
  double sum;
  double squares;

  __device__ __forceinline__ void add(double x) {
    count += 1;
    sum += x;
    squares = fma(x, x, squares);
  }
};

#ifdef RF_SMALL_BLOCKS
constexpr int kSumThreads = 64;
#else
constexpr int kSumThreads = 1024;
#endif

// The block's sums, in every thread.
template <int kThreads>
__device__ __forceinline__ Moments sum_over_block(const Moments& own) {
  RF_SHARED(Moments, scratch, kThreads / kWarp);
  const auto merge = [](const Moments& x, const Moments& y) {
    return Moments{x.count + y.count, x.sum + y.sum, x.squares + y.squares};
  };
  return reduce_block<kThreads>(own, merge, scratch);
}

// One block sums the results of `count` blocks, always in the same order; zeros if there are none.
static __global__ void __launch_bounds__(kSumThreads)
    sum_moments_kernel(const Moments* partial, int64_t count, double* moments) {
  Moments sums{};
  for (int64_t i = threadIdx.x; i < count; i += kSumThreads) {
    sums.count += partial[i].count;
    sums.sum += partial[i].sum;
    sums.squares += partial[i].squares;
  }
  sums = sum_over_block<kSumThreads>(sums);
  if (threadIdx.x != 0) return;
  moments[0] = sums.count;
  moments[1] = sums.sum;
  moments[2] = sums.squares;
}

inline void launch_sum_moments(const Moments* partial, int64_t count, double* moments, cudaStream_t stream) {
  RF_LAUNCH(sum_moments_kernel, 1, kSumThreads, stream, partial, count, moments);
}

// Blocks loop over all tiles; their number, and so the sums, do not depend on the GPU.
inline int64_t whiten_blocks(int64_t total) {
  constexpr int64_t kMost = 1024;
  return tiles_of(total) < kMost ? tiles_of(total) : kMost;
}

template <class T>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    whiten_moments_kernel(const __grid_constant__ WhitenArgs a, int64_t total, bool packs, Moments* partial) {
  Moments sums{};
  for (int64_t tile = blockIdx.x; tile * kTile < total; tile += gridDim.x) {
    const Place place = place_in_tile(tile, total, packs);
    const Eight<T> values = load_tokens(static_cast<const T*>(a.values), place);
    const unsigned real = bits_of(load_flags(a.mask, place));
#pragma unroll
    for (int j = 0; j < kTokens; ++j) {
      if (real & 1u << j) sums.add(to_float(values.values[j]));
    }
  }
  sums = sum_over_block<kTileThreads>(sums);
  if (threadIdx.x == 0) partial[blockIdx.x] = sums;
}

template <class T>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    whiten_kernel(const __grid_constant__ WhitenArgs a, int64_t total, bool packs) {
  RF_SHARED(Whitening, shared, 1);
  if (threadIdx.x == 0) shared[0] = whitening(a.moments, a.shift_mean);
  __syncthreads();
  const Whitening w = shared[0];
  for (int64_t tile = blockIdx.x; tile * kTile < total; tile += gridDim.x) {
    const Place place = place_in_tile(tile, total, packs);
    const Eight<T> values = load_tokens(static_cast<const T*>(a.values), place);
    const unsigned real = bits_of(load_flags(a.mask, place));
    float whitened[kTokens];
#pragma unroll
    for (int j = 0; j < kTokens; ++j) {
      const double x = to_float(values.values[j]);
      whitened[j] = real & 1u << j ? static_cast<float>((x - w.mean) * w.scale + w.shift) : 0.0f;
    }
    store_tokens(place, Results{whitened, a.whitened});
  }
}

// `partial` has room for whiten_blocks(total).
inline cudaError_t whiten_moments(Dtype dtype, const WhitenArgs& a, int64_t total, Moments* partial,
                                  cudaStream_t stream) {
  const int64_t blocks = whiten_blocks(total);
  with_dtype(dtype, [&](auto zero) {
    const auto kernel = whiten_moments_kernel<decltype(zero)>;
    if (blocks > 0) {
      RF_LAUNCH(kernel, blocks, kTileThreads, stream, a, total, aligned(a.values, a.mask), partial);
    }
  });
  launch_sum_moments(partial, blocks, a.moments, stream);
  return cudaGetLastError();
}

inline cudaError_t whiten(Dtype dtype, const WhitenArgs& a, int64_t total, cudaStream_t stream) {
  with_dtype(dtype, [&](auto zero) {
    const auto kernel = whiten_kernel<decltype(zero)>;
    RF_LAUNCH(kernel, whiten_blocks(total), kTileThreads, stream, a, total, aligned(a.values, a.mask, a.whitened));
  });
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace rlhf_fast
