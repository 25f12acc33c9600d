// SPDX-License-Identifier: Apache-2.0
// The transform of logits before the softmax, and the online softmax over a row: the mathematics of
// cpu/logprob_kernel.h, in base 2, since the GPU's exponential is 2^x.
#pragma once

#include "reduce.cuh"
#include "vec.cuh"

namespace rlhf_fast {
namespace cuda {

#ifdef RF_SMALL_BLOCKS
constexpr int kRowThreads = 64;  // two warps test the same code as sixteen
#else
constexpr int kRowThreads = 512;
#endif
constexpr int kRowBlocks = 2;  // blocks that should fit on a multiprocessor: leaves 64 registers a thread
constexpr int kUnroll = 4;     // loads of 16 bytes in flight a thread
#ifdef RF_SMALL_BLOCKS
constexpr int kMaxCluster = 4;  // few, so that small tests have rows that need more
#else
constexpr int kMaxCluster = 8;  // the most that every GPU with clusters has
#endif

// z = u * factor, with u = x * in_scale, or cap * tanh(x * in_scale). The maximum is taken over u and subtracted before
// multiplying by factor: so a common offset of the logits loses no digits, and factor > 0 keeps the order.
struct RowTransform {
  float in_scale;
  float cap;      // 0: none
  float factor;   // nats
  float factor2;  // base 2
  float slope;    // dz/dx, without the cap's (1 - tanh^2)

  __device__ RowTransform(const LogitTransform& t, int64_t row) {
    const float temperature = t.row_temperature ? t.row_temperature[row] : t.temperature;
    cap = t.softcap;
    in_scale = cap > 0 ? t.scale / cap : (t.scale < 0 ? -1.0f : 1.0f);
    factor = (cap > 0 ? 1.0f : fabsf(t.scale)) / temperature;
    factor2 = static_cast<float>(static_cast<double>(factor) * kLog2e);
    slope = t.scale / temperature;
  }

  // kCap: with a softcap or a negative scale, which are both rare; otherwise u is x.
  template <bool kCap>
  __device__ __forceinline__ float apply(float x) const {
    if (!kCap) return x;
    const float scaled = x * in_scale;
    return cap > 0 ? cap * tanhf(scaled) : scaled;
  }

