// SPDX-License-Identifier: Apache-2.0
// KL divergence per token, exact (two rows of logits) and estimated: see rlhf_fast/ops/kl.py for the mathematics.
//
// The exact one folds each row on its own (fold_row), then reads both once more, now in cache, with the log-
// probabilities normalised: the divergence is summed from true log-ratios, and each kind is one expression.
#pragma once

#include "logprob_kernel.h"

namespace rlhf_fast {
namespace RF_ISA {

// What turns a row's logits into log-probabilities.
struct RowNorm {
  RowTransform transform;
  float max;
  float log_sum;

  RowNorm(const LogitTransform& t, int64_t row, float max, float log_sum)
      : transform(t, row), max(max), log_sum(log_sum) {}

  Vec logprob(Vec x, Vec* slope) const {
    const bool cap = transform.cap > 0;
    const Vec u = cap ? transform.operator()<true>(x) : transform.operator()<false>(x);
    *slope = splat(transform.slope);
    if (cap) *slope *= 1.0f - (u / transform.cap) * (u / transform.cap);
    return (u - (max == -kInf ? 0.0f : max)) * transform.factor - log_sum;
  }
};

// A vector of the two distributions, and the kind's terms in them.
struct KlTerms {
  Vec kl;       // summand of the divergence
  Vec slope_p;  // s_p and s_q: the gradients are p (s_p - sum p s_p), q (s_q - sum q s_q) where of that form
  Vec slope_q;
  Vec p;
  Vec q;
};

inline Vec zero_unless(Vec weight, Vec x) { return weight == 0.0f ? Vec{} : x; }
inline Vec floored(Vec logp) { return logp == -kInf ? splat(kLogFloor) : logp; }

template <int kKind>
inline KlTerms kl_terms(Vec logp, Vec logq, float beta) {
  KlTerms t{};
  if (kKind != kForward) t.p = exp(logp);
  if (kKind != kReverse) t.q = exp(logq);
  if (kKind == kReverse) {
    t.kl = zero_unless(t.p, t.p * (logp - logq));
    t.slope_p = zero_unless(t.p, logp - floored(logq));
  } else if (kKind == kForward) {
    t.kl = zero_unless(t.q, t.q * (logq - logp));
    t.slope_q = zero_unless(t.q, logq - floored(logp));
  } else if (kKind == kJsd) {
    const Vec logm = log((1.0f - beta) * t.p + beta * t.q);
    t.slope_p = zero_unless(t.p, (1.0f - beta) * (logp - logm));
    t.slope_q = zero_unless(t.q, beta * (logq - logm));
    t.kl = t.p * t.slope_p + t.q * t.slope_q;
  } else {
    const Vec d = t.p - t.q;
    t.kl = d > 0.0f ? 0.5f * d : -0.5f * d;
    t.slope_p = d > 0.0f ? splat(0.5f) : (d < 0.0f ? splat(-0.5f) : Vec{});
    t.slope_q = -t.slope_p;
  }
  return t;
}

// Calls body(x, y, first, count) on vectors of both rows, the last one padded.
template <class T, class Body>
inline void for_each_pair(const T* x, const T* y, int64_t columns, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= columns; i += kLanes) body(load(x + i), load(y + i), i, kLanes);
  if (i < columns) {
    alignas(64) float tail_x[kLanes], tail_y[kLanes];
    for (int j = 0; j < kLanes; ++j) {
      tail_x[j] = i + j < columns ? to_float(x[i + j]) : -kInf;
      tail_y[j] = i + j < columns ? to_float(y[i + j]) : -kInf;
    }
    body(load(tail_x), load(tail_y), i, static_cast<int>(columns - i));
  }
}

inline Vec keep_first(Vec x, int count) {
  for (int j = count; j < kLanes; ++j) x[j] = 0;
  return x;
}

template <int kKind, class T>
inline void kl_row(const T* x, const T* y, int64_t columns, const RowNorm& policy, const RowNorm& ref, float beta,
                   float* kl, float* mean_p, float* mean_q) {
  double totals[3] = {};
  Vec sums[3] = {};
  for_each_pair(x, y, columns, [&](Vec vx, Vec vy, int64_t first, int count) {
    Vec slope;
    const KlTerms t = kl_terms<kKind>(policy.logprob(vx, &slope), ref.logprob(vy, &slope), beta);
    const Vec parts[3] = {t.kl, t.p * t.slope_p, t.q * t.slope_q};
    for (int k = 0; k < 3; ++k) sums[k] += count == kLanes ? parts[k] : keep_first(parts[k], count);
    if ((first & (kBlock - 1)) == kBlock - kLanes) {  // a block is full: on to double
      for (int k = 0; k < 3; ++k) {
        totals[k] += sum_of(sums[k]);
        sums[k] = Vec{};
      }
    }
  });
  for (int k = 0; k < 3; ++k) totals[k] += sum_of(sums[k]);
  *kl = static_cast<float>(totals[0]);
  *mean_p = static_cast<float>(totals[1]);
  *mean_q = static_cast<float>(totals[2]);
}

template <class T>
void token_kl(const TokenKlArgs& a, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    float* parts = a.parts + 6 * n;
    if (a.mask && !a.mask[n]) {
      a.kl[n] = 0;
      std::fill_n(parts, 6, 0.0f);
      continue;
    }
    const T* x = static_cast<const T*>(a.logits) + row_offset(a.rows, n);
    const T* y = static_cast<const T*>(a.ref_logits) + row_offset(a.ref_rows, n);
    const RowFold fold_x = fold_row(x, a.columns, RowTransform(a.transform, n), false, false);
    const RowFold fold_y = fold_row(y, a.columns, RowTransform(a.ref_transform, n), false, false);
    parts[0] = fold_x.max;
    parts[1] = fold_x.log_sum();
    parts[2] = fold_y.max;
    parts[3] = fold_y.log_sum();
    const RowNorm policy(a.transform, n, parts[0], parts[1]), ref(a.ref_transform, n, parts[2], parts[3]);
    switch (a.kind) {
      case kReverse: kl_row<kReverse>(x, y, a.columns, policy, ref, a.beta, a.kl + n, parts + 4, parts + 5); break;
      case kForward: kl_row<kForward>(x, y, a.columns, policy, ref, a.beta, a.kl + n, parts + 4, parts + 5); break;
      case kJsd: kl_row<kJsd>(x, y, a.columns, policy, ref, a.beta, a.kl + n, parts + 4, parts + 5); break;
      default: kl_row<kTv>(x, y, a.columns, policy, ref, a.beta, a.kl + n, parts + 4, parts + 5); break;
    }
  }
}

