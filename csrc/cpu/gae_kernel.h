// SPDX-License-Identifier: Apache-2.0
// GAE, PPO advantages and whitening: see rlhf_fast/ops/gae.py for the mathematics.
#pragma once

#include <cstring>

#include "kl_kernel.h"

namespace rlhf_fast {
namespace RF_ISA {

// Tokens [0, length) of one sequence; pointers are to its first token, mask and flags may be null.
template <class T, class R>
struct GaeSequence {
  const R* rewards;
  const T* values;
  const bool* mask;
  const bool* dones;
  const bool* truncated;
  const T* bootstrap_values;
  int64_t length;
  float gamma;
  float decay;        // gamma lam
  float value_decay;  // gamma value_lam
  bool carry;
  float* advantages;
  float* returns;
};

// The recurrence in S_t = gamma V_t + decay A_t, which token t passes to the token before it: one number instead of
// two. With own = r_t - V_t, A_t = own + S_{t+1} and S_t = decay S_{t+1} + (decay own + gamma V_t); a skipped token
// passes S_{t+1} on.
struct GaeState {
  float handed = 0;        // S with lam
  float value_handed = 0;  // S with value_lam; equal if the two lams are
};

// Tokens [0, end) one by one, from the last to the first.
template <bool kFlags, bool kDecoupled, class T, class R>
inline void gae_tokens(const GaeSequence<T, R>& s, int64_t end, GaeState state) {
  for (int64_t t = end - 1; t >= 0; --t) {
    const bool real = !s.mask || s.mask[t];
    const float value = real ? to_float(s.values[t]) : 0.0f, reward = real ? to_float(s.rewards[t]) : 0.0f;
    if (kFlags && real) {
      const bool done = s.dones && s.dones[t];
      const bool cut = !done && s.truncated && s.truncated[t];
      if (done || cut) state.handed = state.value_handed = cut ? s.gamma * to_float(s.bootstrap_values[t]) : 0.0f;
    }
    const float own = reward - value, next = s.gamma * value;
    const float advantage = own + state.handed, value_advantage = kDecoupled ? own + state.value_handed : advantage;
    s.advantages[t] = real ? advantage : 0.0f;
    s.returns[t] = real ? value_advantage + value : 0.0f;
    if (!real && s.carry) continue;
    state.handed = fma(s.decay, state.handed, fma(s.decay, own, next));
    if (kDecoupled) state.value_handed = fma(s.value_decay, state.value_handed, fma(s.value_decay, own, next));
  }
}

// The same for kLanes tokens at once. Each token is a map S -> c S + b, and maps compose: log2(kLanes) rounds combine
// every lane with the lanes after it. c is the decay in all lanes, unless some are skipped (kMixed).
struct GaeScan {
  Vec decay;
  Vec powers;  // lane i: decay^(kLanes - i)

  explicit GaeScan(float d) : decay(splat(d)) {
    float power = d;
    for (int i = kLanes - 1; i >= 0; --i, power *= d) powers[i] = power;
  }

  template <bool kMixed, int kShift = 1>
  static void join(Vec* b, Vec* c) {
    *b = fma(*c, shift_down<kShift>(*b, Vec{}), *b);
    *c *= kMixed ? shift_down<kShift>(*c, splat(1.0f)) : *c;
    if constexpr (2 * kShift < kLanes) join<kMixed, 2 * kShift>(b, c);
  }

