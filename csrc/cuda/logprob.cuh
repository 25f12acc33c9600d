// SPDX-License-Identifier: Apache-2.0
// Row statistics of a softmax, and their gradient, on a GPU: see rlhf_fast/ops/logprob.py for the mathematics.
//
// A block folds a row, or a part of one where rows are few. Parts are merged by the first block of a cluster that has
// the whole row, or by a second kernel.
#pragma once

#include "softmax.cuh"

namespace rlhf_fast {
namespace cuda {

// ------------------------------------------------------------------------------------------- forward

__device__ __forceinline__ void write_masked_row(const TokenStatsArgs& a, int64_t n, int thread, int threads) {
  for (int64_t k = thread; a.logprobs && k < a.k; k += threads) a.logprobs[n * a.k + k] = 0;
  if (thread != 0) return;
  if (a.entropy) a.entropy[n] = 0;
  if (a.logsumexp) a.logsumexp[n] = 0;
  if (a.sum_sq_probs) a.sum_sq_probs[n] = 0;
  if (a.argmax) a.argmax[n] = 0;
  a.parts[2 * n] = a.parts[2 * n + 1] = 0;
}

// Target k of a row; -1 where there is none.
__device__ __forceinline__ int64_t target_of(const TokenStatsArgs& a, int64_t n, int64_t k) {
  return a.logprobs && k < a.k ? a.targets[n * a.k + k] : -1;
}

// u at a target; NaN if the target is outside of the vocabulary.
template <bool kCap, class T>
__device__ __forceinline__ float at_target(const TokenStatsArgs& a, const T* x, int64_t target,
                                           const RowTransform& transform) {
  return target < 0 || target >= a.columns ? kNan : transform.apply<kCap>(to_float(x[target]));
}

// `first` is u at the thread's first target, which the kernels load early.
template <bool kCap, bool kFull, class T>
__device__ __forceinline__ void write_row(const TokenStatsArgs& a, int64_t n, const T* x, const RowTransform& transform,
                                          const Fold<kFull>& fold, float first, int thread, int threads) {
  const bool dead = is_dead(fold);
  const float log_sum = dead ? 0.0f : logf(fold.sum);
  for (int64_t k = thread; a.logprobs && k < a.k; k += threads) {
    const float u = k == thread ? first : at_target<kCap>(a, x, target_of(a, n, k), transform);
    a.logprobs[n * a.k + k] = (u - safe_max(fold)) * transform.factor - log_sum;
  }
  if (thread != 0) return;
  a.parts[2 * n] = saved_max(fold.max, fold.sum);
  a.parts[2 * n + 1] = log_sum;
  if (a.logsumexp) a.logsumexp[n] = fold.max * transform.factor + log_sum;
  if constexpr (kFull) {
    const float nats = dead ? 0.0f : log_sum - kLn2 * (fold.weighted / fold.sum);
    if (a.entropy) a.entropy[n] = nats < 0 ? 0.0f : nats;  // rounding may give less than 0; NaN stays NaN
    if (a.sum_sq_probs) a.sum_sq_probs[n] = dead ? 0.0f : fold.squares / fold.sum / fold.sum;
    if (a.argmax) a.argmax[n] = fold.index;
  }
}

// Merges the blocks' partial results of a row; by one warp.
template <bool kCap, bool kFull, class T>
__device__ __forceinline__ void merge_parts(const TokenStatsArgs& a, int64_t n, const T* row,
                                            const RowTransform& transform, int parts, const Fold<kFull>* partial,
                                            float first) {
  const auto merge = [&](const Fold<kFull>& x, const Fold<kFull>& y) { return merge_folds(x, y, transform.factor2); };
  Fold<kFull> fold;
  for (int part = threadIdx.x; part < parts; part += kWarp) fold = merge(fold, partial[n * parts + part]);
  fold = broadcast_warp(reduce_warp(fold, merge));
  write_row<kCap>(a, n, row, transform, fold, first, threadIdx.x, kWarp);
}

// Block b has part b % parts of row b / parts; `together`: a row's blocks are a cluster, and the first finishes it.
template <class T, bool kCap, bool kFull>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    token_stats_kernel(const __grid_constant__ TokenStatsArgs a, int parts, bool together, Fold<kFull>* partial) {
  RF_SHARED(Fold<kFull>, scratch, kRowThreads / kWarp);
  const int64_t n = blockIdx.x / parts;
  const int part = blockIdx.x % parts, thread = threadIdx.x;
  if (a.mask && !a.mask[n]) {
    if (part == 0) write_masked_row(a, n, thread, kRowThreads);
    return;
  }
  const RowTransform transform(a.transform, n);
  int64_t begin, end;
  slice_of(a.columns, part, parts, &begin, &end);
  Fold<kFull> fold;
  const T* row = static_cast<const T*>(a.logits) + row_offset(a.rows, n);
  const bool finishes = parts == 1 || (together && part == 0);
  const int64_t target = finishes ? target_of(a, n, thread) : -1;  // on its way while the row is read
  for_each_column(row, begin, end, [&](const auto& x, int64_t column) {
    constexpr int kCount = sizeof(x) / sizeof(float);
    float u[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) u[j] = transform.apply<kCap>(x[j]);
    fold_entries<T>(u, column, transform.factor2, &fold);
  });
  const float first = at_target<kCap>(a, row, target, transform);  // on its way while the sums are merged
  const auto merge = [&](const Fold<kFull>& x, const Fold<kFull>& y) { return merge_folds(x, y, transform.factor2); };
  const Fold<kFull> own = fold;
  fold = reduce_block<kRowThreads>(fold, merge, scratch);
  if constexpr (kFull) {
    RF_SHARED(int32_t, columns, kRowThreads / kWarp);
    if (a.argmax) fold.index = first_column_of<T, kCap>(fold.max, own, row, end, transform, columns);
  }
  if (parts == 1) return write_row<kCap>(a, n, row, transform, fold, first, thread, kRowThreads);
  if (thread == 0) partial[blockIdx.x] = fold;
  if (!together) return;
  cluster_barrier();
  if (part == 0 && thread < kWarp) merge_parts<kCap>(a, n, row, transform, parts, partial, first);
}

// One warp a row.
template <class T, bool kCap, bool kFull>
__global__ void __launch_bounds__(kWarp)
    token_stats_merge_kernel(const __grid_constant__ TokenStatsArgs a, int parts, const Fold<kFull>* partial) {
  const int64_t n = blockIdx.x;
  if (a.mask && !a.mask[n]) return;
  const RowTransform transform(a.transform, n);
  const T* row = static_cast<const T*>(a.logits) + row_offset(a.rows, n);
  const float first = at_target<kCap>(a, row, target_of(a, n, threadIdx.x), transform);
  merge_parts<kCap>(a, n, row, transform, parts, partial, first);
}

// Whether the blocks of a row may run as a cluster: without a second launch, then.
inline bool run_together(int parts, int device) {
  const bool is_size = parts > 1 && parts <= kMaxCluster && (parts & (parts - 1)) == 0;
  return is_size && cluster_cache(token_stats_kernel<float, false, false>, device) > 0;
}

template <class T, bool kCap, bool kFull>
void launch_token_stats(const TokenStatsArgs& a, int64_t rows, int parts, bool together, void* partial,
                        cudaStream_t stream) {
  const auto kernel = token_stats_kernel<T, kCap, kFull>;
  Fold<kFull>* folds = static_cast<Fold<kFull>*>(partial);
  if (together && clusters_fit(kernel, kRowThreads, parts)) {
    return launch_clusters(kernel, rows * parts, kRowThreads, parts, stream, a, parts, true, folds);
  }
  RF_LAUNCH(kernel, rows * parts, kRowThreads, stream, a, parts, false, folds);
  if (parts == 1) return;
  const auto merge = token_stats_merge_kernel<T, kCap, kFull>;
  RF_LAUNCH(merge, rows, kWarp, stream, a, parts, folds);
}

// `partial` has room for rows * parts folds of kFoldSize bytes; unused with one part. together: see run_together().
constexpr int64_t kFoldSize = sizeof(Fold<true>);

inline cudaError_t token_stats(Dtype dtype, const TokenStatsArgs& a, int64_t rows, int parts, bool together,
                               void* partial, cudaStream_t stream) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool full = a.entropy || a.sum_sq_probs || a.argmax;
    if (bends(a.transform)) {
      full ? launch_token_stats<T, true, true>(a, rows, parts, together, partial, stream)
           : launch_token_stats<T, true, false>(a, rows, parts, together, partial, stream);
    } else {
      full ? launch_token_stats<T, false, true>(a, rows, parts, together, partial, stream)
           : launch_token_stats<T, false, false>(a, rows, parts, together, partial, stream);
    }
  });
  return cudaGetLastError();
}

