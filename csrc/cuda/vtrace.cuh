// SPDX-License-Identifier: Apache-2.0
// V-trace on a GPU: rlhf_fast/ops/vtrace.py has the mathematics, scan.cuh the scan.
//
// A block goes along a whole sequence, tile by tile from its end, and keeps two states: the next value, and what the
// next token's target is above its value. A token's map of the second contains the first, so the first is scanned
// before. Short sequences leave most threads of a block idle; a long one is one block's.
#pragma once

#include "gae_tokens.cuh"

namespace rlhf_fast {
namespace cuda {

// The least log-ratio of those that are not -inf. exp underflows below -87; exp(-69) = 1e-30 leaves room for gamma lam:
// down to 1e-7 their product is a normal float32. So a factor is 0, which makes an infinite gain NaN, only where
// gamma, lam or the ratio itself is 0.
constexpr float kLeastLogRatio = -69.0f;

// What a thread knows of its tokens.
struct OffPolicyTokens {
  float errors[kTokens];  // r_t - V_t, then with gamma V_{t+1}; 0 where masked
  float values[kTokens];
  float ratios[kTokens];  // limited by rho_clip; 1 where masked, as far as rho_clip lets it
  unsigned real;          // a bit a token, as the next three
  unsigned steps;         // what the recurrence does not step over
  unsigned dones;         // real ones
  unsigned truncated;     // real ones that are not done
};

// Bounds in device memory are not checked: whatever they are, the tokens exist.
struct Span64 {
  int64_t begin;
  int64_t end;
};
__device__ __forceinline__ Span64 tokens_of_sequence(const Sequences& sequences, int64_t s) {
  const auto inside = [&](int64_t x) { return x < 0 ? int64_t{0} : (x < sequences.total ? x : sequences.total); };
  return {inside(sequences.begin_of(s)), inside(sequences.begin_of(s + 1))};
}

template <class T>
__device__ __forceinline__ OffPolicyTokens load_off_policy(const VtraceArgs& a, const Place& place) {
  const auto loads = load_together<T>(place, a.rewards, a.values, a.log_ratios);
  const auto& [rewards, values, log_ratios] = loads.of;
  const unsigned all = bits_between(0, place.count);
  OffPolicyTokens tokens;
  tokens.real = a.mask ? bits_of(load_flags(a.mask, place)) : all;
  tokens.steps = a.carry ? tokens.real : all;
  tokens.dones = a.dones ? bits_of(load_flags(a.dones, place)) & tokens.real : 0;
  tokens.truncated = a.truncated ? bits_of(load_flags(a.truncated, place)) & tokens.real & ~tokens.dones : 0;
#pragma unroll
  for (int j = 0; j < kTokens; ++j) {
    const bool real = tokens.real & 1u << j;
    tokens.values[j] = real ? to_float(values.values[j]) : 0.0f;
    tokens.errors[j] = real ? to_float(rewards.values[j]) - tokens.values[j] : 0.0f;
    const float log_ratio = real ? to_float(log_ratios.values[j]) : 0.0f;
    const float limited = log_ratio > a.log_rho_limit ? a.log_rho_limit : log_ratio;  // NaN stays
    tokens.ratios[j] = expf(limited > -kInf ? fmaxf(limited, kLeastLogRatio) : limited);
  }
  return tokens;
}

// The map of the next value: a token that counts replaces it.
__device__ __forceinline__ Stretch<1> next_value_map(const OffPolicyTokens& tokens) {
  Stretch<1> s = Stretch<1>::nothing();
#pragma unroll
  for (int j = kTokens - 1; j >= 0; --j) {
    if (tokens.steps & 1u << j) s = {{tokens.values[j]}, {kCut}};
  }
  return s;
}

// Adds gamma V_{t+1} to each token's error, given the next value behind the thread's tokens.
template <class T>
__device__ __forceinline__ void add_next_values(const VtraceArgs& a, const Place& place, float next,
                                                OffPolicyTokens* tokens) {
#pragma unroll
  for (int j = kTokens - 1; j >= 0; --j) {
    if (!(tokens->steps & 1u << j)) continue;
    float following = tokens->dones & 1u << j ? 0.0f : next;
    if (tokens->truncated & 1u << j) following = to_float(static_cast<const T*>(a.bootstrap_values)[place.first + j]);
    tokens->errors[j] = fmaf(a.gamma, following, tokens->errors[j]);
    next = tokens->values[j];
  }
}

// From a thread's last token to its first: what they make of the gain v - V behind them. With kWrite the errors become
// advantages, the values returns.
template <bool kWrite>
__device__ __forceinline__ void gains_back(const VtraceArgs& a, OffPolicyTokens* tokens, Stretch<1>* s) {
  const unsigned cuts = tokens->dones | tokens->truncated;
#pragma unroll
  for (int j = kTokens - 1; j >= 0; --j) {
    if (!(tokens->steps & 1u << j)) continue;
    const float ratio = tokens->ratios[j], error = tokens->errors[j];
    const float decay = a.decay * (ratio > a.c_clip ? a.c_clip : ratio);
    if (cuts & 1u << j) *s = Stretch<1>::end();
    const float advantage = ratio * fmaf(a.gamma, s->constant[0], error);
    s->constant[0] = fmaf(decay, s->constant[0], ratio * error);
    if (s->scale[0] != kCut) s->scale[0] = product(s->scale[0], decay);
    if (kWrite) {
      const bool real = tokens->real & 1u << j;
      tokens->errors[j] = real ? advantage : 0.0f;
      tokens->values[j] = real ? tokens->values[j] + s->constant[0] : 0.0f;
    }
  }
}

// Block b has sequence b.
template <class T>
__global__ void __launch_bounds__(kTileThreads, 3)
    vtrace_kernel(const __grid_constant__ VtraceArgs a, const __grid_constant__ Sequences sequences, bool packs) {
  constexpr int kWarps = kTileThreads / kWarp;
  RF_SHARED(Stretch<1>, warps, 2 * kWarps);  // one scan writes while another's are still read
  const Span64 span = tokens_of_sequence(sequences, blockIdx.x);
  const bool whole = packs && span.begin % kTokens == 0;
  Stretch<1> value_behind = Stretch<1>::end(), gain_behind = Stretch<1>::end();  // of the tile; the first warp's
  const auto keep = [&](Stretch<1>* behind) {
    return [=](const Stretch<1>& from_warp) {
      const Stretch<1> now = *behind;
      *behind = join(broadcast_warp(from_warp), now);
      return now;
    };
  };
  for (int64_t tile = (span.end - span.begin + kTile - 1) / kTile - 1; tile >= 0; --tile) {
    const int64_t first = span.begin + tile * kTile + static_cast<int64_t>(threadIdx.x) * kTokens;
    const int64_t left = span.end - first;
    const Place place{first, static_cast<int>(left < 0 ? 0 : (left < kTokens ? left : kTokens)),
                      whole && span.begin + (tile + 1) * kTile <= span.end};
    OffPolicyTokens tokens = load_off_policy<T>(a, place);
    const Stretch<1> next_value = scan_block(next_value_map(tokens), warps, keep(&value_behind));
    add_next_values<T>(a, place, next_value.constant[0], &tokens);
    Stretch<1> own = Stretch<1>::nothing();
    gains_back<false>(a, &tokens, &own);
    Stretch<1> gain = scan_block(own, warps + kWarps, keep(&gain_behind));
    gains_back<true>(a, &tokens, &gain);
    store_tokens(place, Results{tokens.errors, a.advantages}, Results{tokens.values, a.returns});
  }
}

template <class T>
cudaError_t launch_vtrace(const VtraceArgs& a, const Sequences& sequences, cudaStream_t stream) {
  const bool packs = aligned(a.rewards, a.values, a.log_ratios, a.mask, a.dones, a.truncated, a.advantages, a.returns);
  const auto kernel = vtrace_kernel<T>;
  RF_LAUNCH(kernel, sequences.count, kTileThreads, stream, a, sequences, packs);
  return cudaGetLastError();
}

// At least one sequence and one token.
inline cudaError_t vtrace(Dtype dtype, const VtraceArgs& a, const Sequences& sequences, cudaStream_t stream) {
  return with_dtype(dtype, [&](auto zero) { return launch_vtrace<decltype(zero)>(a, sequences, stream); });
}

}  // namespace cuda
}  // namespace rlhf_fast