  // dz/dx at the x of this u.
  template <bool kCap>
  __device__ __forceinline__ float slope_at(float u) const {
    if (!kCap || !(cap > 0)) return slope;
    const float capped = u / cap;
    return slope * (1.0f - capped * capped);
  }
};

// Whether a row's transform needs the kernels with kCap.
inline bool bends(const LogitTransform& t) { return t.softcap > 0 || t.scale < 0; }

// Calls add(floats, column) for this thread's entries among the columns [begin, end): floats is an array of one entry,
// of one pack, or of kLoads packs at a distance of kRowThreads packs; columns increase from call to call.
template <int kLoads = kUnroll, class T, class Add>
__device__ __forceinline__ void for_each_column(const T* x, int64_t begin, int64_t end, const Add& add) {
  const Span span = span_of(x, begin, end);
  const auto one = [&](int64_t i) {
    const float value[1] = {to_float(x[i])};
    add(value, i);
  };
  if (span.begin + threadIdx.x < span.head) one(span.begin + threadIdx.x);  // a head is shorter than a pack
  const int64_t tail = span.tail + threadIdx.x;
  T last{};
  if (tail < span.end) last = x[tail];  // on its way while the packs are read
  constexpr int64_t kStride = int64_t{kRowThreads} * kPack<T>;
  int64_t i = span.head + static_cast<int64_t>(threadIdx.x) * kPack<T>;
  for (; i + (kLoads - 1) * kStride < span.tail; i += kLoads * kStride) {
    Pack<T> packs[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) packs[j] = load_pack(x + i + j * kStride);
    float floats[kLoads * kPack<T>];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) unpack(packs[j], floats + j * kPack<T>);
    add(floats, i);
  }
  Pack<T> rest[kLoads];  // of a last round that is not full: again all are loaded before the first is used
#pragma unroll
  for (int j = 0; j < kLoads - 1; ++j) {
    if (i + j * kStride < span.tail) rest[j] = load_pack(x + i + j * kStride);
  }
#pragma unroll
  for (int j = 0; j < kLoads - 1; ++j) {
    if (i + j * kStride >= span.tail) break;
    float floats[kPack<T>];
    unpack(rest[j], floats);
    add(floats, i + j * kStride);
  }
  if (tail < span.end) {
    const float value[1] = {to_float(last)};
    add(value, tail);
  }
}

// The same for a row that is aligned differently from `anchor`, a row to be written: one pack at a time, from two
// loads.
template <class T, class Add>
__device__ __forceinline__ void for_each_column_shifted(const T* x, const T* anchor, int64_t begin, int64_t end,
                                                        const Add& add) {
  const Span span = shifted_span_of(anchor, begin, end);
  const auto one = [&](int64_t i) {
    const float value[1] = {to_float(x[i])};
    add(value, i);
  };
  if (span.begin + threadIdx.x < span.head) one(span.begin + threadIdx.x);
  int64_t i = span.head + static_cast<int64_t>(threadIdx.x) * kPack<T>;
  for (; i < span.tail; i += int64_t{kRowThreads} * kPack<T>) {
    float floats[kPack<T>];
    unpack(load_any_pack(x + i), floats);
    add(floats, i);
  }
  if (span.tail + threadIdx.x < span.end) one(span.tail + threadIdx.x);
}

// The column of entry j of an array that for_each_column passed with `column`.
template <class T>
__device__ __forceinline__ int64_t column_of(int64_t column, int j) {
  return column + (j / kPack<T>)*(int64_t{kRowThreads} * kPack<T>)+j % kPack<T>;
}

// The online softmax: sums of e = 2^((u - max) factor2) over the entries so far. Full also has the sums for entropy,
// squared probabilities and argmax.
template <bool kFull>
struct Fold;

template <>
struct Fold<false> {
  float max = -kInf;
  float sum = 0;

  __device__ __forceinline__ void rescale(float rise, float decay) { sum *= decay; }
  __device__ __forceinline__ void add_term(float e, float s) { sum += e; }
  __device__ __forceinline__ void add_sums(const Fold& other) { sum += other.sum; }
};

template <>
struct Fold<true> {
  float max = -kInf;
  float sum = 0;
  float weighted = 0;  // sum of e log2 e
  float squares = 0;   // sum of e^2
  int32_t index = 0;   // lowest column where u = max; while folding, only the first column of its round

  __device__ __forceinline__ void rescale(float rise, float decay) {
    weighted = (weighted - rise * sum) * decay;
    sum *= decay;
    squares *= decay * decay;
  }
  __device__ __forceinline__ void add_term(float e, float s) {
    sum += e;
    weighted = fmaf(e, fmaxf(-150.0f, s), weighted);  // 0 * (-inf) must be 0
    squares = fmaf(e, e, squares);
  }
  __device__ __forceinline__ void add_sums(const Fold& other) {
    sum += other.sum;
    weighted += other.weighted;
    squares += other.squares;
  }
};

template <bool kFull>
__device__ __forceinline__ float safe_max(const Fold<kFull>& fold) {
  return fold.max == -kInf ? 0.0f : fold.max;
}

// Whether all entries are -inf; with a NaN the sum would be NaN.
template <bool kFull>
__device__ __forceinline__ bool is_dead(const Fold<kFull>& fold) {
  return fold.max == -kInf && fold.sum == 0;
}

// The maximum to save for the backward: NaN if the row holds a NaN, which fmaxf ignores but the sum does not.
__device__ __forceinline__ float saved_max(float max, float sum) { return sum == sum ? max : sum; }

// The sums relative to `top`, which is at least the fold's own maximum.
template <bool kFull>
__device__ __forceinline__ void raise_to(float top, float factor2, Fold<kFull>* fold) {
  if (fold->max != -kInf) {
    const float rise = fminf((top - fold->max) * factor2, 1000.0f);  // 2^-1000 is 0: an infinite rise must not make NaN
    fold->rescale(rise, exp2_fast(-rise));
  }
  fold->max = top;
}

template <class T, bool kFull, int kCount>
__device__ __forceinline__ void fold_entries(const float (&u)[kCount], int64_t column, float factor2,
                                             Fold<kFull>* fold) {
  float top = u[0];
#pragma unroll
  for (int j = 1; j < kCount; ++j) top = fmaxf(top, u[j]);  // ignores NaN, which the sums carry instead
  if (top > fold->max) {
    raise_to(top, factor2, fold);
    if constexpr (kFull) fold->index = static_cast<int32_t>(column);
  }
  const float shift = safe_max(*fold);
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    const float s = (u[j] - shift) * factor2;
    fold->add_term(exp2_fast(s), s);
  }
}

