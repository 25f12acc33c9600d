// SPDX-License-Identifier: Apache-2.0
// Vectors of floats for the current instruction set, with the compilers' vector extension: arithmetic is plain C++,
// only max and the half-precision conversions name instructions. In the namespace RF_ISA, see csrc/README.md.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__ARM_NEON)
#include <arm_neon.h>
#define RF_NEON  // every 64-bit Arm has it, with half-precision conversions and fused multiply-add
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
typedef float HalfVec __attribute__((vector_size(2 * kLanes)));
typedef double Wide __attribute__((vector_size(4 * kLanes)));  // half as many lanes

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

constexpr float kInf = __builtin_inff();

inline Vec splat(float x) { return x - Vec{}; }  // vector arithmetic broadcasts a scalar

#if defined(__clang__)
template <int kShift, int... kLane>
inline Vec shuffled(Vec v, Vec fill, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(v, fill, (kLane + kShift)...);
}
#elif defined(__AVX2__)
constexpr Int kLaneNumbers = {0, 1, 2, 3, 4, 5, 6, 7};
#else
constexpr Int kLaneNumbers = {0, 1, 2, 3};
#endif

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
#elif defined(RF_NEON)
  return static_cast<float>(bit_cast<__fp16>(x.bits));
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
#elif defined(RF_NEON)
  to->bits = bit_cast<uint16_t>(static_cast<__fp16>(x));
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
#if defined(RF_NEON)
  return bit_cast<Vec>(vshll_n_u16(vld1_u16(&x->bits), 16));
#else
  Short s;
  std::memcpy(&s, x, sizeof s);
  return bit_cast<Vec>(__builtin_convertvector(s, Uint) << 16);
#endif
}
inline Vec load(const Half* x) {
#if defined(__AVX512F__)
  return bit_cast<Vec>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))));
#elif defined(__F16C__)
  return bit_cast<Vec>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
#elif defined(RF_NEON)
  return bit_cast<Vec>(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&x->bits))));
#else
  Vec v{};
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(x[i]);
  return v;
#endif
}

inline void store(Vec v, float* to) { std::memcpy(to, &v, sizeof v); }
inline void store(Vec v, BFloat16* to) {
  const Uint bits = bit_cast<Uint>(v), half_up = 0x7fffu + ((bits >> 16) & 1u);
#if defined(RF_NEON)
  const uint16x4_t rounded = vaddhn_u32(bit_cast<uint32x4_t>(bits), bit_cast<uint32x4_t>(half_up));  // the upper halves
  const uint16x4_t number = vmovn_u32(bit_cast<uint32x4_t>(v == v));
  vst1_u16(&to->bits, vbsl_u16(number, rounded, vdup_n_u16(0x7fc0u)));
#else
  const Uint rounded = (bits + half_up) >> 16;
  const Uint result = (v != v) ? (Uint{} + 0x7fc0u) : rounded;
  const Short s = __builtin_convertvector(result, Short);
  std::memcpy(to, &s, sizeof s);
#endif
}
inline void store(Vec v, Half* to) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(RF_NEON)
  vst1_u16(&to->bits, vreinterpret_u16_f16(vcvt_f16_f32(bit_cast<float32x4_t>(v))));
#else
  for (int i = 0; i < kLanes; ++i) from_float(v[i], to + i);
#endif
}

// The first `count` lanes of a row's last vector, `fill` in the others. Full vectors, the usual case, take one branch;
// the code for the rest is outside of the loops.
template <class T>
__attribute__((noinline)) Vec load_tail(const T* x, int64_t count, float fill) {
  float lanes[kLanes];
  for (int j = 0; j < kLanes; ++j) lanes[j] = j < count ? to_float(x[j]) : fill;
  return load(lanes);
}
template <class T>
inline Vec load_some(const T* x, int64_t count, float fill = 0.0f) {
  return __builtin_expect(count >= kLanes, 1) ? load(x) : load_tail(x, count, fill);
}

template <class T>
__attribute__((noinline)) void store_tail(Vec v, int64_t count, T* to) {
  float lanes[kLanes];
  store(v, lanes);
  for (int64_t j = 0; j < count; ++j) from_float(lanes[j], to + j);
}
template <class T>
inline void store_some(Vec v, int64_t count, T* to) {
  __builtin_expect(count >= kLanes, 1) ? store(v, to) : store_tail(v, count, to);
}

// A lane mask (all bits set where true) from kLanes bytes of 0 or 1.
inline Int load_mask(const bool* mask) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(mask));
  return bit_cast<Int>(_mm512_cvtepi8_epi32(bytes)) != 0;
#elif defined(__AVX2__)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(mask));
  return bit_cast<Int>(_mm256_cvtepi8_epi32(bytes)) != 0;
#elif defined(RF_NEON)
  uint32_t bytes;
  std::memcpy(&bytes, mask, sizeof bytes);
  return bit_cast<Int>(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(bytes))))) != 0;
#else
  return Int{mask[0], mask[1], mask[2], mask[3]} != 0;
#endif
}
inline Int load_mask(const bool* mask, int64_t count) {
  if (__builtin_expect(count >= kLanes, 1)) return load_mask(mask);
  bool lanes[kLanes] = {};
  for (int64_t j = 0; j < count; ++j) lanes[j] = mask[j];
  return load_mask(lanes);
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
  return a > b ? a : b;  // on Arm too: its instruction gives NaN if either is
#endif
}

