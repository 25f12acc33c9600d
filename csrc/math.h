// SPDX-License-Identifier: Apache-2.0
// Scalar mathematics that CPU and CUDA kernels share, and the numbers of options, as in rlhf_fast/ops/codes.py.
// Includes no torch.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define RF_HOST_DEVICE __host__ __device__
#else
#define RF_HOST_DEVICE
#endif

namespace rlhf_fast {

enum Output : int { kLogprobs = 1, kEntropy = 2, kLogsumexp = 4, kSumSqProbs = 8, kArgmax = 16 };
enum KlKind : int { kReverse = 0, kForward = 1, kJsd = 2, kTv = 3 };
enum Estimator : int { kK1 = 0, kK2 = 1, kK3 = 2, kAbs = 3 };
enum Gradient : int { kValue = 0, kStraightThrough = 1 };

// Replaces a log-probability of -inf in the gradient of a KL that is +inf; see LOG_FLOOR in
// rlhf_fast/ops/reference/kl.py.
constexpr float kLogFloor = -104.0f;

// Functions are static: each instruction set's object file keeps its own copy (see csrc/README.md).

// KL estimators in d = log p - log q of the sampled token (Schulman 2020).
static inline RF_HOST_DEVICE float kl_estimate(float d, int estimator) {
  switch (estimator) {
    case kK1: return d;
    case kK2: return 0.5f * d * d;
    case kK3: return expm1f(-d) + d;
    default: return fabsf(d);
  }
}

// Their derivatives in d; with gradient = straight_through always k2's.
static inline RF_HOST_DEVICE float kl_estimate_slope(float d, int estimator, int gradient) {
  if (gradient == kStraightThrough) return d;
  switch (estimator) {
    case kK1: return 1.0f;
    case kK2: return d;
    case kK3: return -expm1f(-d);
    default: return static_cast<float>(d > 0) - static_cast<float>(d < 0) + 0.0f * d;  // NaN stays NaN
  }
}

// Limits x to [-limit, limit]; NaN stays NaN.
static inline RF_HOST_DEVICE float clamp_to(float x, float limit) {
  return x > limit ? limit : (x < -limit ? -limit : x);
}

// Whitening is (x - mean) * scale + shift.
struct Whitening {
  double mean;
  double scale;
  double shift;
};

// From the count, the sum and the sum of squares of the real entries; the variance is unbiased.
static inline RF_HOST_DEVICE Whitening whitening(const double* moments, bool shift_mean) {
  const double count = moments[0], mean = count > 0 ? moments[1] / count : 0.0;
  const double spread = count > 1 ? (moments[2] - count * mean * mean) / (count - 1) : 0.0;
  const double variance = spread < 0 ? 0.0 : spread;  // NaN stays NaN
  return {mean, 1.0 / sqrt(variance + 1e-8), shift_mean ? 0.0 : mean};
}

}  // namespace rlhf_fast
