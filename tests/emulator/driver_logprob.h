// SPDX-License-Identifier: Apache-2.0
// driver.cpp: the family logprob.
#pragma once

#include <tuple>

#include "driver_common.h"
#include "logprob.cuh"

namespace {

template <class T>
void check_stats(int64_t n, int64_t width, int64_t stride, int parts, bool together = false) {
  constexpr int64_t kTargets = cuda::kRowThreads + 3;  // more than one a thread
  Logits<T> x(n, width, stride);
  std::vector<int64_t> targets(n * kTargets), argmax(n);
  for (int64_t r = 0; r < n; ++r) {  // those of a row differ: equal ones are a race, in which all write the same value
    const int64_t first = static_cast<int64_t>(engine() % width);
    for (int64_t k = 0; k < kTargets; ++k) targets[r * kTargets + k] = (first + k) % width;
  }
  std::vector<float> logprobs(n * kTargets), entropy(n), logsumexp(n), squares(n), saved(2 * n);
  std::vector<char> partial(n * parts * cuda::kFoldSize);
  TokenStatsArgs a{};
  a.logits = x.data(), a.rows = x.rows, a.width = a.columns = width, a.transform = at_temperature(kTemperature);
  a.targets = targets.data(), a.k = kTargets, a.logprobs = logprobs.data(), a.entropy = entropy.data();
  a.logsumexp = logsumexp.data(), a.sum_sq_probs = squares.data(), a.argmax = argmax.data(), a.parts = saved.data();
  cuda::token_stats(dtype_of(T{}), a, n, parts, together, partial.data(), nullptr);

  const std::vector<float> grad = normal(n * kTargets), grad_entropy = normal(n);
  std::vector<float> at_targets(n * kTargets);
  TokenStatsBackwardArgs b{};
  b.logits = b.grad_logits = x.data(), b.rows = b.grad_rows = x.rows, b.width = b.columns = width;
  b.transform = a.transform, b.targets = a.targets, b.k = kTargets, b.grad_logprobs = grad.data();
  b.grad_entropy = grad_entropy.data(), b.entropy = entropy.data(), b.parts = saved.data();
  b.at_targets = at_targets.data();
  cuda::token_stats_backward(dtype_of(T{}), b, n, parts, nullptr);

  for (int64_t r = 0; r < n; ++r) {
    const std::vector<double> logp = logprobs_of(x.row(r), width, kTemperature);
    double h = 0, sq = 0, total = 0;
    int64_t best = 0;
    for (int64_t c = 0; c < width; ++c) {
      h -= std::exp(logp[c]) * logp[c];
      sq += std::exp(2 * logp[c]);
      if (x.row(r)[c] > x.row(r)[best]) best = c;
    }
    expect("entropy", entropy[r], h, 1e-5);
    expect("sum_sq_probs", squares[r], sq, 1e-5);
    expect("argmax", static_cast<double>(argmax[r]), static_cast<double>(best), 0);
    expect("logsumexp", logsumexp[r], x.row(r)[0] / kTemperature - logp[0], 1e-5);
    for (int64_t k = 0; k < kTargets; ++k) {
      expect("logprobs", logprobs[r * kTargets + k], logp[targets[r * kTargets + k]], 1e-5);
      total += grad[r * kTargets + k];
    }
    for (int64_t c = 0; c < width; ++c) {
      double dz = std::exp(logp[c]) * (-total - grad_entropy[r] * (logp[c] + h));
      for (int64_t k = 0; k < kTargets; ++k) dz += targets[r * kTargets + k] == c ? grad[r * kTargets + k] : 0;
      expect("gradient", cuda::to_float(x.data()[r * stride + c]), dz / kTemperature, sizeof(T) == 2 ? 1e-2 : 1e-5);
    }
  }
}

// Rows that are not ordinary: -inf here and there, -inf throughout, a NaN, NaN throughout, masked, a target outside of
// the vocabulary, of which the last columns are no part.
enum Oddity { kOrdinary, kSomeForbidden, kAllForbidden, kHasNan, kAllNan, kMasked, kBadTarget, kOddities };

struct OddRows {
  static constexpr int64_t kColumns = 3 * cuda::kRowThreads + 5, kWidth = kColumns + 3;
  std::vector<float> x, grad_entropy = normal(kOddities), grad = normal(kOddities);
  std::vector<int64_t> targets;
  Flags mask{kOddities, 1.0};

  explicit OddRows(bool has_infinities) : x(normal(kOddities * kWidth, 3)), targets(kOddities, 2) {
    if (has_infinities) {
      for (int64_t c = 0; c < kWidth; c += 3) x[kSomeForbidden * kWidth + c] = -INFINITY;
      for (int64_t c = 0; c < kWidth; ++c) x[kAllForbidden * kWidth + c] = -INFINITY;
    }
    x[5] = x[kColumns - 2] = 20;  // the lowest of both is the argmax
    x[kHasNan * kWidth + 7] = NAN;
    for (int64_t c = 0; c < kWidth; ++c) x[kAllNan * kWidth + c] = x[kMasked * kWidth + c] = NAN;
    mask.bytes[kMasked] = 0;
    targets[kMasked] = int64_t{1} << 40;
    targets[kBadTarget] = kColumns;
  }
};

struct RowTruth {
  std::vector<double> logp, slope;
  double entropy = 0, squares = 0;
  bool dead = true;  // -inf throughout

