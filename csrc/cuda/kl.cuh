// SPDX-License-Identifier: Apache-2.0
// Exact KL divergence of two rows of logits, and its gradient, on a GPU: see rlhf_fast/ops/kl.py for the mathematics.
//
// reverse and forward read both rows once, in the same kernel: forward is reverse with the sides exchanged, so p below
// is the distribution that weights the sum, in forward the reference's. jsd and tv need normalised probabilities, so
// they read the rows twice; a gradient reads them once more. To keep the rows in the L2 cache for later reads, a row
// may be shared by a cluster of blocks (sm_90 and later), so that fewer rows are in flight. If there are few, long
// rows, many blocks share each, with one launch per step.
#pragma once

#include <utility>

#include "kl_pair.cuh"

namespace rlhf_fast {
namespace cuda {

// The steps of a launch, in this order. Within a launch, steps pass a row's values on in registers, or between the
// blocks of a cluster; otherwise the next launch reads them from `partial`, or from `parts` of the forward.
enum Step : int { kFoldStep = 1, kMeansStep = 2, kFinishStep = 4, kGradientStep = 8 };

// Sums over a row, of the second read.
struct KlMeans {
  float p = 0;         // sum p s_p: the gradient is p (s_p - sum p s_p)
  float q = 0;         // sum q s_q
  float distance = 0;  // tv only: sum |p - q| / 2
};

// One block's result for its part of a row.
struct KlPartial {
  PairFold fold;
  KlMeans means;
};

// A row's values in TokenKlArgs::parts, p's side first.
struct KlStats {
  float max_p, log_sum_p, max_q, log_sum_q, mean_p, mean_q;
};

// Block b computes part b % parts of row b / parts.
template <class T>
struct RowPair {
  int64_t n;
  int part;
  int64_t begin, end;  // the part's columns
  bool last;           // the part that ends the row
  const T* x;
  const T* y;

  __device__ RowPair(const TokenKlArgs& a, int parts)
      : n(blockIdx.x / parts),
        part(blockIdx.x % parts),
        last(part == parts - 1),
        x(static_cast<const T*>(a.logits) + row_offset(a.rows, n)),
        y(static_cast<const T*>(a.ref_logits) + row_offset(a.ref_rows, n)) {
    slice_of(a.columns, part, parts, &begin, &end);
  }
};

// Log-probabilities, in base 2, of a side whose maximum and log-sum are known.
template <bool kCap>
struct Side {
  RowTransform transform;
  float shift;
  float log_sum2;

  __device__ Side(const LogitTransform& t, int64_t row, float max, float log_sum)
      : transform(t, row),
        shift(max == -kInf ? 0.0f : max),
        log_sum2(static_cast<float>(static_cast<double>(log_sum) * kLog2e)) {}

