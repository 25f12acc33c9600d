// SPDX-License-Identifier: Apache-2.0
// KL divergence per token, exact (two rows of logits) and estimated: see rlhf_fast/ops/kl.py for the mathematics.
//
// The exact one folds each row on its own (fold_row), then reads both once more, now in cache, with the log-
// probabilities normalised: the divergence is summed from true log-ratios, and each kind is one expression.
#pragma once

#include "logprob_kernel.h"

namespace rlhf_fast {
namespace RF_ISA {

// What turns a row's logits into log-probabilities, and dz/dx beside them.
struct RowNorm {
  RowTransform transform;
  float max;
  float log_sum;

  RowNorm(const LogitTransform& t, int64_t row, float max, float log_sum)
      : transform(t, row), max(max == -kInf ? 0.0f : max), log_sum(log_sum) {}

  template <bool kCap>
  Vec logprob(Vec x, Vec* slope) const {
    const Vec u = transform.operator()<kCap>(x);
    *slope = splat(transform.slope);
    if (kCap) *slope *= 1.0f - (u / transform.cap) * (u / transform.cap);
    return (u - max) * transform.factor - log_sum;
  }
};

// A vector of the two distributions, and the kind's terms in them.
struct KlTerms {
  Vec p;
  Vec q;
  Vec slope_p;  // s_p and s_q: the gradients are p (s_p - sum p s_p), q (s_q - sum q s_q) where of that form
  Vec slope_q;
  Vec distance;  // tv alone: |p - q| / 2, summed for itself, since sum p s_p + sum q s_q would cancel
  Int infinite;  // reverse and forward: where one side has probability 0 and the divergence is +inf
};

inline Vec zero_unless(Vec weight, Vec x) { return weight == 0.0f ? Vec{} : x; }
inline Vec floored(Vec logp) { return logp == -kInf ? splat(kLogFloor) : logp; }

template <int kKind>
inline KlTerms kl_terms(Vec logp, Vec logq, float beta) {
  KlTerms t{};
  if (kKind != kForward) t.p = exp(logp);
  if (kKind != kReverse) t.q = exp(logq);
  if (kKind == kReverse) {
    t.slope_p = zero_unless(t.p, logp - floored(logq));
    t.infinite = (t.p != 0.0f) & (logq == -kInf);
  } else if (kKind == kForward) {
    t.slope_q = zero_unless(t.q, logq - floored(logp));
    t.infinite = (t.q != 0.0f) & (logp == -kInf);
  } else if (kKind == kJsd) {
    const Vec logm = log((1.0f - beta) * t.p + beta * t.q);
    t.slope_p = zero_unless(t.p, (1.0f - beta) * (logp - logm));
    t.slope_q = zero_unless(t.q, beta * (logq - logm));
  } else {
    const Vec d = t.p - t.q;
    t.slope_p = d > 0.0f ? splat(0.5f) : (d < 0.0f ? splat(-0.5f) : 0.0f * d);  // NaN stays NaN
    t.slope_q = -t.slope_p;
    t.distance = d * t.slope_p;
  }
  return t;
}

// Vector i of a row, padded with -inf where the row ends: probability 0, no term.
template <class T>
inline Vec load_padded(const T* x, int64_t i, int64_t columns) {
  if (i + kLanes <= columns) return load(x + i);
  Vec v = splat(-kInf);
  for (int64_t j = i; j < columns; ++j) v[j - i] = to_float(x[j]);
  return v;
}

// The padding again, after a softcap, which makes finite numbers of it.
inline Vec pad_out(Vec logp, int64_t count) {
  for (int64_t j = count; j < kLanes; ++j) logp[j] = -kInf;
  return logp;
}

// sum p s_p and sum q s_q of a row, and the divergence, which is their sum (all kinds but tv are written that way).
template <int kKind, bool kCap, class T>
inline void kl_row(const T* x, const T* y, int64_t columns, const RowNorm& policy, const RowNorm& ref, float beta,
                   float* kl, float* mean_p, float* mean_q) {
  double total_p = 0, total_q = 0, distance = 0;
  Int infinite{};
  for (int64_t start = 0; start < columns; start += kBlock) {
    const int64_t end = std::min<int64_t>(columns, start + kBlock);
    Vec sum_p{}, sum_q{}, sum_distance{};
    for (int64_t i = start; i < end; i += kLanes) {
      Vec slope;
      const Vec logp = policy.logprob<kCap>(load_padded(x, i, columns), &slope);
      const Vec logq = ref.logprob<kCap>(load_padded(y, i, columns), &slope);
      const KlTerms t = kl_terms<kKind>(i + kLanes <= columns ? logp : pad_out(logp, columns - i),
                                        i + kLanes <= columns ? logq : pad_out(logq, columns - i), beta);
      if (kKind != kForward) sum_p = fma(t.p, t.slope_p, sum_p);
      if (kKind != kReverse) sum_q = fma(t.q, t.slope_q, sum_q);
      if (kKind == kTv) sum_distance += t.distance;
      if (kKind == kReverse || kKind == kForward) infinite |= t.infinite;
    }
    total_p += sum_of(sum_p);
    total_q += sum_of(sum_q);
    distance += sum_of(sum_distance);
  }
  bool unbounded = false;
  for (int j = 0; j < kLanes; ++j) unbounded |= infinite[j] != 0;
  *mean_p = static_cast<float>(total_p);
  *mean_q = static_cast<float>(total_q);
  const double total = kKind == kTv ? distance : total_p + total_q;
  *kl = unbounded && total == total ? kInf : static_cast<float>(total);
}

// Calls f with the kind and the presence of a softcap as types' values: kernels are compiled for each pair.
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

template <bool kCap, class F>
inline void with_kind(int kind, const F& f) {
  switch (kind) {
    case kReverse: return f(Constant<kReverse>(), Constant<kCap>());
    case kForward: return f(Constant<kForward>(), Constant<kCap>());
    case kJsd: return f(Constant<kJsd>(), Constant<kCap>());
    default: return f(Constant<kTv>(), Constant<kCap>());
  }
}

template <class F>
inline void with_kind(const TokenKlArgs& a, const F& f) {
  a.transform.softcap > 0 ? with_kind<true>(a.kind, f) : with_kind<false>(a.kind, f);
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
    with_kind(a, [&](auto kind, auto cap) {
      kl_row<kind.value, cap.value>(x, y, a.columns, policy, ref, a.beta, a.kl + n, parts + 4, parts + 5);
    });
  }
}

// ------------------------------------------------------------------------------------------- backward

template <class T>
inline void store_some(Vec v, int64_t count, T* to) {
  if (count >= kLanes) {
    store(v, to);
  } else {
    for (int64_t j = 0; j < count; ++j) from_float(v[j], to + j);
  }
}

// Gradients of a row; grad_x or grad_y may be null.
template <int kKind, bool kCap, class T>
inline void kl_gradient_row(const T* x, const T* y, int64_t columns, const RowNorm& policy, const RowNorm& ref,
                            float beta, float mean_p, float mean_q, float grad_kl, T* grad_x, T* grad_y) {
  for (int64_t i = 0; i < columns; i += kLanes) {
    Vec slope_x, slope_y;
    const Vec logp = policy.logprob<kCap>(load_padded(x, i, columns), &slope_x);
    const Vec logq = ref.logprob<kCap>(load_padded(y, i, columns), &slope_y);
    KlTerms t = kl_terms<kKind>(logp, logq, beta);
    if (kKind == kForward) t.p = exp(logp);
    if (kKind == kReverse) t.q = exp(logq);
    if (grad_x) {
      const Vec dz = kKind == kForward ? t.p - t.q : zero_unless(t.p, t.p * (t.slope_p - mean_p));
      store_some(grad_kl * dz * slope_x, columns - i, grad_x + i);
    }
    if (grad_y) {
      const Vec dy = kKind == kReverse ? t.q - t.p : zero_unless(t.q, t.q * (t.slope_q - mean_q));
      store_some(grad_kl * dy * slope_y, columns - i, grad_y + i);
    }
  }
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
    with_kind(a, [&](auto kind, auto cap) {
      kl_gradient_row<kind.value, cap.value>(x, y, a.columns, policy, ref, a.beta, parts[4], parts[5], a.grad_kl[n],
                                             live_x, live_y);
    });
  }
}

