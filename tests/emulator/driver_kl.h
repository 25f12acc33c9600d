// SPDX-License-Identifier: Apache-2.0
// driver.cpp: token_kl with its gradients.
#pragma once

#include <algorithm>

#include "driver_common.h"
#include "kl.cuh"

namespace {

constexpr float kBeta = 0.3f;

double log_of_mixture(double p, double q, double beta) { return std::log((1 - beta) * p + beta * q); }

// 0 where the weight is 0, even of an infinity.
double times(double weight, double x) { return weight == 0 ? 0 : weight * x; }

// Value of a row, and gradient in p, with kLogFloor as a log q of -inf.
double kl_of(const std::vector<double>& p, const std::vector<double>& q, int kind, double beta,
             std::vector<double>* g) {
  std::vector<double> slope(p.size());
  double value = 0, mean = 0;
  for (size_t c = 0; c < p.size(); ++c) {
    const double a = std::exp(p[c]), b = std::exp(q[c]), m = log_of_mixture(a, b, beta);
    if (kind == kReverse) slope[c] = p[c] - std::max<double>(q[c], kLogFloor), value += times(a, p[c] - q[c]);
    if (kind == kForward) value += times(b, q[c] - p[c]);
    if (kind == kJsd) slope[c] = (1 - beta) * (p[c] - m), value += times(a, slope[c]) + beta * times(b, q[c] - m);
    if (kind == kTv) slope[c] = a > b ? 0.5 : (a < b ? -0.5 : a - b), value += (a - b) * slope[c];
    mean += times(a, slope[c]);
  }
  for (size_t c = 0; c < p.size(); ++c) {
    const double a = std::exp(p[c]);
    (*g)[c] = kind == kForward ? a - std::exp(q[c]) : mean != mean ? mean : times(a, slope[c] - mean);
  }
  return value;
}

// The same with the sides exchanged: the gradient in q.
void kl_slopes_of_q(const std::vector<double>& p, const std::vector<double>& q, int kind, double beta,
                    std::vector<double>* g) {
  const int other = kind == kReverse ? kForward : (kind == kForward ? kReverse : kind);
  kl_of(q, p, other, 1 - beta, g);
}

// Rows that are not ordinary: a side forbids some tokens, both do, a side holds a NaN, masked.
enum KlOddity { kPlain, kQForbids, kPForbids, kBothForbid, kPHasNan, kQHasNan, kMaskedPair, kKlOddities };

template <class T>
void make_odd(Logits<T>* x, Logits<T>* y) {
  const auto set = [](Logits<T>* logits, int row, int64_t column, float value) {
    cuda::from_float(value, logits->data() + row * logits->rows.strides[0] + column);
    logits->values[row * logits->width + column] = value;
  };
  for (int64_t c = 0; c < x->width; c += 3) {
    set(y, kQForbids, c, -INFINITY), set(x, kPForbids, c, -INFINITY);
    set(x, kBothForbid, c, -INFINITY), set(y, kBothForbid, c, -INFINITY);
  }
  set(x, kPHasNan, 7, NAN), set(y, kQHasNan, 9, NAN);
  set(y, kPHasNan, 12, -INFINITY);  // NaN, not +inf
}

// The rows of x, of y and of the gradient begin at 16-byte boundaries or not, as the width and x's stride have it. The
// last `padding` columns are not of the vocabulary. odd: the rows are those of make_odd. With a softcap, or odd rows,
// the gradient of the reference too.
template <class T>
void check_kl(int64_t n, int64_t width, int64_t stride, int kind, cuda::RowSplit split, float softcap = 0,
              int64_t padding = 0, bool odd = false) {
  Logits<T> x(n, width, stride), y(n, width, width);
  if (odd) make_odd(&x, &y);
  const int64_t columns = width - padding;
  std::vector<float> kl(n), saved(6 * n);
  const std::vector<float> grad_kl = normal(n);
  std::vector<T> grad(n * width), grad_ref(n * width);
  for (T& g : grad) cuda::from_float(NAN, &g);
  grad_ref = grad;
  Flags mask(n, 1.0);
  if (odd) mask.bytes[kMaskedPair] = 0;
  std::vector<cuda::KlPartial> partial(n * split.parts);
  TokenKlArgs a{};
  a.logits = x.data(), a.ref_logits = y.data(), a.rows = x.rows, a.ref_rows = y.rows;
  a.width = width, a.columns = columns, a.mask = odd ? mask.data() : nullptr;
  a.transform = {nullptr, kTemperature, 1.0f, softcap}, a.ref_transform = {nullptr, 1.0f, 1.0f, softcap};
  a.kind = kind, a.beta = kBeta;
  a.kl = kl.data(), a.parts = saved.data(), a.grad_kl = grad_kl.data(), a.grad_logits = grad.data();
  constexpr int kAll = cuda::kFoldStep | cuda::kMeansStep | cuda::kFinishStep | cuda::kGradientStep;
  cuda::token_kl(dtype_of(T{}), a, n, split, kAll, partial.data(), nullptr);
  a.grad_logits = nullptr, a.grad_ref_logits = grad_ref.data();
  const bool both_sides = odd || softcap > 0;
  if (both_sides) cuda::token_kl(dtype_of(T{}), a, n, split, cuda::kGradientStep, partial.data(), nullptr);
  for (int64_t r = 0; r < n; ++r) {
    std::vector<double> wanted(columns), wanted_ref(columns), u(columns), v(columns);
    for (int64_t c = 0; c < columns; ++c) {
      u[c] = bent(x.row(r)[c], a.transform).first;
      v[c] = bent(y.row(r)[c], a.ref_transform).first;
    }
    const std::vector<double> logp = logprobs_of(u.data(), columns, 1), logq = logprobs_of(v.data(), columns, 1);
    const bool masked = odd && r == kMaskedPair;
    const double value = kl_of(logp, logq, kind, kBeta, &wanted);
    kl_slopes_of_q(logp, logq, kind, kBeta, &wanted_ref);
    const double* first = x.row(r);  // the logits' side is saved first, whichever weights the sum
    if (!odd && softcap == 0)
      expect("maximum of the logits", saved[6 * r], *std::max_element(first, first + columns), 0);
    expect("kl", kl[r], masked ? 0 : value, 1e-5);
    for (int64_t c = 0; c < width; ++c) {
      const bool counts = c < columns && !masked;
      const double tolerance = sizeof(T) == 2 ? 1e-2 : 1e-5, of_row = grad_kl[r];
      const double slope = bent(x.row(r)[c], a.transform).second, slope_ref = bent(y.row(r)[c], a.ref_transform).second;
      expect("kl gradient", cuda::to_float(grad[r * width + c]), counts ? wanted[c] * of_row * slope : 0, tolerance);
      if (!both_sides) continue;
      expect("kl gradient of the reference", cuda::to_float(grad_ref[r * width + c]),
             counts ? wanted_ref[c] * of_row * slope_ref : 0, tolerance);
    }
  }
}

void check_token_kl() {
  for (const int kind : {kReverse, kForward, kJsd, kTv}) {
    check_kl<cuda::BFloat16>(3, kRound + 37, kRound + 37, kind, {1, false});
    check_kl<float>(2, kRound + 12, kRound + 15, kind, {3, false}, 0, 7);
    check_kl<float>(2, kRound + 5, kRound + 5, kind, {2, true});
    check_kl<float>(2, kRound / 4 + 5, kRound / 4 + 8, kind, {1, false}, 6.0f, 3);
    check_kl<cuda::BFloat16>(1, kRound + 5, kRound + 5, kind, {cuda::kMaxCluster, true});
    check_kl<float>(kKlOddities, kRound / 4 + 8, kRound / 4 + 8, kind, {1, false}, 0, 0, true);
  }
}

}  // namespace
