// SPDX-License-Identifier: Apache-2.0
// 16-byte access to rows of logits as floats, for every dtype and alignment.
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

// kLast: nobody reads it again.
template <bool kLast = false>
__device__ __forceinline__ uint4 load_16_bytes(const uint4* from) {
  return kLast ? load_16_bytes_for_the_last_time(from) : *from;  // one load; a copy of 16 bytes would be sixteen
}

template <bool kLast = false, class T>
__device__ __forceinline__ Pack<T> load_pack(const T* from) {
  return bit_cast<Pack<T>>(load_16_bytes<kLast>(reinterpret_cast<const uint4*>(from)));
}

// The 16 bytes at any address, from the aligned 32 bytes around them, all of which must be readable.
template <class T>
__device__ __forceinline__ Pack<T> load_any_pack(const T* from) {
  const uint64_t address = reinterpret_cast<uint64_t>(from);
  const unsigned past = address % 16;
  const uint4* around = reinterpret_cast<const uint4*>(address - past);
  const uint4 low = load_16_bytes_global(around), high = load_16_bytes_global(around + 1);
  uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
  for (int k = 0; k < 6; ++k) words[k] = past & 8 ? words[k + 2] : words[k];
#pragma unroll
  for (int k = 0; k < 5; ++k) words[k] = past & 4 ? words[k + 1] : words[k];
  const unsigned bits = past % 4 * 8;
  return bit_cast<Pack<T>>(uint4{funnel_shift(words[0], words[1], bits), funnel_shift(words[1], words[2], bits),
                                 funnel_shift(words[2], words[3], bits), funnel_shift(words[3], words[4], bits)});
}

template <class T>
__device__ __forceinline__ void store_pack(const Pack<T>& pack, T* to) {
  store_16_bytes(bit_cast<uint4>(pack), to);
}

template <class T>
__device__ __forceinline__ void unpack(const Pack<T>& pack, float* floats) {
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) floats[i] = to_float(pack.values[i]);
}
// Two values per word: one is the high half, the other is shifted there.
__device__ __forceinline__ void unpack(const Pack<BFloat16>& pack, float* floats) {
  const uint4 raw = bit_cast<uint4>(pack);
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    floats[2 * i] = bit_cast<float>(words[i] << 16);
    floats[2 * i + 1] = bit_cast<float>(words[i] & 0xffff0000u);
  }
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

// The same for rows with different alignment: packs begin at the boundaries of `anchor`, and the other row is read by
// load_any_pack, so its last packs are handled as single entries of the rest.
template <class T>
__device__ __forceinline__ Span shifted_span_of(const T* anchor, int64_t begin, int64_t end) {
  Span span = span_of(anchor, begin, end);
  if (span.tail > span.head) span.tail -= kPack<T>;
  return span;
}

// Whether two rows have their 16-byte boundaries at the same columns.
template <class T>
__device__ __forceinline__ bool same_phase(const T* a, const T* b) {
  return reinterpret_cast<uint64_t>(a) % 16 == reinterpret_cast<uint64_t>(b) % 16;
}

// Part `part` of `parts` equal ranges of [0, count), divided at multiples of 128 entries.
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

// All threads of a block write zeros to [begin, end) of a row.
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
