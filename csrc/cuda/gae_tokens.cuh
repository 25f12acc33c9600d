// SPDX-License-Identifier: Apache-2.0
// What a thread of the GAE kernels does with its eight tokens: reads them, and goes along them from the last to the
// first, once to learn what they do to the recurrence's state, and once more, with the state behind them, for the
// results.
#pragma once

#include "scan.cuh"

namespace rlhf_fast {
namespace cuda {

// The recurrence's state is what a token's advantage takes from its right: A_t = r_t - V_t + x, where x is
// gamma (V_{t+1} + lam A_{t+1}), 0 or the score behind a sequence's last token, and 0 after a done. Truncation adds its
// gamma * bootstrap to the reward, and is a done from then on.
struct Tokens {
  float rewards[kTokens];  // 0 where masked, as the values
  float values[kTokens];
  unsigned real;   // a bit a token, as the next two
  unsigned steps;  // what the recurrence does not step over: the real ones, with mask_mode zero all
  unsigned cuts;   // real ones that end an episode
};

// A token to the left: its advantage. `s` is the state, or what the thread's tokens make of the state behind them.
template <int kChains>
__device__ __forceinline__ float step(float reward, float value, float gamma, float decay, int chain,
                                      Stretch<kChains>* s) {
  const float advantage = (reward - value) + s->constant[chain];
  s->constant[chain] = fmaf(decay, advantage, gamma * value);
  s->scale[chain] *= decay;
  return advantage;
}

// The scale after a thread's steps: not 0 where it only underflowed, see product().
__device__ __forceinline__ float finished_scale(float scale, float decay, bool cut) {
  return cut ? kCut : fmaxf(scale, fminf(decay, __FLT_DENORM_MIN__));
}

// gamma * lam of a sequence, and gamma * value_lam where the returns have their own.
template <int kChains>
struct Decays {
  float of[kChains];

  __device__ __forceinline__ Decays(const GaeArgs& a, int64_t s) {
    of[0] = a.gamma * (a.row_lam ? a.row_lam[s] : a.lam);
    if constexpr (kChains == 2) of[1] = a.gamma * (a.row_value_lam ? a.row_value_lam[s] : a.value_lam);
  }
};

// The scales after a thread's steps, of which `cut` says that one ends an episode or a sequence.
template <int kChains>
__device__ __forceinline__ void finish_scales(const Decays<kChains>& decays, bool cut, Stretch<kChains>* s) {
#pragma unroll
  for (int c = 0; c < kChains; ++c) s->scale[c] = finished_scale(s->scale[c], decays.of[c], cut);
}

// What a thread reads of its tokens. Conversions are left for later, so that the next tile's may be on their way while
// one is worked on.
template <class T>
struct GaeLoads {
  Eight<T> rewards;
  Eight<T> values;
  uint64_t mask;  // a byte a token, as the next two; 0 where there is none
  uint64_t dones;
  uint64_t truncated;
};

template <class T>
__device__ __forceinline__ GaeLoads<T> load_gae(const GaeArgs& a, const Place& place) {
  const auto loads = load_together<T>(place, a.rewards, a.values);
  const auto& [rewards, values] = loads.of;
  return {rewards, values, a.mask ? load_flags(a.mask, place) : 0, a.dones ? load_flags(a.dones, place) : 0,
          a.truncated ? load_flags(a.truncated, place) : 0};
}

template <class T>
__device__ __forceinline__ Tokens tokens_of(const GaeArgs& a, const Place& place, const GaeLoads<T>& loads) {
  Tokens tokens;
  const unsigned all = bits_between(0, place.count);
  tokens.real = a.mask ? bits_of(loads.mask) : all;
  tokens.steps = a.carry ? tokens.real : all;
  tokens.cuts = a.dones ? bits_of(loads.dones) & tokens.real : 0;
#pragma unroll
  for (int j = 0; j < kTokens; ++j) {
    const bool real = tokens.real & 1u << j;
    tokens.rewards[j] = real ? to_float(loads.rewards.values[j]) : 0.0f;
    tokens.values[j] = real ? to_float(loads.values.values[j]) : 0.0f;
  }
  const unsigned cut_off = a.truncated ? bits_of(loads.truncated) & tokens.real & ~tokens.cuts : 0;
  if (cut_off == 0) return tokens;
  tokens.cuts |= cut_off;
  const T* bootstrap_values = static_cast<const T*>(a.bootstrap_values) + place.first;
#pragma unroll
  for (int j = 0; j < kTokens; ++j) {
    if (!(cut_off & 1u << j)) continue;
    tokens.rewards[j] = fmaf(a.gamma, to_float(bootstrap_values[j]), tokens.rewards[j]);
  }
  return tokens;
}

// Along those of a thread's tokens that are of one sequence, a bit each, from the last to the first. With kWrite the
// real tokens' rewards become advantages, their values returns.
template <bool kWrite, int kChains>
__device__ __forceinline__ void go_back(float gamma, const Decays<kChains>& decays, unsigned of_sequence,
                                        Tokens* tokens, Stretch<kChains>* s) {
  const unsigned steps = tokens->steps & of_sequence, cuts = tokens->cuts & of_sequence;
  const unsigned written = kWrite ? tokens->real & of_sequence : 0;
#pragma unroll
  for (int j = kTokens - 1; j >= 0; --j) {
    float advantages[kChains];
#pragma unroll
    for (int c = 0; c < kChains; ++c) {
      if (cuts & 1u << j) s->constant[c] = 0.0f;
      if (steps & 1u << j) advantages[c] = step(tokens->rewards[j], tokens->values[j], gamma, decays.of[c], c, s);
    }
    if (written & 1u << j) {
      tokens->rewards[j] = advantages[0];
      tokens->values[j] += advantages[kChains - 1];
    }
  }
}

// One recurrence, or one for the advantages and one for the returns.
inline int gae_chains(const GaeArgs& a) {
  const bool decoupled = a.row_lam != a.row_value_lam || (!a.row_lam && a.lam != a.value_lam);
  return decoupled ? 2 : 1;
}

}  // namespace cuda
}  // namespace rlhf_fast
