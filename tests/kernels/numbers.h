// SPDX-License-Identifier: Apache-2.0
// What simd.h has: conversions (all of them), the ends of rows, elementary functions, and what moves numbers between
// lanes.
#pragma once

#include "../../csrc/cpu/kernels.cpp"  // the kernels of this instruction set, and its simd.h
#include "truth.h"

namespace rlhf_fast {
namespace RF_ISA {

using truth::expect;

inline std::mt19937_64 generator(20260101);

inline double normal() { return std::normal_distribution<double>()(generator); }

inline double decoded(uint16_t bits, int exponent_bits) {
  const int fraction_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (bits >> fraction_bits) & ((1 << exponent_bits) - 1);
  const double fraction = (bits & ((1 << fraction_bits) - 1)) / std::ldexp(1.0, fraction_bits);
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) return fraction == 0 ? sign * INFINITY : NAN;
  return sign * (exponent == 0 ? std::ldexp(fraction, 1 - bias) : std::ldexp(1 + fraction, exponent - bias));
}

template <class T>
T with_bits(uint16_t bits) {
  T x;
  x.bits = bits;
  return x;
}

// Every 16-bit number to float and back; and between neighbours to the nearest, ties to the even one.
template <class T>
void check_conversions(const char* name, int exponent_bits) {
  const std::string label = name;
  const auto rounded = [](float x) {
    T scalar, lanes[kLanes];
    from_float(x, &scalar);
    store(splat(x), lanes);
    expect("store of a vector, as of a scalar", to_float(lanes[kLanes - 1]), to_float(scalar), 0, 0);
    return scalar;
  };
  for (int i = 0; i < 65536; ++i) {
    const auto bits = static_cast<uint16_t>(i);
    const double want = decoded(bits, exponent_bits);
    T lanes[kLanes];
    for (auto& lane : lanes) lane = with_bits<T>(bits);
    expect(label + " to float", to_float(lanes[0]), want, 0, 0);
    expect(label + " vector to float", load(lanes)[kLanes - 1], want, 0, 0);
    if (want != want) {
      for (uint32_t payload : {0x7fc00000u, 0x7fffffffu, 0xffffffffu, 0x7f800001u})  // rounding must not carry it away
        expect(label + " NaN stays", to_float(rounded(bit_cast<float>(payload))), NAN, 0, 0);
      continue;
    }
    const float x = static_cast<float>(want);
    expect(label + " back", rounded(x).bits, bits, 0, 0);
    if (std::isinf(want) || (bits & 0x7fff) == 0x7fff) continue;
    const double next = decoded(static_cast<uint16_t>(bits + 1), exponent_bits);
    // Above the largest number the step goes on as if there were one more.
    const double step = std::isinf(next) ? want - decoded(static_cast<uint16_t>(bits - 1), exponent_bits) : next - want;
    const auto middle = static_cast<float>(want + step / 2);
    const auto even = static_cast<uint16_t>(bits & 1 ? bits + 1 : bits);
    expect(label + " tie to even", rounded(middle).bits, even, 0, 0);
    expect(label + " below the middle", rounded(std::nextafterf(middle, x)).bits, bits, 0, 0);
    if (static_cast<double>(middle) != 0)
      expect(label + " above the middle", rounded(std::nextafterf(middle, 2 * middle)).bits, bits + 1, 0, 0);
  }
}

// The last vector of a row: what is past its end is neither read nor written.
template <class T>
void check_tails(const char* name) {
  const std::string label = name;
  for (int count = 0; count <= kLanes; ++count) {
    const auto size = static_cast<size_t>(count);
    std::vector<T> x(size), to(kLanes);
    for (auto& one : to) from_float(99.0f, &one);
    for (int i = 0; i < count; ++i) from_float(static_cast<float>(i + 1), &x[static_cast<size_t>(i)]);
    const Vec v = load_some(x.data(), count, -3.0f);
    store_some(v, count, to.data());
    const std::vector<char> real(size, 1);
    const Int mask = load_mask(reinterpret_cast<const bool*>(real.data()), count);
    for (int i = 0; i < kLanes; ++i) {
      expect(label + " load_some", v[i], i < count ? i + 1 : -3, 0, 0);
      expect(label + " store_some", to_float(to[static_cast<size_t>(i)]), i < count ? i + 1 : 99, 0, 0);
      expect("load_mask of some", mask[i], i < count ? -1 : 0, 0, 0);
    }
  }
}

template <class Function, class Truth>
void check_function(const char* name, Function f, Truth want, float low, float high, double rtol) {
  for (int i = 0; i <= 20000; ++i) {
    const float x = low + (high - low) * static_cast<float>(i) / 20000;
    expect(name, f(splat(x))[kLanes - 1], want(static_cast<double>(x)), 1e-38, rtol);
  }
  expect(std::string(name) + " of NaN", f(splat(NAN))[0], NAN, 0, 0);
}

#if defined(__FMA__) || defined(RF_NEON)
constexpr bool kFused = true;
#else
constexpr bool kFused = false;
#endif

inline void check_arithmetic() {
  check_function("exp", [](Vec x) { return exp(x); }, [](double x) { return std::exp(x); }, -87, 88, 2e-7);
  check_function("expm1", [](Vec x) { return expm1(x); }, [](double x) { return std::expm1(x); }, -20, 88, 4e-7);
  check_function("expm1 near 0", [](Vec x) { return expm1(x); }, [](double x) { return std::expm1(x); }, -1, 1, 4e-7);
  check_function(
      "expm1 far off", [](Vec x) { return expm1(x); }, [](double x) { return std::expm1(x); }, -1e4, 0, 4e-7);
  check_function("log", [](Vec x) { return log(x); }, [](double x) { return std::log(x); }, 1e-3f, 50, 3e-7);
  check_function("tanh", [](Vec x) { return tanh(x); }, [](double x) { return std::tanh(x); }, -12, 12, 4e-7);
  const auto k3 = [](double d) { return std::expm1(-d) + d; };
  check_function("k3", [](Vec d) { return estimate<kK3>(d); }, k3, -20, 20, 2e-6);
  check_function("k3 near 0", [](Vec d) { return estimate<kK3>(d); }, k3, -0.29f, 0.29f, 5e-7);
  expect("exp(-inf)", exp(splat(-kInf))[0], 0, 0, 0);
  expect("expm1(-inf)", expm1(splat(-kInf))[0], -1, 0, 0);
  expect("expm1(inf)", expm1(splat(kInf))[0], kInf, 0, 0);
  expect("tanh(-inf)", tanh(splat(-kInf))[0], -1, 0, 0);
  for (int i = 0; i < 1000; ++i) {
    const auto a = static_cast<float>(normal()), b = static_cast<float>(normal()), c = static_cast<float>(-a * b);
    const double want = kFused ? std::fma(a, b, c) : 0;  // c = -(a b), rounded
    expect("fma of vectors", fma(splat(a), splat(b), splat(c))[0], want, 0, 0);
    expect("fma", rlhf_fast::RF_ISA::fma(a, b, c), want, 0, 0);
  }
  Vec ramp{};
  for (int i = 0; i < kLanes; ++i) ramp[i] = static_cast<float>(i + 1);
  expect("max_of", max_of(ramp), kLanes, 0, 0);
  expect("sum_of", sum_of(ramp), kLanes * (kLanes + 1) / 2, 0, 0);
  expect("narrow", narrow(low_half(ramp), high_half(ramp))[kLanes - 1], kLanes, 0, 0);
  expect("max keeps the second operand beside a NaN", max(splat(NAN), ramp)[0], 1, 0, 0);
  for (int real = 0; real < (1 << 4); ++real) {
    bool mask[kLanes] = {};
    for (int i = 0; i < 4; ++i) mask[i] = (real >> i) & 1;
    for (int i = 0; i < kLanes; ++i) expect("load_mask", load_mask(mask)[i], mask[i] ? -1 : 0, 0, 0);
  }
}

}  // namespace RF_ISA
}  // namespace rlhf_fast
