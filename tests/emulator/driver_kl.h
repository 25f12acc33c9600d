// SPDX-License-Identifier: Apache-2.0
// driver.cpp: token_kl with its gradient.
#pragma once

#include "driver_common.h"
#include "kl.cuh"

namespace {

double log_of_mixture(double p, double q, double beta) { return std::log((1 - beta) * p + beta * q); }

// Value and gradient of a row in p.
double kl_of(const std::vector<double>& p, const std::vector<double>& q, int kind, double beta,
             std::vector<double>* g) {
  std::vector<double> slope(p.size());
  double value = 0, mean = 0;
  for (size_t c = 0; c < p.size(); ++c) {
    const double a = std::exp(p[c]), b = std::exp(q[c]), m = log_of_mixture(a, b, beta);
    if (kind == kReverse) slope[c] = p[c] - q[c], value += a * slope[c];
    if (kind == kForward) value += b * (q[c] - p[c]);
    if (kind == kJsd) slope[c] = (1 - beta) * (p[c] - m), value += a * slope[c] + beta * b * (q[c] - m);
    if (kind == kTv) slope[c] = a > b ? 0.5 : -0.5, value += (a - b) * slope[c];
    mean += a * slope[c];
  }
  for (size_t c = 0; c < p.size(); ++c) {
    (*g)[c] = kind == kForward ? std::exp(p[c]) - std::exp(q[c]) : std::exp(p[c]) * (slope[c] - mean);
  }
  return value;
}

// The rows of x, of y and of the gradient begin at 16-byte boundaries or not, as the width and x's stride have it.
template <class T>
void check_kl(int64_t n, int64_t width, int64_t stride, int kind, cuda::RowSplit split, float softcap = 0) {
  constexpr float kBeta = 0.3f;
  Logits<T> x(n, width, stride), y(n, width, width);
  std::vector<float> kl(n), saved(6 * n);
  const std::vector<float> grad_kl = normal(n);
  std::vector<T> grad(n * width);
  std::vector<cuda::KlPartial> partial(n * split.parts);
  TokenKlArgs a{};
  a.logits = x.data(), a.ref_logits = y.data(), a.rows = x.rows, a.ref_rows = y.rows, a.width = a.columns = width;
  a.transform = {nullptr, kTemperature, 1.0f, softcap}, a.ref_transform = {nullptr, 1.0f, 1.0f, softcap};
  a.kind = kind, a.beta = kBeta;
  a.kl = kl.data(), a.parts = saved.data(), a.grad_kl = grad_kl.data(), a.grad_logits = grad.data();
  constexpr int kAll = cuda::kFoldStep | cuda::kMeansStep | cuda::kFinishStep | cuda::kGradientStep;
  cuda::token_kl(dtype_of(T{}), a, n, split, kAll, partial.data(), nullptr);
  for (int64_t r = 0; r < n; ++r) {
    std::vector<double> wanted(width), u(width), v(width);
    for (int64_t c = 0; c < width; ++c) {
      u[c] = bent(x.row(r)[c], a.transform).first;
      v[c] = bent(y.row(r)[c], a.ref_transform).first;
    }
    const double value = kl_of(logprobs_of(u.data(), width, 1), logprobs_of(v.data(), width, 1), kind, kBeta, &wanted);
    expect("kl", kl[r], value, 1e-5);
    for (int64_t c = 0; c < width; ++c) {
      const double got = cuda::to_float(grad[r * width + c]);
      const double slope = bent(x.row(r)[c], a.transform).second;
      expect("kl gradient", got, wanted[c] * grad_kl[r] * slope, sizeof(T) == 2 ? 1e-2 : 1e-5);
    }
  }
}

void check_token_kl() {
  for (const int kind : {kReverse, kForward, kJsd, kTv}) {
    check_kl<cuda::BFloat16>(3, kRound + 37, kRound + 37, kind, {1, false});
    check_kl<float>(2, kRound + 5, kRound + 8, kind, {3, false});
    check_kl<float>(2, kRound + 5, kRound + 5, kind, {2, true});
    check_kl<float>(2, kRound / 4 + 5, kRound / 4 + 8, kind, {1, false}, 6.0f);
    check_kl<cuda::BFloat16>(1, kRound + 5, kRound + 5, kind, {cuda::kMaxCluster, true});
  }
}

}  // namespace
