// SPDX-License-Identifier: Apache-2.0
// Vectors of floats for the instruction set at hand, on the compilers' vector extension: arithmetic is plain C++,
// only max and the half-precision conversions name instructions. Lives in the namespace RF_ISA, see csrc/README.md.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace rlhf_fast {
namespace RF_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t Int __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Uint __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Short __attribute__((vector_size(2 * kLanes)));

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

constexpr float kInf = __builtin_inff();

inline Vec splat(float x) { return x - Vec{}; }  // a scalar spreads in vector arithmetic

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// ------------------------------------------------------------------------------------------- loads and stores

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(Half x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | (rest << 13));  // inf, NaN
  const float magnitude = rest >= 0x0400u ? bit_cast<float>((rest << 13) + 0x38000000u) : rest * 0x1p-24f;
  return bit_cast<float>(sign | bit_cast<uint32_t>(magnitude));
#endif
}

inline void from_float(float x, float* to) { *to = x; }
inline void from_float(float x, BFloat16* to) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  to->bits = x != x ? 0x7fc0u : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline void from_float(float x, Half* to) {
#if defined(__F16C__)
  to->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
  const uint32_t bits = bit_cast<uint32_t>(x), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
  uint32_t half;
  if (rest > 0x7f800000u) {
    half = 0x7e00u;  // NaN
  } else if (rest >= 0x477ff000u) {
    half = 0x7c00u;  // rounds to inf
  } else if (rest < 0x38800000u) {
    half = static_cast<uint32_t>(std::nearbyintf(bit_cast<float>(rest) * 0x1p24f));  // subnormal: a multiple of 2^-24
  } else {
    half = (rest + 0xfffu + ((rest >> 13) & 1u) - 0x38000000u) >> 13;
  }
  to->bits = static_cast<uint16_t>(sign | half);
#endif
}

inline Vec load(const float* x) {
  Vec v;
  std::memcpy(&v, x, sizeof v);
  return v;
}
inline Vec load(const BFloat16* x) {
  Short s;
  std::memcpy(&s, x, sizeof s);
  return bit_cast<Vec>(__builtin_convertvector(s, Uint) << 16);
}
inline Vec load(const Half* x) {
#if defined(__AVX512F__)
  return bit_cast<Vec>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))));
#elif defined(__F16C__)
  return bit_cast<Vec>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
#else
  Vec v{};
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(x[i]);
  return v;
#endif
}

inline void store(Vec v, float* to) { std::memcpy(to, &v, sizeof v); }
inline void store(Vec v, BFloat16* to) {
  const Uint bits = bit_cast<Uint>(v);
  const Uint rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Uint result = (v != v) ? (Uint{} + 0x7fc0u) : rounded;
  const Short s = __builtin_convertvector(result, Short);
  std::memcpy(to, &s, sizeof s);
}
inline void store(Vec v, Half* to) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) from_float(v[i], to + i);
#endif
}

// ------------------------------------------------------------------------------------------- arithmetic

// The larger; where b is NaN, NaN (as the x86 instruction has it: the second operand if either is NaN).
inline Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return bit_cast<Vec>(_mm512_max_ps(bit_cast<__m512>(a), bit_cast<__m512>(b)));
#elif defined(__AVX2__)
  return bit_cast<Vec>(_mm256_max_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
#elif defined(__SSE2__)
  return bit_cast<Vec>(_mm_max_ps(bit_cast<__m128>(a), bit_cast<__m128>(b)));
#else
  return a > b ? a : b;
#endif
}

