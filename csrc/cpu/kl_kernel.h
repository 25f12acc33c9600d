// SPDX-License-Identifier: Apache-2.0
// KL divergence per token, exact (two rows of logits) and estimated: see rlhf_fast/ops/kl.py for the mathematics.
//
// The exact KL folds both rows block by block. With s = log p + log Z_p of the policy and t of the reference,
//   KL(p, q) = sum_j e^(s_j) (s_j - t_j) / Z_p - log Z_p + log Z_q
// needs only this one pass. The other kinds, and rows with a forbidden token or NaN, read both rows, now in cache, a
// second time with normalised log-probabilities; there each kind is one expression.
#pragma once

#include "logprob_kernel.h"

namespace rlhf_fast {
namespace RF_ISA {

// Computes s with log p = s - log_sum from a row's logits, and dz/dx.
struct RowNorm {
  RowTransform transform;
  float max;
  float log_sum;

  RowNorm(const LogitTransform& t, int64_t row, float max, float log_sum)
      : transform(t, row), max(max == -kInf ? 0.0f : max), log_sum(log_sum) {}

  template <bool kCap>
  Vec operator()(Vec x, Vec* slope) const {
    const Vec u = transform.operator()<kCap>(x);
    *slope = splat(transform.slope);
    if (kCap) *slope *= 1.0f - (u / transform.cap) * (u / transform.cap);
    return (u - max) * transform.factor;
  }
};

// One vector of entries of the two distributions, and the terms of the kind.
struct KlTerms {
  Vec p;
  Vec q;
  Vec slope_p;  // s_p and s_q: the gradients are p (s_p - sum p s_p), q (s_q - sum q s_q) where of that form
  Vec slope_q;
  Vec distance;  // tv only: |p - q| / 2, summed separately, since sum p s_p + sum q s_q would cancel
  Int infinite;  // reverse and forward: where one side has probability 0 and the divergence is +inf
};

inline Vec zero_unless(Vec weight, Vec x) { return weight == 0.0f ? Vec{} : x; }

// The log-ratio is (s - t) minus the same constant that its mean was computed with: so where p is near 1 and the
// gradient p (log-ratio - mean) cancels, the rounding errors cancel too.
inline Vec log_ratio(Vec s, Vec t, float log_sum_s, float log_sum_t) {
  return t == -kInf ? s - (log_sum_s + kLogFloor) : (s - t) - (log_sum_s - log_sum_t);
}

template <int kKind>
inline KlTerms kl_terms(Vec s, Vec t, const RowNorm& policy, const RowNorm& ref, float beta) {
  const Vec logp = s - policy.log_sum, logq = t - ref.log_sum;
  KlTerms terms{};
  if (kKind != kForward) terms.p = exp(logp);
  if (kKind != kReverse) terms.q = exp(logq);
  if (kKind == kReverse) {
    terms.slope_p = zero_unless(terms.p, log_ratio(s, t, policy.log_sum, ref.log_sum));
    terms.infinite = (terms.p != 0.0f) & (logq == -kInf);
  } else if (kKind == kForward) {
    terms.slope_q = zero_unless(terms.q, log_ratio(t, s, ref.log_sum, policy.log_sum));
    terms.infinite = (terms.q != 0.0f) & (logp == -kInf);
  } else if (kKind == kJsd) {
    const Vec logm = log((1.0f - beta) * terms.p + beta * terms.q);
    terms.slope_p = zero_unless(terms.p, (1.0f - beta) * (logp - logm));
    terms.slope_q = zero_unless(terms.q, beta * (logq - logm));
  } else {
    const Vec d = terms.p - terms.q;
    terms.slope_p = d > 0.0f ? splat(0.5f) : (d < 0.0f ? splat(-0.5f) : 0.0f * d);  // NaN stays NaN
    terms.slope_q = -terms.slope_p;
    terms.distance = d * terms.slope_p;
  }
  return terms;
}

// Sets lanes past the row's end to -inf again after scale and softcap: no probability, no term.
inline Vec pad_out(Vec s, int64_t count) {
  for (int64_t j = count; j < kLanes; ++j) s[j] = -kInf;
  return s;
}

// A block of both rows: the sums of e^s and e^t, and in p->weighted that of e^s (s - t). `next_*` as in fold_block.
template <class T>
inline void fold_pair_block(const Block& x, const Block& y, float factor_x, float factor_y, const T* next_x,
                            const T* next_y, RowFold* p, RowFold* q) {
  const float shift_x = p->safe_max(), shift_y = q->safe_max();
  Vec sum_p[2] = {}, sum_q[2] = {}, gap[2] = {};
  for (int i = 0; i < x.length; i += 2 * kLanes) {
    for (int j = 0; j < 2; ++j) {
      const int at = i + j * kLanes;
      __builtin_prefetch(next_x + at);
      __builtin_prefetch(next_y + at);
      const Vec s = (load(x.u + at) - shift_x) * factor_x, t = (load(y.u + at) - shift_y) * factor_y;
      const Vec e = exp(s);
      sum_p[j] += e;
      sum_q[j] += exp(t);
      gap[j] = fma(e, zero_unless(e, s - t), gap[j]);  // +inf where only q forbids the token
    }
  }
  p->sum += sum_of(sum_p[0] + sum_p[1]);
  q->sum += sum_of(sum_q[0] + sum_q[1]);
  p->weighted += sum_of(gap[0] + gap[1]);
}

template <bool kCap, class T>
inline void fold_pair(const T* x, const T* y, int64_t columns, const RowTransform& of_x, const RowTransform& of_y,
                      RowFold* p, RowFold* q) {
  alignas(64) float u[kBlock];
  alignas(64) float w[kBlock];
  for (int64_t start = 0; start < columns;) {
    const Block block_x = read_block<kCap>(x + start, columns - start, of_x, u);
    const Block block_y = read_block<kCap>(y + start, columns - start, of_y, w);
    p->raise(block_max(block_x.u, block_x.length), of_x.factor, start);
    p->weighted += p->sum * q->raise(block_max(block_y.u, block_y.length), of_y.factor, start);  // every t fell
    start += block_x.count;
    fold_pair_block(block_x, block_y, of_x.factor, of_y.factor, x + start, y + start, p, q);
  }
}

// KL(p, q) from the sums of fold_pair, and the mean of the log-ratio as defined by log_ratio: the same number except
// for the rounding of the log-sums. False if a side is all -inf, q forbids a token that p allows, or there is a NaN:
// then the gap is no number.
inline bool kl_of_folds(const RowFold& p, const RowFold& q, float* kl, float* mean) {
  const double gap = p.weighted / p.sum;
  *kl = static_cast<float>(gap - std::log(p.sum) + std::log(q.sum));
  *mean = static_cast<float>(gap - (p.log_sum() - q.log_sum()));
  return std::isfinite(gap);
}

// sum p s_p and sum q s_q of a row, and the divergence, which is their sum for all kinds except tv.
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
      Vec s = policy.operator()<kCap>(load_some(x + i, columns - i, -kInf), &slope);
      Vec t = ref.operator()<kCap>(load_some(y + i, columns - i, -kInf), &slope);
      if (columns - i < kLanes) {
        s = pad_out(s, columns - i);
        t = pad_out(t, columns - i);
      }
      const KlTerms terms = kl_terms<kKind>(s, t, policy, ref, beta);
      if (kKind != kForward) sum_p = fma(terms.p, terms.slope_p, sum_p);
      if (kKind != kReverse) sum_q = fma(terms.q, terms.slope_q, sum_q);
      if (kKind == kTv) sum_distance += terms.distance;
      if (kKind == kReverse || kKind == kForward) infinite |= terms.infinite;
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
  *kl = unbounded ? kInf : static_cast<float>(total);
}

// Calls f with the kind and the presence of a softcap as compile-time constants.
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
    const RowTransform of_x(a.transform, n), of_y(a.ref_transform, n);
    const bool forward = a.kind == kForward, cap = a.transform.softcap > 0;
    RowFold fold_x, fold_y, *p = forward ? &fold_y : &fold_x, *q = forward ? &fold_x : &fold_y;
    (cap ? fold_pair<true, T> : fold_pair<false, T>)(forward ? y : x, forward ? x : y, a.columns, forward ? of_y : of_x,
                                                     forward ? of_x : of_y, p, q);
    parts[0] = fold_x.saved_max();
    parts[1] = fold_x.log_sum();
    parts[2] = fold_y.saved_max();
    parts[3] = fold_y.log_sum();
    parts[4] = parts[5] = 0;
    if ((a.kind == kReverse || forward) && kl_of_folds(*p, *q, a.kl + n, parts + (forward ? 5 : 4))) continue;
    const RowNorm policy(a.transform, n, parts[0], parts[1]), ref(a.ref_transform, n, parts[2], parts[3]);
    with_kind(a, [&](auto kind, auto cap) {
      kl_row<kind.value, cap.value>(x, y, a.columns, policy, ref, a.beta, a.kl + n, parts + 4, parts + 5);
    });
    if (std::isnan(parts[0]) || std::isnan(parts[2])) {  // kl_row passes over a NaN where the other side is 0
      a.kl[n] = __builtin_nanf("");
      if (!forward) parts[4] = a.kl[n];
      if (a.kind != kReverse) parts[5] = a.kl[n];
    }
  }
}