// The lowest column of [begin, end) where u = top, in every thread. While folding, a thread only notes the round of its
// maximum; threads whose maximum is the block's search that round again.
template <class T, bool kCap>
__device__ __forceinline__ int32_t first_column_of(float top, const Fold<true>& own, const T* x, int64_t end,
                                                   const RowTransform& transform, int32_t* scratch) {
  constexpr int32_t kNone = 0x7fffffff;
  int32_t lowest = kNone;
  if (own.max == top && top != -kInf) {
    for (int j = kUnroll * kPack<T> - 1; j >= 0; --j) {
      const int64_t column = column_of<T>(own.index, j);
      if (column < end && transform.apply<kCap>(to_float(x[column])) == top) lowest = static_cast<int32_t>(column);
    }
  }
  lowest = reduce_block<kRowThreads>(lowest, [](int32_t a, int32_t b) { return a < b ? a : b; }, scratch);
  return lowest == kNone ? 0 : lowest;
}

template <bool kFull>
__device__ __forceinline__ Fold<kFull> merge_folds(Fold<kFull> a, Fold<kFull> b, float factor2) {
  if constexpr (kFull) {
    if (b.max > a.max || (b.max == a.max && b.index < a.index)) a.index = b.index;
  }
  const float top = fmaxf(a.max, b.max);
  raise_to(top, factor2, &a);
  raise_to(top, factor2, &b);
  a.add_sums(b);
  return a;
}

// How many blocks share a row: the fewest that keep the GPU busy. Blocks run in waves of as many as the GPU holds, and
// free places in the last wave are wasted; so rows are divided if there are few of them, or if the last wave would be
// nearly empty. A part has at least one round of full loads.
inline int64_t parts_of_row(int64_t rows, int64_t columns, int multiprocessors, int64_t entry_size) {
  constexpr int64_t kMost = 64, kOftenEnough = 8;
  const int64_t wave = int64_t{kRowBlocks} * multiprocessors;
  const int64_t rounds = columns * entry_size / (int64_t{kRowThreads} * 16 * kUnroll);
  const int64_t few = wave / rows < kOftenEnough ? kOftenEnough : wave / rows;
  const int64_t most = rounds < few ? rounds : few;
  int64_t best = 1;
  double best_share = 0;
  for (int64_t parts = 1; parts <= kMost && (parts <= most || parts == 1); ++parts) {
    const int64_t blocks = rows * parts;
    const double share = static_cast<double>(blocks) / static_cast<double>((blocks + wave - 1) / wave * wave);
    if (share <= 1.05 * best_share) continue;  // a small gain is not worth more parts
    best = parts;
    best_share = share;
  }
  return best;
}

}  // namespace cuda
}  // namespace rlhf_fast