// ------------------------------------------------------------------------------------------- backward

// dz = p (g_logsumexp - sum g_logprobs - g_entropy (log p + entropy)), and dx = dz dz/dx; plus g_logprobs at targets.
template <bool kCap, bool kEntropy>
struct RowGradient {
  RowTransform transform;
  float shift;     // the row's max
  float log_sum2;  // base 2
  float constant;  // g_logsumexp - sum g_logprobs
  float grad_entropy;
  float entropy;

  __device__ __forceinline__ float at(float x,
                                      float extra = -0.0f) const {  // adding -0 changes nothing
    const float u = transform.apply<kCap>(x);
    const float logp2 = (u - shift) * transform.factor2 - log_sum2, p = exp2_fast(logp2);
    float weight = constant;
    if (kEntropy) weight -= grad_entropy * (fmaxf(-150.0f, logp2) * kLn2 + entropy);
    return ((p == 0.0f ? 0.0f : p * weight) + extra) * transform.slope_at<kCap>(u);
  }
};

// Sum of the gradients of the row's targets, NaN if a target is outside of the vocabulary; in every thread.
__device__ __forceinline__ float sum_of_target_gradients(const TokenStatsBackwardArgs& a, int64_t n, float* scratch) {
  float total = 0;
  for (int64_t k = threadIdx.x; k < a.k; k += kRowThreads) {
    const int64_t target = a.targets[n * a.k + k];
    total += target >= 0 && target < a.columns ? a.grad_logprobs[n * a.k + k] : kNan;
  }
  return reduce_block<kRowThreads>(total, [](float x, float y) { return x + y; }, scratch);
}

