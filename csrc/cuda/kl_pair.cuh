// SPDX-License-Identifier: Apache-2.0
// Two rows of logits side by side: a pass over both at once, and the online fold that gives KL(p, q) in one read.
#pragma once

#include "softmax.cuh"

namespace rlhf_fast {
namespace cuda {

// Distance from one pack of a thread to its next.
template <class T>
constexpr int64_t kPairStride = int64_t{kRowThreads} * kPack<T>;

template <int kCount>
struct Count {
  static constexpr int value = kCount;
};

// Calls add(values, others, column) for what this thread has of the columns [begin, end) of x and y: arrays of a pack's
// floats, or of one. kLoads packs of each row are loaded before the first is used. Packs begin at the 16-byte
// boundaries of `anchor`, which may be a row that is written. If x or y is aligned differently, its packs are put
// together from two loads; without kShifts, which takes registers, such rows go entry by entry. kLast: no later read.
template <int kLoads, bool kShifts, bool kLast, class T, class Add>
__device__ __forceinline__ void for_each_pair(const T* x, const T* y, const T* anchor, int64_t begin, int64_t end,
                                              const Add& add) {
  const bool together = same_phase(x, y) && same_phase(x, anchor);
  Span span = together ? span_of(x, begin, end) : shifted_span_of(anchor, begin, end);
  if (!kShifts && !together) span.head = span.tail = end;
  const auto one = [&](int64_t i) {
    const float value[1] = {to_float(x[i])}, other[1] = {to_float(y[i])};
    add(value, other, i);
  };
  const auto some = [&](int64_t i, auto count) {
    Pack<T> packs[count.value], other_packs[count.value];
#pragma unroll
    for (int j = 0; j < count.value; ++j) {
      packs[j] = load_pack<kLast>(x + i + j * kPairStride<T>);
      other_packs[j] = load_pack<kLast>(y + i + j * kPairStride<T>);
    }
#pragma unroll
    for (int j = 0; j < count.value; ++j) {
      float values[kPack<T>], others[kPack<T>];
      unpack(packs[j], values);
      unpack(other_packs[j], others);
      add(values, others, i + j * kPairStride<T>);
    }
  };
  for (int64_t i = span.begin + threadIdx.x; i < span.head; i += kRowThreads) one(i);
  int64_t i = span.head + static_cast<int64_t>(threadIdx.x) * kPack<T>;
  for (; kShifts && !together && i < span.tail; i += kPairStride<T>) {
    float values[kPack<T>], others[kPack<T>];
    unpack(load_any_pack(x + i), values);
    if constexpr (kLoads == 1) keep_loads_apart();
    unpack(load_any_pack(y + i), others);
    add(values, others, i);
  }
  for (; i + (kLoads - 1) * kPairStride<T> < span.tail; i += kLoads * kPairStride<T>) some(i, Count<kLoads>());
  for (; kLoads > 1 && i < span.tail; i += kPairStride<T>) some(i, Count<1>());
  if (span.tail + threadIdx.x < span.end) one(span.tail + threadIdx.x);
}

// Writes results for the entries that for_each_pair, anchored at this row, passed with `column`.
template <class T, int kCount>
__device__ __forceinline__ void store_entries(const float (&values)[kCount], int64_t column, T* row) {
  if constexpr (kCount > 1) {
    store_16_bytes_for_later(bit_cast<uint4>(pack_of<T>(values)), row + column);
  } else {
    from_float(values[0], row + column);
  }
}

// A log-probability below this is treated as -inf, such as one masked with the dtype's lowest number, so that no sum
// overflows.
constexpr float kLowest = -1e30f;

// For the row that weights the sum, u, and the other, v, with a = (u - max) factor and b = (v - other_max) other_factor
// in base 2, p = 2^a / sum 2^a and q = 2^b / sum 2^b:
//   KL(p, q) = ln 2 (sum 2^a (a - b)) / (sum 2^a) + log(sum 2^b / sum 2^a).
// Entries with q = 0 make it +inf. They are summed separately, since the gradient uses a finite value for their log q.
struct PairFold {
  float max = -kInf;
  float other_max = -kInf;
  float covered = 0;    // sum of 2^a where q > 0
  float forbidden = 0;  // sum of 2^a where q = 0
  float other_sum = 0;  // sum of 2^b
  float cross = 0;      // sum of 2^a (a - b), with b = 0 where q = 0
};

// The sums relative to `top` and `other_top`, which are at least the fold's own maxima. The limits avoid NaN from an
// infinite difference: 2^-1000 is 0, and so is 0 times -kLowest.
__device__ __forceinline__ void raise_to(float top, float other_top, float factor, float other_factor, PairFold* fold) {
  if (fold->max != -kInf) {
    const float rise = fminf((top - fold->max) * factor, 1000.0f), decay = exp2_fast(-rise);
    fold->cross = (fold->cross - rise * (fold->covered + fold->forbidden)) * decay;
    fold->covered *= decay;
    fold->forbidden *= decay;
  }
  if (fold->other_max != -kInf) {
    const float rise = fminf((other_top - fold->other_max) * other_factor, -kLowest);
    fold->cross += rise * fold->covered;
    fold->other_sum *= exp2_fast(-rise);
  }
  fold->max = top;
  fold->other_max = other_top;
}

template <int kCount>
__device__ __forceinline__ void fold_entries(const float (&u)[kCount], const float (&v)[kCount], float factor,
                                             float other_factor, PairFold* fold) {
  float top = fold->max, other_top = fold->other_max;
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    top = fmaxf(top, u[j]);  // ignores NaN, which the sums carry instead
    other_top = fmaxf(other_top, v[j]);
  }
  if (top > fold->max || other_top > fold->other_max) raise_to(top, other_top, factor, other_factor, fold);
  const float shift = top == -kInf ? 0.0f : top, other_shift = other_top == -kInf ? 0.0f : other_top;
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    const float a = (u[j] - shift) * factor, b = (v[j] - other_shift) * other_factor, e = exp2_fast(a);
    const bool forbidden = b < kLowest;
    if (forbidden) {
      fold->forbidden += e;
    } else {
      fold->covered += e;
    }
    fold->other_sum += exp2_fast(b);
    fold->cross = fmaf(e, fmaxf(a, -150.0f) - (forbidden ? 0.0f : b),
                       fold->cross);  // 0 * (-inf) must be 0
  }
}

__device__ __forceinline__ PairFold merge_folds(PairFold a, PairFold b, float factor, float other_factor) {
  const float top = fmaxf(a.max, b.max), other_top = fmaxf(a.other_max, b.other_max);
  raise_to(top, other_top, factor, other_factor, &a);
  raise_to(top, other_top, factor, other_factor, &b);
  a.covered += b.covered;
  a.forbidden += b.forbidden;
  a.other_sum += b.other_sum;
  a.cross += b.cross;
  return a;
}

}  // namespace cuda
}  // namespace rlhf_fast
