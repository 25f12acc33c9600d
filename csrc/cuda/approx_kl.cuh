// SPDX-License-Identifier: Apache-2.0
// KL estimated from the sampled tokens' log-probs, and its gradient, on a GPU: see rlhf_fast/ops/kl.py. Each tile of
// tokens is one block's; the estimators themselves are math.h's, shared with the CPU.
#pragma once

#include "tokens.cuh"

namespace rlhf_fast {
namespace cuda {

// What a thread has of the inputs.
template <class T>
struct LogprobTokens {
  Eight<T> logprobs;
  Eight<T> ref_logprobs;
  Eight<T> ratio;
  uint64_t mask;

  __device__ __forceinline__ LogprobTokens(const ApproxKlArgs& a, const Place& place)
      : logprobs(load_tokens(static_cast<const T*>(a.logprobs), place)),
        ref_logprobs(load_tokens(static_cast<const T*>(a.ref_logprobs), place)),
        ratio(a.importance_ratio ? load_tokens(static_cast<const T*>(a.importance_ratio), place) : Eight<T>{}),
        mask(a.mask ? load_flags(a.mask, place) : ~uint64_t{0}) {}

  __device__ __forceinline__ float log_ratio(int j) const {
    return to_float(logprobs.values[j]) - to_float(ref_logprobs.values[j]);
  }
  __device__ __forceinline__ bool is_real(int j) const { return (mask >> 8 * j & 0xff) != 0; }
};

template <class T>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    approx_kl_kernel(const __grid_constant__ ApproxKlArgs a, int64_t count, bool arrays_aligned) {
  const Place place = place_in_tile(blockIdx.x, count, arrays_aligned);
  const LogprobTokens<T> tokens(a, place);
  float kl[kTokens];
#pragma unroll
  for (int j = 0; j < kTokens; ++j) {
    const float value = clamp_to(kl_estimate(tokens.log_ratio(j), a.estimator), a.clamp);
    const float weight = a.importance_ratio ? to_float(tokens.ratio.values[j]) : 1.0f;
    kl[j] = tokens.is_real(j) ? value * weight : 0.0f;
  }
  store_tokens(place, Results{kl, a.kl});
}

template <class T>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    approx_kl_backward_kernel(const __grid_constant__ ApproxKlArgs a, int64_t count, bool arrays_aligned) {
  const Place place = place_in_tile(blockIdx.x, count, arrays_aligned);
  const LogprobTokens<T> tokens(a, place);
  const Eight<float> grad_kl = load_tokens(a.grad_kl, place);
  float grad[kTokens], grad_ratio[kTokens];
#pragma unroll
  for (int j = 0; j < kTokens; ++j) {
    const float d = tokens.log_ratio(j), weight = a.importance_ratio ? to_float(tokens.ratio.values[j]) : 1.0f;
    const float slope = kl_estimate_slope(d, a.estimator, a.gradient);
    grad[j] = tokens.is_real(j) ? grad_kl.values[j] * (slope * weight) : 0.0f;
    grad_ratio[j] = tokens.is_real(j) ? grad_kl.values[j] * clamp_to(kl_estimate(d, a.estimator), a.clamp) : 0.0f;
  }
  store_tokens(place, Results{grad, a.grad_logprobs});
  if (a.grad_ratio) store_tokens(place, Results{grad_ratio, a.grad_ratio});
}

inline cudaError_t approx_kl(Dtype dtype, const ApproxKlArgs& a, int64_t count, cudaStream_t stream) {
  with_dtype(dtype, [&](auto zero) {
    const auto kernel = approx_kl_kernel<decltype(zero)>;
    const bool all_aligned = aligned(a.logprobs, a.ref_logprobs, a.importance_ratio, a.mask, a.kl);
    RF_LAUNCH(kernel, tiles_of(count), kTileThreads, stream, a, count, all_aligned);
  });
  return cudaGetLastError();
}

inline cudaError_t approx_kl_backward(Dtype dtype, const ApproxKlArgs& a, int64_t count, cudaStream_t stream) {
  with_dtype(dtype, [&](auto zero) {
    const auto kernel = approx_kl_backward_kernel<decltype(zero)>;
    const bool all_aligned = aligned(a.logprobs, a.ref_logprobs, a.importance_ratio, a.mask, a.grad_kl) &&
                             aligned(a.grad_logprobs, a.grad_ratio);
    RF_LAUNCH(kernel, tiles_of(count), kTileThreads, stream, a, count, all_aligned);
  });
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace rlhf_fast