// The gradient at a target, of which the row may hold several equal ones.
template <class T, class Gradient>
__device__ __forceinline__ float gradient_at_target(const TokenStatsBackwardArgs& a, int64_t n, int64_t target,
                                                    const T* x, const Gradient& g) {
  float total = 0;
  for (int64_t k = 0; k < a.k; ++k) total += a.targets[n * a.k + k] == target ? a.grad_logprobs[n * a.k + k] : 0.0f;
  return g.at(to_float(x[target]), total);
}

template <int kLoads, class T, class Gradient>
__device__ __forceinline__ void write_gradients(const T* x, T* grad, int64_t begin, int64_t end, const Gradient& g) {
  const auto write = [&](const auto& values, int64_t column) {
    constexpr int kCount = sizeof(values) / sizeof(float);
    if constexpr (kCount == 1) {
      from_float(g.at(values[0]), grad + column);
    } else {
#pragma unroll
      for (int first = 0; first < kCount; first += kPack<T>) {
        Pack<T> pack;
#pragma unroll
        for (int j = 0; j < kPack<T>; ++j) from_float(g.at(values[first + j]), &pack.values[j]);
        store_pack(pack, grad + column_of<T>(column, first));
      }
    }
  };
  if (same_phase<T>(x, grad)) {
    for_each_column<kLoads>(x, begin, end, write);
  } else {
    for_each_column_shifted<T>(x, grad, begin, end, write);
  }
}

// Block b has part b % parts of row b / parts. `grad_logits` may be `logits`: every entry is read before it is written,
// and those at targets are computed before the pass and written after it (equal targets of a row write the same value).
template <class T, bool kCap, bool kEntropy>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    token_stats_backward_kernel(const __grid_constant__ TokenStatsBackwardArgs a, int parts) {
  RF_SHARED(float, scratch, kRowThreads / kWarp);
  const int64_t n = blockIdx.x / parts;
  const int part = blockIdx.x % parts;
  const T* x = static_cast<const T*>(a.logits) + row_offset(a.rows, n);
  T* grad = static_cast<T*>(a.grad_logits) + row_offset(a.grad_rows, n);
  int64_t begin, end;
  slice_of(a.columns, part, parts, &begin, &end);
  if (part == parts - 1) zero_range(grad, a.columns, a.width);
  const float row_max = a.parts[2 * n], log_sum = a.parts[2 * n + 1];
  if ((a.mask && !a.mask[n]) || row_max == -kInf) {
    zero_range(grad, begin, end);
    return;
  }
  RowGradient<kCap, kEntropy> g{RowTransform(a.transform, n),
                                row_max,
                                static_cast<float>(static_cast<double>(log_sum) * kLog2e),
                                a.grad_logsumexp ? a.grad_logsumexp[n] : 0.0f,
                                kEntropy ? a.grad_entropy[n] : 0.0f,
                                kEntropy ? a.entropy[n] : 0.0f};
  if (a.k > 0) g.constant -= sum_of_target_gradients(a, n, scratch);
  const auto is_mine = [&](int64_t target) { return target >= begin && target < end; };
  for (int64_t k = threadIdx.x; k < a.k; k += kRowThreads) {
    const int64_t target = a.targets[n * a.k + k];
    if (is_mine(target)) a.at_targets[n * a.k + k] = gradient_at_target(a, n, target, x, g);
  }
  if (a.k > 0) __syncthreads();
  constexpr int kLoads = kCap ? 2 : kUnroll;  // with tanh there are no registers left for two more loads
  write_gradients<kLoads>(x, grad, begin, end, g);
  if (a.k > 0) __syncthreads();
  for (int64_t k = threadIdx.x; k < a.k; k += kRowThreads) {
    const int64_t target = a.targets[n * a.k + k];
    if (is_mine(target)) from_float(a.at_targets[n * a.k + k], grad + target);
  }
}

template <class T, bool kCap, bool kEntropy>
void launch_token_stats_backward(const TokenStatsBackwardArgs& a, int64_t rows, int parts, cudaStream_t stream) {
  const auto kernel = token_stats_backward_kernel<T, kCap, kEntropy>;
  RF_LAUNCH(kernel, rows * parts, kRowThreads, stream, a, parts);
}

inline cudaError_t token_stats_backward(Dtype dtype, const TokenStatsBackwardArgs& a, int64_t rows, int parts,
                                        cudaStream_t stream) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (bends(a.transform)) {
      a.grad_entropy ? launch_token_stats_backward<T, true, true>(a, rows, parts, stream)
                     : launch_token_stats_backward<T, true, false>(a, rows, parts, stream);
    } else {
      a.grad_entropy ? launch_token_stats_backward<T, false, true>(a, rows, parts, stream)
                     : launch_token_stats_backward<T, false, false>(a, rows, parts, stream);
    }
  });
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace rlhf_fast
