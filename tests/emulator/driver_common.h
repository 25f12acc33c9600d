// SPDX-License-Identifier: Apache-2.0
// What the checks of driver.cpp share: comparison, random inputs, and a log-softmax in double.
#pragma once

#include <cmath>
#include <cstdio>
#include <random>
#include <utility>
#include <vector>

#include "softmax.cuh"

using namespace rlhf_fast;

namespace {

int failures = 0;
std::mt19937 engine(1);

void expect(const char* what, double got, double wanted, double tolerance) {
  if (got == wanted || (std::isnan(got) && std::isnan(wanted))) return;
  if (std::abs(got - wanted) <= tolerance * (1 + std::abs(wanted)) && std::isfinite(wanted)) return;
  if (++failures <= 20) std::printf("%s: got %.9g, wanted %.9g\n", what, got, wanted);
}

std::vector<float> normal(int64_t count, float scale = 1) {
  std::normal_distribution<float> distribution(0, scale);
  std::vector<float> x(count);
  for (float& value : x) value = distribution(engine);
  return x;
}

// bool has no data() in a vector.
struct Flags {
  std::vector<char> bytes;
  explicit Flags(int64_t count, double share) : bytes(count) {
    std::bernoulli_distribution distribution(share);
    for (char& byte : bytes) byte = distribution(engine);
  }
  const bool* data() const { return reinterpret_cast<const bool*>(bytes.data()); }
  bool operator[](int64_t i) const { return bytes[i]; }
};

// Logits as the kernels get them, one entry past an aligned address, and as double.
template <class T>
struct Logits {
  std::vector<T> memory;
  std::vector<double> values;
  int64_t width;
  RowIndex rows{};

  Logits(int64_t n, int64_t width_, int64_t stride) : memory(n * stride + 1), values(n * width_), width(width_) {
    rows.dims = 1;
    rows.sizes[0] = n;
    rows.strides[0] = stride;
    const std::vector<float> x = normal(n * stride, 2);
    for (int64_t i = 0; i < n * stride; ++i) cuda::from_float(x[i], data() + i);
    for (int64_t r = 0; r < n; ++r) {
      for (int64_t c = 0; c < width; ++c) values[r * width + c] = cuda::to_float(data()[r * stride + c]);
    }
  }
  T* data() { return memory.data() + 1; }
  const double* row(int64_t r) const { return values.data() + r * width; }
};

constexpr Dtype dtype_of(float) { return kFloat32; }
constexpr Dtype dtype_of(cuda::BFloat16) { return kBFloat16; }

// log-probabilities of a row of logits divided by the temperature.
std::vector<double> logprobs_of(const double* x, int64_t count, double temperature) {
  double max = -INFINITY, sum = 0;
  for (int64_t i = 0; i < count; ++i) max = std::max(max, x[i] / temperature);
  for (int64_t i = 0; i < count; ++i) sum += std::exp(x[i] / temperature - max);
  std::vector<double> result(count);
  for (int64_t i = 0; i < count; ++i) result[i] = x[i] / temperature - max - std::log(sum);
  return result;
}

LogitTransform at_temperature(float temperature) { return {nullptr, temperature, 1.0f, 0.0f}; }

constexpr float kTemperature = 0.8f;
constexpr int64_t kRound = int64_t{cuda::kRowThreads} * 16;  // columns of several loads a thread

// z of an entry, and dz/dx.
std::pair<double, double> bent(double x, const LogitTransform& t) {
  if (t.softcap == 0) return {x * t.scale / t.temperature, t.scale / t.temperature};
  const double y = std::tanh(x * t.scale / t.softcap);
  return {t.softcap * y / t.temperature, (1 - y * y) * t.scale / t.temperature};
}

}  // namespace