// Lane i is lane i + kShift of `v`, or of `fill` past the end.
template <int kShift>
inline Vec shift_down(Vec v, Vec fill) {
#if defined(__AVX512F__)
  return bit_cast<Vec>(_mm512_alignr_epi32(bit_cast<__m512i>(fill), bit_cast<__m512i>(v), kShift));
#elif defined(__clang__)
  return shuffled<kShift>(v, fill, std::make_integer_sequence<int, kLanes>());
#else
  return __builtin_shuffle(v, fill, kLaneNumbers + kShift);
#endif
}

template <int kHalf = kLanes / 2>
inline float max_of(Vec v) {
  v = max(v, shift_down<kHalf>(v, v));
  if constexpr (kHalf > 1) return max_of<kHalf / 2>(v);
  return v[0];
}

inline Wide low_half(Vec v) {
  HalfVec half;
  std::memcpy(&half, &v, sizeof half);
  return __builtin_convertvector(half, Wide);
}
inline Wide high_half(Vec v) { return low_half(shift_down<kLanes / 2>(v, v)); }

inline Vec narrow(Wide low, Wide high) {
#if defined(__AVX512F__)
  const __m256 first = _mm512_cvtpd_ps(bit_cast<__m512d>(low)), second = _mm512_cvtpd_ps(bit_cast<__m512d>(high));
  return bit_cast<Vec>(_mm512_insertf32x8(_mm512_castps256_ps512(first), second, 1));
#elif defined(__AVX2__)
  const __m128 first = _mm256_cvtpd_ps(bit_cast<__m256d>(low)), second = _mm256_cvtpd_ps(bit_cast<__m256d>(high));
  return bit_cast<Vec>(_mm256_set_m128(second, first));
#elif defined(RF_NEON)
  return bit_cast<Vec>(vcvt_high_f32_f64(vcvt_f32_f64(bit_cast<float64x2_t>(low)), bit_cast<float64x2_t>(high)));
#else
  return Vec{float(low[0]), float(low[1]), float(high[0]), float(high[1])};
#endif
}

inline double sum_of(Wide v) {
  double lanes[kLanes / 2];
  std::memcpy(lanes, &v, sizeof lanes);
  for (int half = kLanes / 4; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}
inline double sum_of(Vec v) { return sum_of(low_half(v) + high_half(v)); }

// a * b + c, rounded once where the instruction exists.
inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return bit_cast<Vec>(_mm512_fmadd_ps(bit_cast<__m512>(a), bit_cast<__m512>(b), bit_cast<__m512>(c)));
#elif defined(__FMA__)
  return bit_cast<Vec>(_mm256_fmadd_ps(bit_cast<__m256>(a), bit_cast<__m256>(b), bit_cast<__m256>(c)));
#elif defined(RF_NEON)
  return bit_cast<Vec>(vfmaq_f32(bit_cast<float32x4_t>(c), bit_cast<float32x4_t>(a), bit_cast<float32x4_t>(b)));
#else
  return a * b + c;
#endif
}
inline Vec fma(Vec a, Vec b, float c) { return fma(a, b, splat(c)); }
inline Vec fma(Vec a, float b, Vec c) { return fma(a, splat(b), c); }

inline float fma(float a, float b, float c) {
#if defined(__FMA__) || defined(RF_NEON)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// exp(x) = p 2^n with n = round(x / ln 2); only valid if the result is a normal number.
struct ExpParts {
  Vec p;
  Vec n;
  Int exponent;  // n as an integer, with 127 added

  explicit ExpParts(Vec x) {
    const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
    const Vec shifted = fma(x, 1.44269504088896341f, magic);
    n = shifted - magic;
    exponent = bit_cast<Int>(shifted) - (bit_cast<Int>(magic) - 127);
    const Vec r = fma(n, 2.12194440e-4f, fma(n, -0.693359375f, x));  // x - n ln 2, in two parts
    p = fma(fma(after_two_terms(r), r, 1.0f), r, 1.0f);
  }

  // (exp(r) - 1 - r) / r^2 on [-ln2/2, ln2/2]: minimax for exp's relative error, 3e-9.
  static Vec after_two_terms(Vec r) {
    Vec p = splat(1.3814540580e-3f);
    p = fma(p, r, 8.3687454462e-3f);
    p = fma(p, r, 4.1668388993e-2f);
    p = fma(p, r, 1.6666521132e-1f);
    return fma(p, r, 4.9999994040e-1f);
  }
};

// exp(x) for x <= 88: relative error under 1e-7; exactly 1 at 0, exactly 0 below -87.3 (so at -inf), NaN for NaN.
inline Vec exp(Vec x) {
  constexpr float kSmallest = -87.33654f;
  const ExpParts e(x);
#if defined(__AVX512F__)
  const __mmask16 counts = _mm512_cmp_ps_mask(bit_cast<__m512>(x), _mm512_set1_ps(kSmallest), _CMP_NLT_UQ);
  return bit_cast<Vec>(_mm512_maskz_scalef_ps(counts, bit_cast<__m512>(e.p), bit_cast<__m512>(e.n)));
#else
  return x < kSmallest ? Vec{} : e.p * bit_cast<Vec>(e.exponent << 23);
#endif
}

// exp(x) - 1 for any x: +inf where that overflows, -1 at -inf.
inline Vec expm1(Vec x) {
  const Vec limited = x > 89.0f ? splat(89.0f) : (x < -80.0f ? splat(-80.0f) : x);
  const ExpParts e(limited);
  const Int half = e.exponent >> 1;  // 2^128 does not fit in a float, so it multiplies in two steps
  const Vec large = e.p * bit_cast<Vec>((half + 64) << 23) * bit_cast<Vec>((e.exponent - half + 63) << 23);
  return limited * limited < 0.09f ? fma(ExpParts::after_two_terms(x) * x, x, x) : large - 1.0f;
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
  return fma(e, 0.693359375f, small + f) + 0.0f * x;  // NaN stays NaN
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