// Row by row, so that the gradient finds both rows in cache.
template <class T>
void token_kl_and_grad(const TokenKlArgs& a, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    token_kl<T>(a, n, n + 1);
    token_kl_backward<T>(a, n, n + 1);
  }
}

// ------------------------------------------------------------------------------------------- estimators

// Calls f with the estimator as a constant: the loops of all but k3, which calls expm1, become vector loops.
template <class F>
inline void with_estimator(int estimator, const F& f) {
  switch (estimator) {
    case kK1: return f(Constant<kK1>());
    case kK2: return f(Constant<kK2>());
    case kK3: return f(Constant<kK3>());
    default: return f(Constant<kAbs>());
  }
}

template <class T>
void approx_kl(const ApproxKlArgs& a, int64_t begin, int64_t end) {
  const T *logprobs = static_cast<const T*>(a.logprobs), *ref = static_cast<const T*>(a.ref_logprobs);
  const T* ratio = static_cast<const T*>(a.importance_ratio);
  const bool* mask = a.mask;  // locals: a store to kl might change a field of `a`, for all the compiler knows
  const float clamp = a.clamp;
  float* kl = a.kl;
  with_estimator(a.estimator, [&](auto estimator) {
    for (int64_t i = begin; i < end; ++i) {
      const float d = to_float(logprobs[i]) - to_float(ref[i]);
      const float value = clamp_to(kl_estimate(d, estimator.value), clamp);
      kl[i] = mask && !mask[i] ? 0.0f : (ratio ? value * to_float(ratio[i]) : value);
    }
  });
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
