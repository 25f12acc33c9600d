// SPDX-License-Identifier: Apache-2.0
// Row statistics of a softmax, and their gradient: see rlhf_fast/ops/logprob.py for the mathematics.
//
// A row is folded block by block: a block is read into a small buffer (so memory is read once), the running maximum is
// updated, and the sums so far are rescaled (online softmax). Sums over a block are in vector lanes, sums over blocks
// in double, so the error does not grow with V.
#pragma once

#include <algorithm>
#include <vector>

#include "../math.h"
#include "kernels.h"
#include "simd.h"

namespace rlhf_fast {
namespace RF_ISA {

constexpr int kUnroll = 4;               // independent accumulators hide the latency of an addition
constexpr int kStep = kUnroll * kLanes;  // a block is padded to a multiple of this
constexpr int kBlock = 1024;             // floats in the buffer: stays in L1

inline int64_t row_offset(const RowIndex& index, int64_t n) {
  int64_t offset = 0;
  for (int d = index.dims - 1; d > 0; --d) {
    offset += (n % index.sizes[d]) * index.strides[d];
    n /= index.sizes[d];
  }
  return index.dims > 0 ? offset + n * index.strides[0] : 0;
}

// z = u * factor, with u = x * in_scale, or cap * tanh(x * in_scale). The maximum is taken over u and subtracted before
// multiplying by factor: so a common offset of the logits loses no digits, and factor > 0 keeps the order.
struct RowTransform {
  float in_scale;
  float cap;  // 0: none
  float factor;
  float slope;  // dz/dx, without the cap's (1 - tanh^2)

  RowTransform(const LogitTransform& t, int64_t row) {
    const float temperature = t.row_temperature ? t.row_temperature[row] : t.temperature;
    cap = t.softcap;
    in_scale = cap > 0 ? t.scale / cap : (t.scale < 0 ? -1.0f : 1.0f);
    factor = static_cast<float>((cap > 0 ? 1.0 : std::fabs(static_cast<double>(t.scale))) / temperature);
    slope = static_cast<float>(static_cast<double>(t.scale) / temperature);
  }

  template <bool kCap>
  Vec operator()(Vec x) const {
    const Vec scaled = x * in_scale;
    return kCap ? cap * tanh(scaled) : scaled;
  }

  float scalar(float x) const {  // the same operations as in a lane, so that a target's log-prob is never above 0
    return (cap > 0 ? (*this).operator()<true>(splat(x)) : (*this).operator()<false>(splat(x)))[0];
  }
};

// Floats that need no transformation are folded in place.
inline bool stands_as_is(const float*, const RowTransform& transform) { return transform.in_scale == 1.0f; }
template <class T>
inline bool stands_as_is(const T*, const RowTransform&) {
  return false;
}
inline const float* as_floats(const float* x) { return x; }
template <class T>
inline const float* as_floats(const T*) {
  return nullptr;
}

struct Block {
  const float* u;
  int length;  // a multiple of kStep
  int count;   // number of entries of the row; the others are -inf
};

// Up to kBlock entries: in place, or transformed into `u` and padded with -inf to a multiple of kStep.
template <bool kCap, class T>
inline Block read_block(const T* x, int64_t count, const RowTransform& transform, float* u) {
  const int whole = static_cast<int>(std::min<int64_t>(count, kBlock));
  if (!kCap && whole >= kStep && stands_as_is(x, transform)) {
    const int steps = whole - whole % kStep;  // the rest of the row is a separate block
    return {as_floats(x), steps, steps};
  }
  int i = 0;
  for (; i + kLanes <= whole; i += kLanes) store(transform.operator()<kCap>(load(x + i)), u + i);
  if (i < whole) store(transform.operator()<kCap>(load_some(x + i, whole - i)), u + i);
  const int padded = (whole + kStep - 1) / kStep * kStep;
  for (i = whole; i < padded; ++i) u[i] = -kInf;
  return {u, padded, whole};
}

inline float block_max(const float* u, int length) {
  Vec best[kUnroll];
  for (auto& b : best) b = splat(-kInf);
  for (int i = 0; i < length; i += kStep)
    for (int j = 0; j < kUnroll; ++j) best[j] = max(load(u + i + j * kLanes), best[j]);  // ignores NaN entries
  return max_of(max(max(best[0], best[1]), max(best[2], best[3])));
}

struct RowFold {
  float max = -kInf;      // of u
  double sum = 0;         // sum of e = exp((u - max) factor)
  double weighted = 0;    // sum of e (u - max) factor
  double squares = 0;     // sum of e^2
  int64_t max_block = 0;  // start of the block with the (first) maximum

  // The maximum to save for the backward: NaN if the row holds a NaN, which `block_max` ignores.
  float saved_max() const { return sum == sum ? max : static_cast<float>(sum); }
  float safe_max() const { return max == -kInf ? 0.0f : max; }
  bool dead() const { return max == -kInf && sum == 0; }  // all -inf (with a NaN the sum would be NaN)
  float log_sum() const { return dead() ? 0.0f : static_cast<float>(std::log(sum)); }
  // Never below 0: the maximum itself adds 1 to the sum, and no term of `weighted` is above 0.
  float entropy() const { return dead() ? 0.0f : static_cast<float>(std::log(sum) - weighted / sum); }

