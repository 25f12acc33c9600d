// SPDX-License-Identifier: Apache-2.0
// The one header that kernels take CUDA from. With RF_EMULATE it is the tests' emulator instead, and the same kernels
// run on a CPU; whatever names an instruction of the GPU stands here, beside its plain equivalent.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef RF_EMULATE
#include "cuda_emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
// RF_LAUNCH(kernel<T>, blocks, threads, stream, arguments...): an error shows in cudaGetLastError().
#define RF_LAUNCH(kernel, blocks, threads, stream, ...) \
  (kernel)<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), 0, stream>>>(__VA_ARGS__)
#endif

#include "../args.h"
#include "../math.h"

namespace rlhf_fast {
namespace cuda {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kWarp = 32;
constexpr float kInf = __builtin_inff();
constexpr float kNan = __builtin_nanf("");
constexpr double kLog2e = 1.4426950408889634;
constexpr float kLn2 = 0.6931471805599453f;

// 16-bit floats as their bits, so that the emulator needs nothing of CUDA's headers.
struct alignas(2) BFloat16 {
  uint16_t bits;
};
struct alignas(2) Half {
  uint16_t bits;
};

template <class To, class From>
__device__ __forceinline__ To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

#ifdef RF_EMULATE

inline float exp2_fast(float x) { return exp2f(x); }
inline float to_float(Half x) { return static_cast<float>(bit_cast<_Float16>(x.bits)); }
inline void from_float(float x, Half* to) { to->bits = bit_cast<uint16_t>(static_cast<_Float16>(x)); }
inline void from_float(float x, BFloat16* to) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  to->bits = static_cast<uint16_t>(x == x ? rounded : (bits >> 16) | 0x40u);
}

#else

// One instruction; 2 ulp; results below 2^-126 are 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float to_float(Half x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ __forceinline__ void from_float(float x, Half* to) { to->bits = __half_as_ushort(__float2half_rn(x)); }
__device__ __forceinline__ void from_float(float x, BFloat16* to) {
  to->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}

#endif

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ void from_float(float x, float* to) { *to = x; }

// The type that a Dtype names, for launchers: with_dtype(dtype, [&](auto zero) { using T = decltype(zero); ... }).
template <class F>
auto with_dtype(Dtype dtype, const F& f) {
  if (dtype == kFloat32) return f(float{});
  if (dtype == kBFloat16) return f(BFloat16{});
  return f(Half{});
}

}  // namespace cuda
}  // namespace rlhf_fast