  RowTruth(const float* x, int64_t count, const LogitTransform& t) : logp(count), slope(count) {
    for (int64_t c = 0; c < count; ++c) {
      std::tie(logp[c], slope[c]) = bent(x[c], t);
      dead = dead && logp[c] == -INFINITY;
    }
    if (dead) return;
    logp = logprobs_of(logp.data(), count, 1);
    for (const double l : logp) {
      entropy -= l == -INFINITY ? 0 : std::exp(l) * l;
      squares += std::exp(2 * l);
    }
  }
};

void check_odd_rows(const LogitTransform& transform, int parts, bool together = false) {
  constexpr int64_t kColumns = OddRows::kColumns, kWidth = OddRows::kWidth;
  const OddRows rows(transform.softcap == 0);
  const std::vector<float> unwritten(kOddities, NAN);
  std::vector<float> logprobs = unwritten, entropy = unwritten, squares = unwritten, saved(2 * kOddities);
  std::vector<float> gradient(kOddities * kWidth, NAN), at_targets(kOddities);
  std::vector<int64_t> argmax(kOddities, -1);
  std::vector<char> partial(kOddities * parts * cuda::kFoldSize);
  TokenStatsArgs a{};
  a.logits = rows.x.data(), a.rows.dims = 1, a.rows.sizes[0] = kOddities, a.rows.strides[0] = kWidth;
  a.width = kWidth, a.columns = kColumns, a.transform = transform, a.targets = rows.targets.data(), a.k = 1;
  a.mask = rows.mask.data(), a.logprobs = logprobs.data(), a.entropy = entropy.data();
  a.sum_sq_probs = squares.data(), a.argmax = argmax.data(), a.parts = saved.data();
  cuda::token_stats(kFloat32, a, kOddities, parts, together, partial.data(), nullptr);
  TokenStatsBackwardArgs b{};
  b.logits = a.logits, b.rows = b.grad_rows = a.rows, b.width = kWidth, b.columns = kColumns, b.transform = transform;
  b.targets = a.targets, b.k = 1, b.mask = a.mask, b.grad_logprobs = rows.grad.data(), b.entropy = entropy.data();
  b.grad_entropy = rows.grad_entropy.data(), b.parts = saved.data(), b.grad_logits = gradient.data();
  b.at_targets = at_targets.data();
  cuda::token_stats_backward(kFloat32, b, kOddities, parts, nullptr);
  for (int r = 0; r < kOddities; ++r) {
    const RowTruth truth(rows.x.data() + r * kWidth, kColumns, transform);
    const bool masked = r == kMasked, has_target = r != kBadTarget;
    expect("odd entropy", entropy[r], masked ? 0 : truth.entropy, 1e-5);
    expect("odd sum_sq_probs", squares[r], masked ? 0 : truth.squares, 1e-5);
    expect("odd logprobs", logprobs[r], masked ? 0 : (has_target ? truth.logp[2] : NAN), 1e-5);
    if (truth.dead || masked) expect("odd argmax", static_cast<double>(argmax[r]), 0, 0);
    if (r == kOrdinary) expect("argmax of a tie", static_cast<double>(argmax[r]), 5, 0);
    for (int64_t c = kColumns; c < kWidth; ++c) expect("gradient of no token", gradient[r * kWidth + c], 0, 0);
    for (int64_t c = 0; c < kColumns; ++c) {
      const double p = std::exp(truth.logp[c]), centred = p == 0 ? 0 : p * (truth.logp[c] + truth.entropy);
      double dz = -rows.grad_entropy[r] * centred + rows.grad[r] * ((c == 2) - p);
      if (!has_target) dz = NAN;
      const double wanted = masked || truth.dead ? 0 : dz * truth.slope[c];
      expect("odd gradient", gradient[r * kWidth + c], wanted, 1e-5);
    }
  }
}

void check_logprob() {
  for (const int parts : {1, 3}) {
    check_stats<cuda::BFloat16>(3, kRound + 37, kRound + 37, parts);
    check_stats<float>(2, kRound + 9, kRound + 16, parts);
  }
  check_stats<cuda::BFloat16>(2, kRound + 37, kRound + 37, 2, true);
  for (const int parts : {1, 2}) {
    check_odd_rows(at_temperature(kTemperature), parts);
    check_odd_rows({nullptr, kTemperature, 1.0f, 4.0f}, parts);
  }
  check_odd_rows(at_temperature(kTemperature), cuda::kMaxCluster, true);
}

}  // namespace