  // Updates the maximum with that of the block at `start` and rescales the sums so far. Returns by how much the maximum
  // rose, in units of the exponent.
  double raise(float top, float factor, int64_t start) {
    if (!(top > max)) return 0;
    const double rise = max == -kInf ? 0.0 : (static_cast<double>(top) - max) * factor, decay = std::exp(-rise);
    weighted = (weighted - rise * sum) * decay;
    sum *= decay;
    squares *= decay * decay;
    max = top;
    max_block = start;
    return rise;
  }
};

// `next` is read after this block, so it is prefetched while the exponentials are computed.
template <bool kEntropy, bool kSquares, class T>
inline void fold_block(const float* u, int length, float factor, const T* next, RowFold* fold) {
  const float shift = fold->safe_max();
  Vec sum[kUnroll] = {}, weighted[kUnroll] = {}, squares[kUnroll] = {};
  for (int i = 0; i < length; i += kStep) {
    for (int j = 0; j < kUnroll; ++j) {
      __builtin_prefetch(next + i + j * kLanes);
      const Vec s = (load(u + i + j * kLanes) - shift) * factor;
      const Vec e = exp(s);
      sum[j] += e;
      if (kEntropy) weighted[j] = fma(e, max(splat(-104.0f), s), weighted[j]);  // 0 * (-inf) must be 0
      if (kSquares) squares[j] = fma(e, e, squares[j]);
    }
  }
  fold->sum += sum_of((sum[0] + sum[1]) + (sum[2] + sum[3]));
  if (kEntropy) fold->weighted += sum_of((weighted[0] + weighted[1]) + (weighted[2] + weighted[3]));
  if (kSquares) fold->squares += sum_of((squares[0] + squares[1]) + (squares[2] + squares[3]));
}

template <bool kCap, bool kEntropy, bool kSquares, class T>
inline RowFold fold_row(const T* x, int64_t columns, const RowTransform& transform) {
  RowFold fold;
  alignas(64) float u[kBlock];
  for (int64_t start = 0; start < columns;) {
    const Block block = read_block<kCap>(x + start, columns - start, transform, u);
    fold.raise(block_max(block.u, block.length), transform.factor, start);
    start += block.count;
    fold_block<kEntropy, kSquares>(block.u, block.length, transform.factor, x + start, &fold);
  }
  return fold;
}

template <bool kCap, class T>
inline RowFold fold_row(const T* x, int64_t columns, const RowTransform& transform, bool entropy, bool squares) {
  if (entropy) {
    return squares ? fold_row<kCap, true, true>(x, columns, transform)
                   : fold_row<kCap, true, false>(x, columns, transform);
  }
  return squares ? fold_row<kCap, false, true>(x, columns, transform)
                 : fold_row<kCap, false, false>(x, columns, transform);
}

template <class T>
inline RowFold fold_row(const T* x, int64_t columns, const RowTransform& transform, bool entropy, bool squares) {
  return transform.cap > 0 ? fold_row<true>(x, columns, transform, entropy, squares)
                           : fold_row<false>(x, columns, transform, entropy, squares);
}

template <class T>
inline int64_t first_max(const T* x, int64_t columns, const RowTransform& transform, const RowFold& fold) {
  const int64_t end = std::min<int64_t>(columns, fold.max_block + kBlock);
  for (int64_t j = fold.max_block; j < end; ++j) {
    if (transform.scalar(to_float(x[j])) == fold.max) return j;
  }
  return 0;  // only where a row has a NaN: which index it then gives is undefined
}

// ------------------------------------------------------------------------------------------- forward

inline void write_masked_row(const TokenStatsArgs& a, int64_t n) {
  if (a.logprobs) std::fill_n(a.logprobs + n * a.k, a.k, 0.0f);
  if (a.entropy) a.entropy[n] = 0;
  if (a.logsumexp) a.logsumexp[n] = 0;
  if (a.sum_sq_probs) a.sum_sq_probs[n] = 0;
  if (a.argmax) a.argmax[n] = 0;
  a.parts[2 * n] = a.parts[2 * n + 1] = 0;
}

template <class T>
void token_stats(const TokenStatsArgs& a, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    if (a.mask && !a.mask[n]) {
      write_masked_row(a, n);
      continue;
    }
    const T* x = static_cast<const T*>(a.logits) + row_offset(a.rows, n);
    const RowTransform transform(a.transform, n);
    const RowFold fold = fold_row(x, a.columns, transform, a.entropy, a.sum_sq_probs);
    const float log_sum = fold.log_sum();
    a.parts[2 * n] = fold.saved_max();
    a.parts[2 * n + 1] = log_sum;
    for (int64_t k = 0; a.logprobs && k < a.k; ++k) {
      const int64_t target = a.targets[n * a.k + k];
      a.logprobs[n * a.k + k] =
          target < 0 || target >= a.columns
              ? __builtin_nanf("")
              : (transform.scalar(to_float(x[target])) - fold.safe_max()) * transform.factor - log_sum;
    }
    if (a.entropy) a.entropy[n] = fold.entropy();
    if (a.logsumexp) a.logsumexp[n] = fold.max * transform.factor + log_sum;
    if (a.sum_sq_probs)
      a.sum_sq_probs[n] = fold.dead() ? 0.0f : static_cast<float>(fold.squares / (fold.sum * fold.sum));
    if (a.argmax) a.argmax[n] = first_max(x, a.columns, transform, fold);
  }
}

// ------------------------------------------------------------------------------------------- backward

// dz = p (g_logsumexp - sum g_logprobs - g_entropy (log p + entropy)), and dx = dz dz/dx; g_logprobs at targets is
// added after.
struct RowGradient {
  float shift;  // the row's max
  float log_sum;
  float constant;  // g_logsumexp - sum g_logprobs
  float grad_entropy;
  float entropy;