// ------------------------------------------------------------------------------------------- backward

template <class T>
inline void store_some(Vec v, int count, T* to) {
  if (count == kLanes) {
    store(v, to);
  } else {
    for (int j = 0; j < count; ++j) from_float(v[j], to + j);
  }
}

template <int kKind, class T>
inline void kl_gradient_row(const T* x, const T* y, int64_t columns, const RowNorm& policy, const RowNorm& ref,
                            float beta, float mean_p, float mean_q, float grad_kl, T* grad_x, T* grad_y) {
  for_each_pair(x, y, columns, [&](Vec vx, Vec vy, int64_t first, int count) {
    Vec slope_x, slope_y;
    const Vec logp = policy.logprob(vx, &slope_x), logq = ref.logprob(vy, &slope_y);
    KlTerms t = kl_terms<kKind>(logp, logq, beta);
    if (kKind == kForward) t.p = exp(logp);
    if (kKind == kReverse) t.q = exp(logq);
    if (grad_x) {
      const Vec dz = kKind == kForward ? t.p - t.q : zero_unless(t.p, t.p * (t.slope_p - mean_p));
      store_some(grad_kl * dz * slope_x, count, grad_x + first);
    }
    if (grad_y) {
      const Vec dy = kKind == kReverse ? t.q - t.p : zero_unless(t.q, t.q * (t.slope_q - mean_q));
      store_some(grad_kl * dy * slope_y, count, grad_y + first);
    }
  });
}

