// SPDX-License-Identifier: Apache-2.0
// Attention of one new token per row over the cached keys and values: see rlhf_fast/ops/decode_attention.py.
//
// Up to four heads that share a key head are computed together, so that the cache, which is most of the memory traffic,
// is read once for every four of them. Scores, weights and sums are float32, and the cache is read in place, whatever
// its strides.
#pragma once

#include <algorithm>
#include <vector>

#include "decode_attention_args.h"
#include "simd.h"

namespace rlhf_fast {
namespace RF_ISA {

constexpr int kHeadsAtOnce = 4;  // accumulators of a key's scores, and of a slice's outputs, stay in registers
constexpr int kSlice = 4;        // vectors of a value that are accumulated at once

template <int kHalf = kLanes / 2>
inline float lanes_sum(Vec v) {
  v = v + shift_down<kHalf>(v, v);
  if constexpr (kHalf > 1) return lanes_sum<kHalf / 2>(v);
  return v[0];
}

// scores[h * length + j] = query h . key j, of `kHeads` heads with queries of `padded` floats, the last ones 0.
template <int kHeads, class T>
inline void score(const T* keys, int64_t stride, const bool* mask, int64_t length, const float* queries, int64_t size,
                  int64_t padded, float* scores) {
  for (int64_t j = 0; j < length; ++j) {
    if (mask && !mask[j]) {
      for (int h = 0; h < kHeads; ++h) scores[h * length + j] = -kInf;
      continue;
    }
    Vec sums[kHeads] = {};
    for (int64_t d = 0; d < size; d += kLanes) {
      const Vec key = load_some(keys + j * stride + d, size - d);
      for (int h = 0; h < kHeads; ++h) sums[h] = fma(load(queries + h * padded + d), key, sums[h]);
    }
    for (int h = 0; h < kHeads; ++h) scores[h * length + j] = lanes_sum(sums[h]);
  }
}

// Scores become weights exp(score - largest); the result is 1 / their sum, or 0 where all keys are masked. A later
// score takes the place of a NaN in `max`, so `top` may be -inf though not all are masked, and then the result is NaN.
inline float weigh(float* scores, int64_t length) {
  Vec largest = splat(-kInf);
  for (int64_t j = 0; j < length; j += kLanes) largest = max(largest, load_some(scores + j, length - j, -kInf));
  const float top = max_of(largest);
  if (top == -kInf && std::none_of(scores, scores + length, [](float score) { return score != score; })) {
    std::fill(scores, scores + length, 0.0f);
    return 0.0f;
  }
  Vec sums{};
  for (int64_t j = 0; j < length; j += kLanes) {
    const Vec weights = exp(load_some(scores + j, length - j, -kInf) - top);
    store_some(weights, length - j, scores + j);
    sums += weights;
  }
  return 1.0f / lanes_sum(sums);
}

// Columns [0, count) of the weighted sum of the values, for `kHeads` heads; count <= kVectors * kLanes.
template <int kHeads, int kVectors, class T>
inline void gather_values(const T* values, int64_t stride, const bool* mask, int64_t length, const float* weights,
                          const float* factors, int64_t count, T* output, int64_t output_stride) {
  Vec sums[kHeads][kVectors] = {};
  for (int64_t j = 0; j < length; ++j) {
    if (mask && !mask[j]) continue;
    Vec value[kVectors];
    for (int v = 0; v < kVectors; ++v) value[v] = load_some(values + j * stride + v * kLanes, count - v * kLanes);
    for (int h = 0; h < kHeads; ++h) {
      const Vec weight = splat(weights[h * length + j]);
      for (int v = 0; v < kVectors; ++v) sums[h][v] = fma(weight, value[v], sums[h][v]);
    }
  }
  for (int h = 0; h < kHeads; ++h) {
    for (int v = 0; v < kVectors; ++v) {
      store_some(sums[h][v] * factors[h], count - v * kLanes, output + h * output_stride + v * kLanes);
    }
  }
}

// One key head of one row, for `kHeads` of the query heads that share it.
template <int kHeads, class T>
inline void attend_heads(const DecodeAttentionArgs& args, const T* query, const T* keys, const T* values,
                         const bool* mask, float* scratch, T* output) {
  const int64_t padded = (args.size + kLanes - 1) / kLanes * kLanes;
  float* scores = scratch + kHeads * padded;
  for (int h = 0; h < kHeads; ++h) {
    for (int64_t d = 0; d < padded; ++d) {
      scratch[h * padded + d] = d < args.size ? to_float(query[h * args.size + d]) * args.scale : 0.0f;
    }
  }
  score<kHeads>(keys, args.key_strides[2], mask, args.length, scratch, args.size, padded, scores);
  float factors[kHeads];
  for (int h = 0; h < kHeads; ++h) factors[h] = weigh(scores + h * args.length, args.length);
  int64_t d = 0;
  for (; d + kSlice * kLanes <= args.value_size; d += kSlice * kLanes) {
    gather_values<kHeads, kSlice>(values + d, args.value_strides[2], mask, args.length, scores, factors,
                                  kSlice * kLanes, output + d, args.value_size);
  }
  for (; d < args.value_size; d += kLanes) {
    gather_values<kHeads, 1>(values + d, args.value_strides[2], mask, args.length, scores, factors,
                             std::min<int64_t>(kLanes, args.value_size - d), output + d, args.value_size);
  }
}

// Pairs [begin, end) of a row and a key head.
template <class T>
void decode_attention(const DecodeAttentionArgs& args, int64_t begin, int64_t end) {
  std::vector<float> scratch(kHeadsAtOnce * (args.length + args.size + kLanes));
  for (int64_t n = begin; n < end; ++n) {
    const int64_t row = n / args.key_heads, key_head = n % args.key_heads;
    const T* keys = static_cast<const T*>(args.key) + row * args.key_strides[0] + key_head * args.key_strides[1];
    const T* values =
        static_cast<const T*>(args.value) + row * args.value_strides[0] + key_head * args.value_strides[1];
    const bool* mask = args.mask ? args.mask + row * args.mask_stride : nullptr;
    for (int64_t h = 0; h < args.shared; h += kHeadsAtOnce) {
      const int64_t head = n * args.shared + h;
      const T* query = static_cast<const T*>(args.query) + head * args.size;
      T* output = static_cast<T*>(args.output) + head * args.value_size;
      const int64_t left = args.shared - h;
      if (left >= kHeadsAtOnce) {
        attend_heads<kHeadsAtOnce>(args, query, keys, values, mask, scratch.data(), output);
      } else if (left == 3) {
        attend_heads<3>(args, query, keys, values, mask, scratch.data(), output);
      } else if (left == 2) {
        attend_heads<2>(args, query, keys, values, mask, scratch.data(), output);
      } else {
        attend_heads<1>(args, query, keys, values, mask, scratch.data(), output);
      }
    }
  }
}

}  // namespace RF_ISA
}  // namespace rlhf_fast