  template <bool kCap>
  Vec dz(Vec x, const RowTransform& t, Vec* slope) const {
    const Vec u = t.operator()<kCap>(x);
    const Vec logp = (u - shift) * t.factor - log_sum;
    const Vec p = exp(logp);
    *slope = splat(t.slope);
    if (kCap) {
      const Vec capped = u / t.cap;
      *slope *= 1.0f - capped * capped;
    }
    const Vec result = p * (constant - grad_entropy * (logp + entropy));
    return p == 0.0f ? Vec{} : result;  // 0 * (-inf) must be 0
  }

  float at(float x, float extra, const RowTransform& t) const {  // one entry, with a target's gradient
    Vec slope;
    const Vec dz_all = t.cap > 0 ? dz<true>(splat(x), t, &slope) : dz<false>(splat(x), t, &slope);
    return (dz_all[0] + extra) * slope[0];
  }
};

template <bool kCap, class T>
inline void write_gradient_row(const T* x, T* grad, int64_t columns, const RowTransform& t, const RowGradient& g) {
  Vec slope;
  int64_t i = 0;
  for (; i + kLanes <= columns; i += kLanes) {
    const Vec dz = g.dz<kCap>(load(x + i), t, &slope);
    store(dz * slope, grad + i);
  }
  if (i < columns) {
    const Vec dz = g.dz<kCap>(load_some(x + i, columns - i), t, &slope);
    store_some(dz * slope, columns - i, grad + i);
  }
}

template <class T>
inline void zero_row(T* grad, int64_t width) {
  std::fill_n(grad, width, T{});
}

template <class T>
void token_stats_backward(const TokenStatsBackwardArgs& a, int64_t begin, int64_t end) {
  std::vector<float> at_targets(static_cast<size_t>(a.k));
  for (int64_t n = begin; n < end; ++n) {
    const T* x = static_cast<const T*>(a.logits) + row_offset(a.rows, n);
    T* grad = static_cast<T*>(a.grad_logits) + row_offset(a.grad_rows, n);
    if ((a.mask && !a.mask[n]) || a.parts[2 * n] == -kInf) {
      zero_row(grad, a.width);
      continue;
    }
    const RowTransform transform(a.transform, n);
    RowGradient g{a.parts[2 * n], a.parts[2 * n + 1], a.grad_logsumexp ? a.grad_logsumexp[n] : 0.0f,
                  a.grad_entropy ? a.grad_entropy[n] : 0.0f, a.entropy ? a.entropy[n] : 0.0f};
    const int64_t* targets = a.targets + n * a.k;
    const float* grad_logprobs = a.grad_logprobs ? a.grad_logprobs + n * a.k : nullptr;
    for (int64_t k = 0; grad_logprobs && k < a.k; ++k) {
      const bool valid = targets[k] >= 0 && targets[k] < a.columns;
      g.constant -= valid ? grad_logprobs[k] : __builtin_nanf("");
    }
    // Entries at targets are computed before the pass, which may overwrite x; equal targets of a row are summed.
    for (int64_t k = 0; grad_logprobs && k < a.k; ++k) {
      if (targets[k] < 0 || targets[k] >= a.columns) continue;
      float total = 0;
      for (int64_t other = 0; other < a.k; ++other) total += targets[other] == targets[k] ? grad_logprobs[other] : 0.0f;
      at_targets[k] = g.at(to_float(x[targets[k]]), total, transform);
    }
    if (transform.cap > 0) {
      write_gradient_row<true>(x, grad, a.columns, transform, g);
    } else {
      write_gradient_row<false>(x, grad, a.columns, transform, g);
    }
    for (int64_t k = 0; grad_logprobs && k < a.k; ++k) {
      if (targets[k] >= 0 && targets[k] < a.columns) from_float(at_targets[k], grad + targets[k]);
    }
    zero_row(grad + a.columns, a.width - a.columns);
  }
}

}  // namespace RF_ISA
}  // namespace rlhf_fast
