// SPDX-License-Identifier: Apache-2.0
// GAE, the PPO advantages made of it, and whitening: see rlhf_fast/ops/gae.py for the mathematics.
#pragma once

#include "../math.h"
#include "kernels.h"
#include "simd.h"

namespace rlhf_fast {
namespace RF_ISA {

// The recurrence's state, from the last token back.
struct GaeState {
  float next_value = 0;
  float advantage = 0;        // A_{t+1} under lam
  float value_advantage = 0;  // and under value_lam
};

// Tokens [0, length) of one sequence; pointers stand at its first token, flags may be null.
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

template <bool kFlags, bool kDecoupled, class T, class R>
inline void gae_sequence(const GaeSequence<T, R>& s) {
  GaeState state;
  for (int64_t t = s.length - 1; t >= 0; --t) {
    const bool real = !s.mask || s.mask[t];
    const float value = real ? to_float(s.values[t]) : 0.0f, reward = real ? to_float(s.rewards[t]) : 0.0f;
    if (kFlags && real) {
      const bool done = s.dones && s.dones[t];
      const bool cut = !done && s.truncated && s.truncated[t];
      if (done || cut) state = {cut ? to_float(s.bootstrap_values[t]) : 0.0f, 0.0f, 0.0f};
    }
    const float delta = fma(s.gamma, state.next_value, reward) - value;
    const float advantage = fma(s.decay, state.advantage, delta);
    const float value_advantage = kDecoupled ? fma(s.value_decay, state.value_advantage, delta) : advantage;
    s.advantages[t] = real ? advantage : 0.0f;
    s.returns[t] = real ? value_advantage + value : 0.0f;
    if (real || !s.carry) state = {value, advantage, value_advantage};
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
    const bool flags = a.dones || a.truncated, decoupled = lam != value_lam;
    if (flags) {
      decoupled ? gae_sequence<true, true>(s) : gae_sequence<true, false>(s);
    } else {
      decoupled ? gae_sequence<false, true>(s) : gae_sequence<false, false>(s);
    }
  }
}

// ------------------------------------------------------------------------------------------- whitening

template <class T>
inline void moments_of_row(const T* values, const bool* mask, int64_t length, double* moments) {
  double count = 0, sum = 0, squares = 0;
  for (int64_t t = 0; t < length; ++t) {
    if (!mask[t]) continue;
    const double x = to_float(values[t]);
    count += 1;
    sum += x;
    squares += x * x;
  }
  moments[0] = count;
  moments[1] = sum;
  moments[2] = squares;
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
  for (int64_t i = begin * a.length; i < end * a.length; ++i) {
    const double x = a.mask[i] ? to_float(static_cast<const T*>(a.values)[i]) : w.mean;
    a.whitened[i] = a.mask[i] ? static_cast<float>((x - w.mean) * w.scale + w.shift) : 0.0f;
  }
}

// ------------------------------------------------------------------------------------------- ppo_advantages

template <class T>
void ppo_advantages(const PpoAdvantagesArgs& a, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const int64_t row = n * a.length;
    const T *logprobs = static_cast<const T*>(a.logprobs) + row, *ref = static_cast<const T*>(a.ref_logprobs) + row;
    const bool* mask = a.mask + row;
    int64_t last = -1;
    for (int64_t t = 0; t < a.length; ++t) {
      a.kl[row + t] = mask[t] ? kl_estimate(to_float(logprobs[t]) - to_float(ref[t]), a.estimator) : 0.0f;
      a.rewards[row + t] = mask[t] ? -a.kl_coef * a.kl[row + t] : 0.0f;
      if (mask[t]) last = t;
    }
    if (last >= 0) a.rewards[row + last] += clamp_to(to_float(static_cast<const T*>(a.scores)[n]), a.score_clip);
    gae_sequence<false, false>(GaeSequence<T, float>{a.rewards + row, static_cast<const T*>(a.values) + row, mask,
                                                     nullptr, nullptr, nullptr, a.length, a.gamma, a.gamma * a.lam,
                                                     0.0f, true, a.advantages + row, a.returns + row});
    moments_of_row(a.advantages + row, mask, a.length, a.row_moments + 3 * n);
  }
}

}  // namespace RF_ISA
}  // namespace rlhf_fast