// ------------------------------------------------------------------------------------------- backward

// Gradients of a row; grad_x or grad_y may be null.
template <int kKind, bool kCap, class T>
inline void kl_gradient_row(const T* x, const T* y, int64_t columns, const RowNorm& policy, const RowNorm& ref,
                            float beta, float mean_p, float mean_q, float grad_kl, T* grad_x, T* grad_y) {
  for (int64_t i = 0; i < columns; i += kLanes) {
    Vec slope_x, slope_y;
    const Vec s = policy.operator()<kCap>(load_some(x + i, columns - i, -kInf), &slope_x);
    const Vec t = ref.operator()<kCap>(load_some(y + i, columns - i, -kInf), &slope_y);
    KlTerms terms = kl_terms<kKind>(s, t, policy, ref, beta);
    if (kKind == kForward) terms.p = exp(s - policy.log_sum);
    if (kKind == kReverse) terms.q = exp(t - ref.log_sum);
    if (grad_x) {
      const Vec dz = kKind == kForward ? terms.p - terms.q : zero_unless(terms.p, terms.p * (terms.slope_p - mean_p));
      store_some(grad_kl * dz * slope_x, columns - i, grad_x + i);
    }
    if (grad_y) {
      const Vec dy = kKind == kReverse ? terms.q - terms.p : zero_unless(terms.q, terms.q * (terms.slope_q - mean_q));
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
    // Masked rows and sides that are all -inf have gradient 0, which is written here.
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

// Row by row, so that both rows are still in cache for the gradient.
template <class T>
void token_kl_and_grad(const TokenKlArgs& a, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    token_kl<T>(a, n, n + 1);
    token_kl_backward<T>(a, n, n + 1);
  }
}

// ------------------------------------------------------------------------------------------- estimators

// As kl_estimate and kl_estimate_slope of math.h.
template <int kEstimator>
inline Vec estimate(Vec d) {
  if (kEstimator == kK1) return d;
  if (kEstimator == kK2) return 0.5f * d * d;
  if (kEstimator == kK3) return d * d < 0.09f ? ExpParts::after_two_terms(-d) * (d * d) : expm1(-d) + d;
  return d < 0.0f ? -d : d;
}

template <int kEstimator>
inline Vec estimate_slope(Vec d, int gradient) {
  if (gradient == kStraightThrough || kEstimator == kK2) return d;
  if (kEstimator == kK1) return splat(1.0f);
  if (kEstimator == kK3) return -expm1(-d);
  return d > 0.0f ? splat(1.0f) : (d < 0.0f ? splat(-1.0f) : 0.0f * d);  // NaN stays NaN
}

inline Vec clamp_to(Vec x, float limit) { return x > limit ? splat(limit) : (x < -limit ? splat(-limit) : x); }

// Calls f with the estimator as a compile-time constant.
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
  with_estimator(a.estimator, [&](auto estimator) {
    for (int64_t i = begin; i < end; i += kLanes) {
      const int64_t count = end - i;
      Vec kl = estimate<estimator.value>(load_some(logprobs + i, count) - load_some(ref + i, count));
      kl = clamp_to(kl, a.clamp);
      if (ratio) kl *= load_some(ratio + i, count);
      if (a.mask) kl = load_mask(a.mask + i, count) ? kl : Vec{};
      store_some(kl, count, a.kl + i);
    }
  });
}

template <class T>
void approx_kl_backward(const ApproxKlArgs& a, int64_t begin, int64_t end) {
  const T *logprobs = static_cast<const T*>(a.logprobs), *ref = static_cast<const T*>(a.ref_logprobs);
  const T* ratio = static_cast<const T*>(a.importance_ratio);
  with_estimator(a.estimator, [&](auto estimator) {
    for (int64_t i = begin; i < end; i += kLanes) {
      const int64_t count = end - i;
      const Int real = a.mask ? load_mask(a.mask + i, count) : Int{} == 0;
      const Vec d = load_some(logprobs + i, count) - load_some(ref + i, count);
      const Vec grad = load_some(a.grad_kl + i, count);
      Vec slope = estimate_slope<estimator.value>(d, a.gradient);
      if (ratio) slope *= load_some(ratio + i, count);
      store_some(real ? grad * slope : Vec{}, count, a.grad_logprobs + i);
      if (!a.grad_ratio) continue;
      const Vec value = clamp_to(estimate<estimator.value>(d), a.clamp);
      store_some(real ? grad * value : Vec{}, count, a.grad_ratio + i);
    }
  });
}

}  // namespace RF_ISA
}  // namespace rlhf_fast