inline float max_of(Vec v) {
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

inline double sum_of(Vec v) {
  double total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

// a * b + c, rounded once where the instruction exists.
inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return bit_cast<Vec>(_mm512_fmadd_ps(bit_cast<__m512>(a), bit_cast<__m512>(b), bit_cast<__m512>(c)));
#elif defined(__FMA__)
  return bit_cast<Vec>(_mm256_fmadd_ps(bit_cast<__m256>(a), bit_cast<__m256>(b), bit_cast<__m256>(c)));
#else
  return a * b + c;
#endif
}
inline Vec fma(Vec a, Vec b, float c) { return fma(a, b, splat(c)); }
inline Vec fma(Vec a, float b, Vec c) { return fma(a, splat(b), c); }

inline float fma(float a, float b, float c) {
#if defined(__FMA__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// exp(x) for x <= 88: relative error under 1e-7; exactly 1 at 0, exactly 0 below -87.3 (so at -inf), NaN for NaN.
inline Vec exp(Vec x) {
  const Vec clamped = max(splat(-104.0f), x);
  // n = round(x / ln 2), by adding and taking away 1.5 * 2^23; r = x - n ln 2 in two parts.
  const Vec magic = splat(12582912.0f);
  const Vec shifted = fma(clamped, 1.44269504088896341f, magic);
  const Vec n = shifted - magic;
  const Vec r = fma(n, 2.12194440e-4f, fma(n, -0.693359375f, clamped));
  Vec p = splat(1.9875691500e-4f);  // minimax of (exp(r) - 1 - r) / r^2 on [-ln2/2, ln2/2] (Cephes expf)
  p = fma(p, r, 1.3981999507e-3f);
  p = fma(p, r, 8.3334519073e-3f);
  p = fma(p, r, 4.1665795894e-2f);
  p = fma(p, r, 1.6666665459e-1f);
  p = fma(p, r, 5.0000001201e-1f);
  p = fma(p * r, r, r) + 1.0f;
  const Int exponent = (bit_cast<Int>(shifted) - bit_cast<Int>(magic) + 127) << 23;  // 2^n from shifted's low bits
  const Vec result = p * bit_cast<Vec>(exponent);
  return x < -87.33654f ? Vec{} : result;
}

// log(x) for normal positive x: relative error under 1e-7 (Cephes logf).
inline Vec log(Vec x) {
  const Int bits = bit_cast<Int>(x);
  const Int exponent = (bits - 0x3f3504f3) >> 23;  // x = 2^exponent * m with m in [sqrt(1/2), sqrt(2))
  const Vec f = bit_cast<Vec>(bits - (exponent << 23)) - 1.0f;
  const Vec e = __builtin_convertvector(exponent, Vec);
  Vec p = splat(7.0376836292e-2f);
  p = fma(p, f, -1.1514610310e-1f);
  p = fma(p, f, 1.1676998740e-1f);
  p = fma(p, f, -1.2420140846e-1f);
  p = fma(p, f, 1.4249322787e-1f);
  p = fma(p, f, -1.6668057665e-1f);
  p = fma(p, f, 2.0000714765e-1f);
  p = fma(p, f, -2.4999993993e-1f);
  p = fma(p, f, 3.3333331174e-1f);
  const Vec f2 = f * f;
  const Vec small = fma(e, -2.12194440e-4f, fma(f * f2, p, -0.5f * f2));
  return fma(e, 0.693359375f, small + f);
}

// tanh(x): relative error under 2e-7 (Cephes tanhf).
inline Vec tanh(Vec x) {
  const Vec magnitude = bit_cast<Vec>(bit_cast<Int>(x) & 0x7fffffff);
  const Vec x2 = x * x;
  Vec p = splat(-5.70498872745e-3f);
  p = fma(p, x2, 2.06390887954e-2f);
  p = fma(p, x2, -5.37397155531e-2f);
  p = fma(p, x2, 1.33314422036e-1f);
  p = fma(p, x2, -3.33332819422e-1f);
  const Vec small = fma(p * x2, x, x);
  const Vec decay = exp(-2.0f * magnitude);  // in (0, 1]: no overflow
  const Vec large = (1.0f - decay) / (1.0f + decay);
  const Vec signed_large = bit_cast<Vec>(bit_cast<Int>(large) | (bit_cast<Int>(x) & static_cast<int32_t>(0x80000000)));
  return magnitude < 0.625f ? small : signed_large;
}

}  // namespace RF_ISA
}  // namespace rlhf_fast
