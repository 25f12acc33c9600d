// SPDX-License-Identifier: Apache-2.0
// V-trace: see rlhf_fast/ops/vtrace.py for the mathematics.
#pragma once

#include "kl_kernel.h"

namespace rlhf_fast {
namespace RF_ISA {

// The least log-ratio of those that are not -inf. exp underflows below -87; exp(-69) = 1e-30 leaves room for gamma lam:
// down to 1e-7 their product is a normal float32. So a factor is 0, which makes an infinite gain NaN, only where
// gamma, lam or the ratio itself is 0.
constexpr float kLeastLogRatio = -69.0f;

// The limited ratios of tokens [begin, end). A log-ratio that is not read, because its token is masked, counts as 0.
template <class T>
inline void limited_ratios(const VtraceArgs& a, int64_t begin, int64_t end, float* ratios) {
  const T* log_ratios = static_cast<const T*>(a.log_ratios);
  for (int64_t t = begin; t < end; t += kLanes) {
    const int64_t count = end - t;
    Vec x = load_some(log_ratios + t, count);
    if (a.mask) x = load_mask(a.mask + t, count) ? x : Vec{};
    const Vec limited = x > a.log_rho_limit ? splat(a.log_rho_limit) : x;  // NaN stays
    store_some(exp(x > -kInf ? max(splat(kLeastLogRatio), limited) : x), count, ratios + t);
  }
}

// Tokens [begin, end), a sequence, one by one from the last to the first. Where the advantages will be are the ratios.
template <class T>
inline void vtrace_tokens(const VtraceArgs& a, int64_t begin, int64_t end) {
  const T* rewards = static_cast<const T*>(a.rewards);
  const T* values = static_cast<const T*>(a.values);
  float next_value = 0, next_gain = 0;  // V_{t+1} and v_{t+1} - V_{t+1}
  for (int64_t t = end - 1; t >= begin; --t) {
    const bool real = !a.mask || a.mask[t];
    const float ratio = a.advantages[t];
    if (!real && a.carry) {
      a.advantages[t] = a.returns[t] = 0;
      continue;
    }
    const float value = real ? to_float(values[t]) : 0.0f, reward = real ? to_float(rewards[t]) : 0.0f;
    if (real) {
      const bool done = a.dones && a.dones[t], cut = !done && a.truncated && a.truncated[t];
      if (done || cut) next_gain = 0;
      if (done) next_value = 0;
      if (cut) next_value = to_float(static_cast<const T*>(a.bootstrap_values)[t]);
    }
    const float error = reward - value + a.gamma * next_value;
    const float advantage = ratio * (error + a.gamma * next_gain);
    next_gain = fma(a.decay * (ratio > a.c_clip ? a.c_clip : ratio), next_gain, ratio * error);
    next_value = value;
    a.advantages[t] = real ? advantage : 0.0f;
    a.returns[t] = real ? value + next_gain : 0.0f;
  }
}

template <class T>
void vtrace(const VtraceArgs& a, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const int64_t first = a.cu_seqlens ? a.cu_seqlens[n] : n * a.length;
    const int64_t last = a.cu_seqlens ? a.cu_seqlens[n + 1] : first + a.length;
    limited_ratios<T>(a, first, last, a.advantages);
    vtrace_tokens<T>(a, first, last);
  }
}

}  // namespace RF_ISA
}  // namespace rlhf_fast