  // The S that each lane receives; *handed is the S that the last lane receives, then the S that the first passes on.
  template <bool kMixed>
  Vec operator()(Vec own, Vec next, Int real, float* handed) const {
    Vec b = fma(decay, own, next), c = decay;  // of a skipped token own and next are 0, and so is b
    if (kMixed) c = real ? c : splat(1.0f);
    join<kMixed>(&b, &c);
    const Vec hands_on = fma(kMixed ? c : powers, splat(*handed), b);
    const Vec given = shift_down<1>(hands_on, splat(*handed));
    *handed = hands_on[0];
    return given;
  }
};

template <bool kMixed, bool kDecoupled, class T, class R>
inline void gae_vector(const GaeSequence<T, R>& s, const GaeScan& scan, const GaeScan& value_scan, int64_t t,
                       GaeState* state) {
  Vec reward = load(s.rewards + t), value = load(s.values + t);
  const Int real = s.mask ? load_mask(s.mask + t) : Int{} == 0;
  if (s.mask) {
    reward = real ? reward : Vec{};
    value = real ? value : Vec{};
  }
  const Vec own = reward - value, next = s.gamma * value;
  Vec advantage = own + scan.operator()<kMixed>(own, next, real, &state->handed);
  Vec returns =
      value + (kDecoupled ? own + value_scan.operator()<kMixed>(own, next, real, &state->value_handed) : advantage);
  if (s.mask) {
    advantage = real ? advantage : Vec{};
    returns = real ? returns : Vec{};
  }
  store(advantage, s.advantages + t);
  store(returns, s.returns + t);
}

template <bool kDecoupled, class T, class R>
inline void gae_vectors(const GaeSequence<T, R>& s) {
  const GaeScan scan(s.decay), value_scan(s.value_decay);
  bool every[kLanes];
  std::memset(every, true, sizeof every);
  GaeState state;
  int64_t t = s.length;
  while (t >= kLanes) {
    t -= kLanes;
    if (s.carry && s.mask && std::memcmp(s.mask + t, every, sizeof every) != 0) {
      gae_vector<true, kDecoupled>(s, scan, value_scan, t, &state);
    } else {
      gae_vector<false, kDecoupled>(s, scan, value_scan, t, &state);
    }
  }
  gae_tokens<false, kDecoupled>(s, t, state);
}

template <class T, class R>
inline void gae_sequence(const GaeSequence<T, R>& s) {
  constexpr float kSmallestDecay = 0.01f;  // to the power of kLanes it is still a normal number
  const bool decoupled = s.decay != s.value_decay, flags = s.dones || s.truncated;
  if (!flags && s.decay >= kSmallestDecay && s.value_decay >= kSmallestDecay) {
    decoupled ? gae_vectors<true>(s) : gae_vectors<false>(s);
  } else {
    decoupled ? gae_tokens<true, true>(s, s.length, {}) : gae_tokens<true, false>(s, s.length, {});
  }
}

template <class T>
void gae(const GaeArgs& a, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const int64_t start = a.cu_seqlens ? a.cu_seqlens[n] : n * a.length;
    const int64_t length = a.cu_seqlens ? a.cu_seqlens[n + 1] - start : a.length;
    const float lam = a.row_lam ? a.row_lam[n] : a.lam;
    const float value_lam = a.row_value_lam ? a.row_value_lam[n] : a.value_lam;
    const GaeSequence<T, T> s{static_cast<const T*>(a.rewards) + start,
                              static_cast<const T*>(a.values) + start,
                              a.mask ? a.mask + start : nullptr,
                              a.dones ? a.dones + start : nullptr,
                              a.truncated ? a.truncated + start : nullptr,
                              a.bootstrap_values ? static_cast<const T*>(a.bootstrap_values) + start : nullptr,
                              length,
                              a.gamma,
                              a.gamma * lam,
                              a.gamma * value_lam,
                              a.carry,
                              a.advantages + start,
                              a.returns + start};
    gae_sequence(s);
  }
}

// ------------------------------------------------------------------------------------------- whitening

template <class T>
inline void moments_of_row(const T* values, const bool* mask, int64_t length, double* moments) {
  Int counts{};
  Wide sums[2] = {}, squares[2] = {};
  for (int64_t t = 0; t < length; t += kLanes) {
    const Int real = load_mask(mask + t, length - t);
    const Vec x = real ? load_some(values + t, length - t) : Vec{};
    counts -= real;  // true is -1
    const Wide halves[2] = {low_half(x), high_half(x)};
    for (int j = 0; j < 2; ++j) {
      sums[j] += halves[j];
      squares[j] += halves[j] * halves[j];
    }
  }
  moments[0] = 0;
  for (int j = 0; j < kLanes; ++j) moments[0] += counts[j];
  moments[1] = sum_of(sums[0] + sums[1]);
  moments[2] = sum_of(squares[0] + squares[1]);
}

template <class T>
void whiten_moments(const WhitenArgs& a, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    moments_of_row(static_cast<const T*>(a.values) + n * a.length, a.mask + n * a.length, a.length,
                   a.row_moments + 3 * n);
  }
}

template <class T>
void whiten(const WhitenArgs& a, int64_t begin, int64_t end) {
  const Whitening w = whitening(a.moments, a.shift_mean);
  const T* values = static_cast<const T*>(a.values);
  const int64_t last = end * a.length;
  for (int64_t i = begin * a.length; i < last; i += kLanes) {
    const Vec x = load_some(values + i, last - i);
    const Vec white = narrow((low_half(x) - w.mean) * w.scale + w.shift, (high_half(x) - w.mean) * w.scale + w.shift);
    store_some(load_mask(a.mask + i, last - i) ? white : Vec{}, last - i, a.whitened + i);
  }
}

// ------------------------------------------------------------------------------------------- ppo_advantages

// The KL and the rewards of one row; the caller adds the score.
template <class T>
inline void penalised_rewards(const PpoAdvantagesArgs& a, const T* logprobs, const T* ref, const bool* mask, float* kl,
                              float* rewards) {
  with_estimator(a.estimator, [&](auto estimator) {
    for (int64_t t = 0; t < a.length; t += kLanes) {
      const int64_t count = a.length - t;
      const Int real = load_mask(mask + t, count);
      const Vec value = estimate<estimator.value>(load_some(logprobs + t, count) - load_some(ref + t, count));
      store_some(real ? value : Vec{}, count, kl + t);
      store_some(real ? -a.kl_coef * value : Vec{}, count, rewards + t);
    }
  });
}

template <class T>
void ppo_advantages(const PpoAdvantagesArgs& a, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const int64_t row = n * a.length;
    const bool* mask = a.mask + row;
    penalised_rewards(a, static_cast<const T*>(a.logprobs) + row, static_cast<const T*>(a.ref_logprobs) + row, mask,
                      a.kl + row, a.rewards + row);
    int64_t last = a.length - 1;
    while (last >= 0 && !mask[last]) --last;
    if (last >= 0)
      a.rewards[row + last] += rlhf_fast::clamp_to(to_float(static_cast<const T*>(a.scores)[n]), a.score_clip);
    gae_sequence(GaeSequence<T, float>{a.rewards + row, static_cast<const T*>(a.values) + row, mask, nullptr, nullptr,
                                       nullptr, a.length, a.gamma, a.gamma * a.lam, a.gamma * a.lam, true,
                                       a.advantages + row, a.returns + row});
    moments_of_row(a.advantages + row, mask, a.length, a.row_moments + 3 * n);
  }
}

}  // namespace RF_ISA
}  // namespace rlhf_fast
