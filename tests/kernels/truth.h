// SPDX-License-Identifier: Apache-2.0
// Float64 truths of the CPU kernels, written as the mathematics is, and what compares with them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <vector>

namespace truth {

using Row = std::vector<double>;

inline int failures = 0;
inline int64_t comparisons = 0;

// |got - want| <= atol + rtol |want|; infinities and NaN must agree.
inline void expect(const std::string& what, double got, double want, double atol, double rtol) {
  ++comparisons;
  const bool same = got == want || (got != got && want != want) ||
                    (std::isfinite(want) && std::fabs(got - want) <= atol + rtol * std::fabs(want));
  if (!same && ++failures <= 40) std::printf("FAIL %s: got %.9g, want %.9g\n", what.c_str(), got, want);
}

inline double logsumexp(const Row& z) {
  double top = -std::numeric_limits<double>::infinity(), sum = 0;
  for (double x : z) top = std::fmax(top, x);
  if (!std::isfinite(top)) return top;
  for (double x : z) sum += std::exp(x - top);
  return top + std::log(sum);
}

inline Row log_softmax(const Row& z) {
  const double total = logsumexp(z);
  Row logp = z;
  for (double& x : logp) x -= total;
  return logp;
}

inline Row softmax(const Row& z) {
  Row p = log_softmax(z);
  for (double& x : p) x = std::exp(x);
  return p;
}

// Reverse KL(p, q) of two rows of logits, and its gradient in the first.
inline double kl(const Row& z, const Row& y, Row* gradient) {
  const Row logp = log_softmax(z), logq = log_softmax(y);
  double total = 0;
  for (size_t j = 0; j < z.size(); ++j) total += std::exp(logp[j]) * (logp[j] - logq[j]);
  gradient->resize(z.size());
  for (size_t j = 0; j < z.size(); ++j) (*gradient)[j] = std::exp(logp[j]) * (logp[j] - logq[j] - total);
  return total;
}

// Advantages of one sequence without masks (Schulman 2016, equation 16).
inline Row gae(const Row& rewards, const Row& values, double gamma, double lam) {
  Row advantages(rewards.size());
  double next = 0, next_value = 0;
  for (size_t t = rewards.size(); t-- > 0;) {
    next = rewards[t] + gamma * next_value - values[t] + gamma * lam * next;
    next_value = values[t];
    advantages[t] = next;
  }
  return advantages;
}

}  // namespace truth