  __device__ __forceinline__ float transformed(float x) const { return transform.apply<kCap>(x); }
  __device__ __forceinline__ float logprob(float u) const { return (u - shift) * transform.factor2 - log_sum2; }
  __device__ __forceinline__ float slope_at(float u) const { return transform.slope_at<kCap>(u); }
};

// The two probabilities of an entry, and the kind's terms in them, in nats.
struct KlTerms {
  float p, q;
  float slope_p, slope_q;
  float distance;  // tv only
};

template <int kKind>
__device__ __forceinline__ KlTerms kl_terms(float logp, float logq, float beta) {
  KlTerms t{exp2_fast(logp), exp2_fast(logq), 0, 0, 0};
  if constexpr (kKind == kReverse) {
    constexpr float kFloor = static_cast<float>(kLogFloor * kLog2e);
    t.slope_p = t.p == 0 ? 0.0f : kLn2 * (logp - (logq < kLowest ? kFloor : logq));
  } else if constexpr (kKind == kJsd) {
    const float logm = log2f((1 - beta) * t.p + beta * t.q);
    t.slope_p = t.p == 0 ? 0.0f : kLn2 * (1 - beta) * (logp - logm);
    t.slope_q = t.q == 0 ? 0.0f : kLn2 * beta * (logq - logm);
  } else {
    const float d = t.p - t.q;
    t.slope_p = d > 0 ? 0.5f : (d < 0 ? -0.5f : 0.0f * d);  // NaN stays NaN
    t.slope_q = -t.slope_p;
    t.distance = d * t.slope_p;
  }
  return t;
}

// ------------------------------------------------------------------------------------------- the steps

// The result of a step for a whole row, merged from those of its blocks if it has several. Not valid if the next step
// is in another launch.
template <int kStep, class V, class Make, class Merge>
__device__ __forceinline__ V value_of_row(int steps, int parts, KlPartial* partial, V KlPartial::* field, V* scratch,
                                          const Make& make, const Merge& merge) {
  if (steps & kStep) {
    const V mine = reduce_block<kRowThreads>(make(), merge, scratch);
    if (parts == 1) return mine;
    if (threadIdx.x == 0) partial[blockIdx.x].*field = mine;
    if (steps == kStep) return mine;
    cluster_barrier();
  }
  const KlPartial* of_row = partial + blockIdx.x / parts * static_cast<int64_t>(parts);
  V value{};
  for (int part = threadIdx.x % kWarp; part < parts; part += kWarp) value = merge(value, of_row[part].*field);
  return broadcast_warp(reduce_warp(value, merge));
}

// 16-byte loads in flight per thread and row; with tanh and log2 there are no registers left for a second one.
template <bool kCap, int kKind = kReverse>
constexpr int kLoads = kCap || kKind == kJsd ? 1 : 2;
// Both together leave none for shifted loads either, on sm_100: see for_each_pair, and docs/codegen.md.
template <bool kCap, int kKind>
constexpr bool kShifts = !(kCap && kKind == kJsd);

template <class T, bool kCap, int kKind>
__device__ __forceinline__ PairFold fold_rows(const RowPair<T>& row, const RowTransform& p, const RowTransform& q) {
  PairFold fold;
  for_each_pair<kLoads<kCap>, kShifts<kCap, kKind>, false>(row.x, row.y, row.x, row.begin, row.end,
                                                           [&](const auto& x, const auto& y, int64_t) {
                                                             constexpr int kCount = sizeof(x) / sizeof(float);
                                                             float u[kCount], v[kCount];
#pragma unroll
                                                             for (int j = 0; j < kCount; ++j) {
                                                               u[j] = p.apply<kCap>(x[j]);
                                                               v[j] = q.apply<kCap>(y[j]);
                                                             }
                                                             fold_entries(u, v, p.factor2, q.factor2, &fold);
                                                           });
  return fold;
}

template <class T, bool kCap, int kKind>
__device__ __forceinline__ KlMeans sum_means(const TokenKlArgs& a, const RowPair<T>& row, const KlStats& stats) {
  const Side<kCap> p(a.transform, row.n, stats.max_p, stats.log_sum_p);
  const Side<kCap> q(a.ref_transform, row.n, stats.max_q, stats.log_sum_q);
  KlMeans means;
  for_each_pair<kLoads<kCap, kKind>, kShifts<kCap, kKind>, false>(
      row.x, row.y, row.x, row.begin, row.end, [&](const auto& x, const auto& y, int64_t) {
#pragma unroll
        for (int j = 0; j < static_cast<int>(sizeof(x) / sizeof(float)); ++j) {
          const KlTerms t = kl_terms<kKind>(p.logprob(p.transformed(x[j])), q.logprob(q.transformed(y[j])), a.beta);
          means.p = fmaf(t.p, t.slope_p, means.p);
          means.q = fmaf(t.q, t.slope_q, means.q);
          means.distance += t.distance;
        }
      });
  return means;
}

// mean_p is the divergence, with kLogFloor as log q where q = 0.
__device__ __forceinline__ KlStats stats_of(const PairFold& fold) {
  const float sum = fold.covered + fold.forbidden;
  const bool no_p = fold.max == -kInf && sum == 0, no_q = fold.other_max == -kInf && fold.other_sum == 0;
  const float sum_p = no_p ? 1.0f : sum, sum_q = no_q ? 1.0f : fold.other_sum, log_sum_q = logf(sum_q);
  const float mean =
      kLn2 * (fold.cross / sum_p) + logf(sum_q / sum_p) - fold.forbidden / sum_p * (log_sum_q + kLogFloor);
  const float value = no_p ? 0.0f * fold.other_sum : mean;  // 0 without p, but NaN if q holds a NaN
  return {saved_max(fold.max, sum), logf(sum_p), saved_max(fold.other_max, fold.other_sum), log_sum_q, value, 0.0f};
}

// Positions of the two sides in `parts`.
__device__ __forceinline__ int side_p(const TokenKlArgs& a) { return a.kind == kForward ? 1 : 0; }

__device__ __forceinline__ void write_stats(const TokenKlArgs& a, int64_t n, const KlStats& stats, float kl) {
  float* parts = a.parts + 6 * n;
  const int p = side_p(a), q = 1 - p;
  a.kl[n] = kl;
  parts[2 * p] = stats.max_p;
  parts[2 * p + 1] = stats.log_sum_p;
  parts[2 * q] = stats.max_q;
  parts[2 * q + 1] = stats.log_sum_q;
  parts[4 + p] = stats.mean_p;
  parts[4 + q] = stats.mean_q;
}

__device__ __forceinline__ KlStats read_stats(const TokenKlArgs& a, int64_t n) {
  const float* parts = a.parts + 6 * n;
  const int p = side_p(a), q = 1 - p;
  return {parts[2 * p], parts[2 * p + 1], parts[2 * q], parts[2 * q + 1], parts[4 + p], parts[4 + q]};
}

// The gradient of p's side, or with kOfQ of q's; zeros for a row `without` one.
template <class T, bool kCap, int kKind, bool kOfQ>
__device__ __forceinline__ void write_gradient(const TokenKlArgs& a, const RowPair<T>& row, const KlStats& stats,
                                               bool without) {
  T* to = static_cast<T*>(kOfQ ? a.grad_ref_logits : a.grad_logits) + row.n * a.width;
  if (row.last) zero_range(to, a.columns, a.width);
  if (without) return zero_range(to, row.begin, row.end);
  const Side<kCap> p(a.transform, row.n, stats.max_p, stats.log_sum_p);
  const Side<kCap> q(a.ref_transform, row.n, stats.max_q, stats.log_sum_q);
  const float grad_kl = a.grad_kl[row.n];
  for_each_pair<kLoads<kCap, kKind>, kShifts<kCap, kKind>, true>(
      row.x, row.y, static_cast<const T*>(to), row.begin, row.end, [&](const auto& x, const auto& y, int64_t column) {
        constexpr int kCount = sizeof(x) / sizeof(float);
        float gradient[kCount];
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          const float u = p.transformed(x[j]), v = q.transformed(y[j]);
          const KlTerms t = kl_terms<kKind>(p.logprob(u), q.logprob(v), a.beta);
          const float dp = t.p * (t.slope_p - stats.mean_p);
          const float dq = kKind == kReverse ? t.q - t.p : t.q * (t.slope_q - stats.mean_q);
          gradient[j] = kOfQ ? dq * (grad_kl * q.slope_at(v)) : dp * (grad_kl * p.slope_at(u));
        }
        store_entries(gradient, column, to);
      });
}

// ------------------------------------------------------------------------------------------- the kernel

template <class T, bool kCap, int kKind>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    token_kl_kernel(const __grid_constant__ TokenKlArgs a, int parts, int steps, KlPartial* partial) {
  RF_SHARED(PairFold, folds, kRowThreads / kWarp);
  RF_SHARED(KlMeans, sums, kRowThreads / kWarp);
  const RowPair<T> row(a, parts);
  const bool masked = a.mask && !a.mask[row.n], writes = row.part == 0 && threadIdx.x == 0;
  KlStats stats{-kInf, 0, -kInf,
                0,     0, 0};  // of a row without probability, which has no gradient; no more has a masked one
  if (masked) {
    if (steps & kFinishStep && writes) write_stats(a, row.n, KlStats{}, 0);
  } else if (steps == kGradientStep) {
    stats = read_stats(a, row.n);
  } else {
    const RowTransform p(a.transform, row.n), q(a.ref_transform, row.n);
    const PairFold fold = value_of_row<kFoldStep>(
        steps, parts, partial, &KlPartial::fold, folds, [&] { return fold_rows<T, kCap, kKind>(row, p, q); },
        [&](const PairFold& f, const PairFold& g) { return merge_folds(f, g, p.factor2, q.factor2); });
    if (steps == kFoldStep) return;
    stats = stats_of(fold);
    float kl = fold.forbidden > 0 && stats.mean_p == stats.mean_p ? kInf : stats.mean_p;
    if constexpr (kKind != kReverse) {
      const KlMeans means = value_of_row<kMeansStep>(
          steps, parts, partial, &KlPartial::means, sums, [&] { return sum_means<T, kCap, kKind>(a, row, stats); },
          [](const KlMeans& f, const KlMeans& g) { return KlMeans{f.p + g.p, f.q + g.q, f.distance + g.distance}; });
      if (steps == kMeansStep) return;
      stats.mean_p = means.p;
      stats.mean_q = means.q;
      kl = kKind == kTv ? means.distance : means.p + means.q;
    }
    if (writes) write_stats(a, row.n, stats, kl);
  }
  if (!(steps & kGradientStep)) return;
  if (a.grad_logits) {
    write_gradient<T, kCap, kKind, false>(a, row, stats, stats.max_p == -kInf);
  } else {
    write_gradient<T, kCap, kKind, true>(a, row, stats, stats.max_q == -kInf);
  }
}

// ------------------------------------------------------------------------------------------- launchers

// How rows are divided: `parts` blocks a row; with `clusters` they form one cluster, and one launch does all steps.
struct RowSplit {
  int parts;
  bool clusters;
};

// From the parts that fill the GPU. Where the rows are read again, parts double until the rows in flight, which with
// one part and what is written of them are `bytes`, take half of the L2 cache; later reads should then find them there.
inline RowSplit split_rows(int parts, int64_t rows, int64_t bytes, bool read_again, int device) {
  if (parts == 1 && !read_again) return {1, false};
  const int64_t cache = cluster_cache(token_kl_kernel<float, false, kReverse>, device);
  if (cache == 0 || parts > kMaxCluster) return {parts, false};
  int size = 1;  // a power of two: other cluster sizes do not fill the groups of multiprocessors that they run in
  while (2 * size <= parts) size *= 2;
  while (read_again && 2 * size <= kMaxCluster && bytes / size > cache / 2 && rows < (1 << 24)) size *= 2;
  return {size, size > 1};
}

template <class T, bool kCap, int kKind>
void launch_token_kl(const TokenKlArgs& a, int64_t rows, RowSplit split, int steps, KlPartial* partial,
                     cudaStream_t stream) {
  const auto kernel = token_kl_kernel<T, kCap, kKind>;
  const int64_t blocks = rows * split.parts;
  const auto launch = [&](int now) { RF_LAUNCH(kernel, blocks, kRowThreads, stream, a, split.parts, now, partial); };
  if (split.parts == 1 || steps == kGradientStep) {
    launch(steps);
  } else if (split.clusters && clusters_fit(kernel, kRowThreads, split.parts)) {
    launch_clusters(kernel, blocks, kRowThreads, split.parts, stream, a, split.parts, steps, partial);
  } else {
    launch(kFoldStep);
    if (kKind != kReverse) launch(kMeansStep);
    launch(steps & (kFinishStep | kGradientStep));
  }
}

template <class T, bool kCap>
void launch_token_kl(const TokenKlArgs& a, int64_t rows, RowSplit split, int steps, KlPartial* partial,
                     cudaStream_t stream) {
  switch (a.kind) {
    case kJsd: return launch_token_kl<T, kCap, kJsd>(a, rows, split, steps, partial, stream);
    case kTv: return launch_token_kl<T, kCap, kTv>(a, rows, split, steps, partial, stream);
    default: return launch_token_kl<T, kCap, kReverse>(a, rows, split, steps, partial, stream);
  }
}

// `partial` has rows * parts KlPartials; not used with one part, or for the gradient alone.
inline cudaError_t token_kl(Dtype dtype, TokenKlArgs a, int64_t rows, RowSplit split, int steps, void* partial,
                            cudaStream_t stream) {
  if (a.kind == kForward) {
    std::swap(a.logits, a.ref_logits);
    std::swap(a.rows, a.ref_rows);
    std::swap(a.transform, a.ref_transform);
    std::swap(a.grad_logits, a.grad_ref_logits);
  }
  const auto launch = [&](const TokenKlArgs& args) {
    with_dtype(dtype, [&](auto zero) {
      using T = decltype(zero);
      KlPartial* partials = static_cast<KlPartial*>(partial);
      bends(args.transform) ? launch_token_kl<T, true>(args, rows, split, steps, partials, stream)
                            : launch_token_kl<T, false>(args, rows, split, steps, partials, stream);
    });
  };
  if (a.grad_logits && a.grad_ref_logits) {  // backward only; a launch writes one side
    TokenKlArgs other = a;
    other.grad_logits = nullptr;
    a.grad_ref_logits = nullptr;
    launch(other);
  }
  launch(a);
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace rlhf_fast
