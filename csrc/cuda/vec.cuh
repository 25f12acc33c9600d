// SPDX-License-Identifier: Apache-2.0
// Sixteen bytes at a time: rows of logits as floats, whatever their dtype and wherever they begin.
#pragma once

#include "compat.cuh"

namespace rlhf_fast {
namespace cuda {

// 16 bytes of a row.
template <class T>
constexpr int kPack = 16 / sizeof(T);

template <class T>
struct alignas(16) Pack {
  T values[kPack<T>];
};

template <class T>
__device__ __forceinline__ Pack<T> load_pack(const T* from) {
  const uint4 raw = *reinterpret_cast<const uint4*>(from);  // one load; a copy of 16 bytes would be sixteen
  return bit_cast<Pack<T>>(raw);
}

template <class T>
__device__ __forceinline__ void store_pack(const Pack<T>& pack, T* to) {
  store_16_bytes(bit_cast<uint4>(pack), to);
}

template <class T>
__device__ __forceinline__ void unpack(const Pack<T>& pack, float (&floats)[kPack<T>]) {
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) floats[i] = to_float(pack.values[i]);
}

template <class T>
__device__ __forceinline__ Pack<T> pack_of(const float (&floats)[kPack<T>]) {
  Pack<T> pack;
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) from_float(floats[i], &pack.values[i]);
  return pack;
}

// A range [begin, end) of a row in three parts: entries before the first 16-byte boundary, whole packs, and the rest.
struct Span {
  int64_t head;  // where the packs begin
  int64_t tail;  // where they end
  int64_t begin;
  int64_t end;
};

template <class T>
__device__ __forceinline__ Span span_of(const T* row, int64_t begin, int64_t end) {
  const uint64_t past = reinterpret_cast<uint64_t>(row + begin) % 16 / sizeof(T);
  int64_t head = begin + (past == 0 ? 0 : kPack<T> - static_cast<int64_t>(past));
  if (head > end) head = end;
  return {head, head + (end - head) / kPack<T> * kPack<T>, begin, end};
}

// Whether two rows reach their 16-byte boundaries at the same columns, so that both can go by packs.
template <class T>
__device__ __forceinline__ bool same_phase(const T* a, const T* b) {
  return reinterpret_cast<uint64_t>(a) % 16 == reinterpret_cast<uint64_t>(b) % 16;
}

// Part `part` of `parts` equal ranges of [0, count), cut at multiples of 128 entries.
__device__ __forceinline__ void slice_of(int64_t count, int part, int parts, int64_t* begin, int64_t* end) {
  const int64_t step = ((count + parts - 1) / parts + 127) / 128 * 128;
  *begin = step * part < count ? step * part : count;
  *end = *begin + step < count ? *begin + step : count;
}

// Where row n of (..., V) begins.
__device__ __forceinline__ int64_t row_offset(const RowIndex& index, int64_t n) {
  if (index.dims <= 1) return n * (index.dims == 1 ? index.strides[0] : 0);
  int64_t offset = 0;
  for (int d = index.dims - 1; d > 0; --d) {
    offset += (n % index.sizes[d]) * index.strides[d];
    n /= index.sizes[d];
  }
  return offset + n * index.strides[0];
}

// Zeros in [begin, end) of a row, by all threads of a block.
template <class T>
__device__ __forceinline__ void zero_range(T* row, int64_t begin, int64_t end) {
  const Span span = span_of(row, begin, end);
  for (int64_t i = span.begin + threadIdx.x; i < span.head; i += blockDim.x) from_float(0.0f, row + i);
  for (int64_t i = span.head + threadIdx.x * kPack<T>; i < span.tail; i += blockDim.x * kPack<T>) {
    *reinterpret_cast<uint4*>(row + i) = uint4{0, 0, 0, 0};
  }
  for (int64_t i = span.tail + threadIdx.x; i < span.end; i += blockDim.x) from_float(0.0f, row + i);
}

}  // namespace cuda
}  // namespace rlhf_fast