template <class T>
void token_kl_backward(const TokenKlArgs& a, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const T* x = static_cast<const T*>(a.logits) + row_offset(a.rows, n);
    const T* y = static_cast<const T*>(a.ref_logits) + row_offset(a.ref_rows, n);
    T* grad_x = a.grad_logits ? static_cast<T*>(a.grad_logits) + n * a.width : nullptr;
    T* grad_y = a.grad_ref_logits ? static_cast<T*>(a.grad_ref_logits) + n * a.width : nullptr;
    const float* parts = a.parts + 6 * n;
    const bool real = !a.mask || a.mask[n];
    // Masked rows and sides that are -inf throughout have no gradient; their memory was not written yet.
    T* live_x = real && parts[0] != -kInf ? grad_x : nullptr;
    T* live_y = real && parts[2] != -kInf ? grad_y : nullptr;
    if (grad_x) zero_row(live_x ? grad_x + a.columns : grad_x, live_x ? a.width - a.columns : a.width);
    if (grad_y) zero_row(live_y ? grad_y + a.columns : grad_y, live_y ? a.width - a.columns : a.width);
    if (!live_x && !live_y) continue;
    const RowNorm policy(a.transform, n, parts[0], parts[1]), ref(a.ref_transform, n, parts[2], parts[3]);
    const float g = a.grad_kl[n], mean_p = parts[4], mean_q = parts[5];
    switch (a.kind) {
      case kReverse:
        kl_gradient_row<kReverse>(x, y, a.columns, policy, ref, a.beta, mean_p, mean_q, g, live_x, live_y);
        break;
      case kForward:
        kl_gradient_row<kForward>(x, y, a.columns, policy, ref, a.beta, mean_p, mean_q, g, live_x, live_y);
        break;
      case kJsd: kl_gradient_row<kJsd>(x, y, a.columns, policy, ref, a.beta, mean_p, mean_q, g, live_x, live_y); break;
      default: kl_gradient_row<kTv>(x, y, a.columns, policy, ref, a.beta, mean_p, mean_q, g, live_x, live_y); break;
    }
  }
}

// ------------------------------------------------------------------------------------------- estimators

template <class T>
void approx_kl(const ApproxKlArgs& a, int64_t begin, int64_t end) {
  const T *logprobs = static_cast<const T*>(a.logprobs), *ref = static_cast<const T*>(a.ref_logprobs);
  const T* ratio = static_cast<const T*>(a.importance_ratio);
  for (int64_t i = begin; i < end; ++i) {
    if (a.mask && !a.mask[i]) {
      a.kl[i] = 0;
      continue;
    }
    const float value = clamp_to(kl_estimate(to_float(logprobs[i]) - to_float(ref[i]), a.estimator), a.clamp);
    a.kl[i] = ratio ? value * to_float(ratio[i]) : value;
  }
}

template <class T>
void approx_kl_backward(const ApproxKlArgs& a, int64_t begin, int64_t end) {
  const T *logprobs = static_cast<const T*>(a.logprobs), *ref = static_cast<const T*>(a.ref_logprobs);
  const T* ratio = static_cast<const T*>(a.importance_ratio);
  for (int64_t i = begin; i < end; ++i) {
    if (a.mask && !a.mask[i]) {
      a.grad_logprobs[i] = 0;
      if (a.grad_ratio) a.grad_ratio[i] = 0;
      continue;
    }
    const float d = to_float(logprobs[i]) - to_float(ref[i]);
    const float slope = kl_estimate_slope(d, a.estimator, a.gradient);
    a.grad_logprobs[i] = a.grad_kl[i] * (ratio ? slope * to_float(ratio[i]) : slope);
    if (a.grad_ratio) a.grad_ratio[i] = a.grad_kl[i] * clamp_to(kl_estimate(d, a.estimator), a.clamp);
  }
}

}  // namespace RF_ISA
}  // namespace rlhf_fast
