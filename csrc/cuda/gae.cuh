// SPDX-License-Identifier: Apache-2.0
// GAE and PPO advantages on a GPU: rlhf_fast/ops/gae.py has the mathematics, scan.cuh the scan.
//
// A thread keeps its eight tokens in registers. It goes over them once to compute the affine map that they apply to the
// recurrence's state, gets the state to the right of them from the scan, and goes over them again to write the results.
#pragma once

#include "scan.cuh"
#include "whiten.cuh"

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

// ------------------------------------------------------------------------------------------- gae

// gamma * lam of a sequence, and gamma * value_lam where the returns have their own.
template <int kChains>
struct Decays {
  float of[kChains];

  __device__ __forceinline__ Decays(const GaeArgs& a, const Sequences& sequences, int64_t sequence) {
    const int64_t s = sequence < sequences.count ? sequence : sequences.count - 1;
    of[0] = a.gamma * (a.row_lam ? a.row_lam[s] : a.lam);
    if constexpr (kChains == 2) of[1] = a.gamma * (a.row_value_lam ? a.row_value_lam[s] : a.value_lam);
  }
};

// From a thread's last token to its first. With kWrite the real tokens' rewards become advantages, their values
// returns. Returns whether a sequence ends among them.
template <bool kWrite, int kChains>
__device__ __forceinline__ bool gae_back(const GaeArgs& a, const Sequences& sequences, int64_t first, int64_t behind,
                                         Tokens* tokens, Stretch<kChains>* s) {
  Decays<kChains> decays(a, sequences, behind);
  bool ends = false;
  const auto enter = [&](int64_t sequence) {
    for (float& x : s->constant) x = 0.0f;
    decays = Decays<kChains>(a, sequences, sequence);
    ends = true;
  };
  for_each_sequence(sequences, first, behind, enter, [&](unsigned of_sequence) {
    const unsigned steps = tokens->steps & of_sequence, cuts = tokens->cuts & of_sequence;
    const unsigned written = kWrite ? tokens->real & of_sequence : 0;
#pragma unroll
    for (int j = kTokens - 1; j >= 0; --j) {
      float advantages[kChains];
#pragma unroll
      for (int c = 0; c < kChains; ++c) {
        if (cuts & 1u << j) s->constant[c] = 0.0f;
        if (steps & 1u << j) {
          advantages[c] = step(tokens->rewards[j], tokens->values[j], a.gamma, decays.of[c], c, s);
        }
      }
      if (written & 1u << j) {
        tokens->rewards[j] = advantages[0];
        tokens->values[j] += advantages[kChains - 1];
      }
    }
  });
  return ends;
}

template <class T>
__device__ __forceinline__ Tokens load_gae_tokens(const GaeArgs& a, const Place& place) {
  const Eight<T> rewards = load_tokens(static_cast<const T*>(a.rewards), place);
  const Eight<T> values = load_tokens(static_cast<const T*>(a.values), place);
  const uint64_t mask = a.mask ? load_flags(a.mask, place) : 0;
  const uint64_t dones = a.dones ? load_flags(a.dones, place) : 0;
  const uint64_t truncated = a.truncated ? load_flags(a.truncated, place) : 0;
  Tokens tokens;
  const unsigned all = bits_between(0, place.count);
  tokens.real = a.mask ? bits_of(mask) : all;
  tokens.steps = a.carry ? tokens.real : all;
  tokens.cuts = a.dones ? bits_of(dones) & tokens.real : 0;
#pragma unroll
  for (int j = 0; j < kTokens; ++j) {
    const bool real = tokens.real & 1u << j;
    tokens.rewards[j] = real ? to_float(rewards.values[j]) : 0.0f;
    tokens.values[j] = real ? to_float(values.values[j]) : 0.0f;
  }
  const unsigned cut_off = a.truncated ? bits_of(truncated) & tokens.real & ~tokens.cuts : 0;
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

template <class T, int kChains>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    gae_kernel(const __grid_constant__ GaeArgs a, const __grid_constant__ Sequences sequences, Links links,
               bool packs) {
  const int64_t tile = take_tile(links);
  const Place place = place_in_tile(tile, sequences.total, packs);
  Tokens tokens = load_gae_tokens<T>(a, place);
  const int64_t behind = sequences.of(place.first + kTokens);
  Stretch<kChains> own = Stretch<kChains>::nothing();
  const bool ends = gae_back<false>(a, sequences, place.first, behind, &tokens, &own);
  const Decays<kChains> decays(a, sequences, behind);
#pragma unroll
  for (int c = 0; c < kChains; ++c) {
    own.scale[c] = finished_scale(own.scale[c], decays.of[c], ends || tokens.cuts != 0);
  }
  Stretch<kChains> state = scan_tile(own, tile, sequences, links);
  gae_back<true>(a, sequences, place.first, behind, &tokens, &state);
  store_tokens(tokens.rewards, place, a.advantages);
  store_tokens(tokens.values, place, a.returns);
}

template <class T, int kChains>
cudaError_t launch_gae(const GaeArgs& a, const Sequences& sequences, uint64_t* links, cudaStream_t stream) {
  const cudaError_t error = clear_links(sequences, kChains, links, stream);
  if (error != cudaSuccess) return error;
  const bool packs = aligned(a.rewards, a.values, a.mask, a.dones, a.truncated, a.advantages, a.returns);
  const auto kernel = gae_kernel<T, kChains>;
  RF_LAUNCH(kernel, tiles_of(sequences.total), kTileThreads, stream, a, sequences, Links(links), packs);
  return cudaGetLastError();
}

// One recurrence, or one for the advantages and one for the returns.
inline int gae_chains(const GaeArgs& a) {
  const bool decoupled = a.row_lam != a.row_value_lam || (!a.row_lam && a.lam != a.value_lam);
  return decoupled ? 2 : 1;
}

// Of at least one sequence and one token. `links` has link_bytes(sequences, gae_chains(a)), or is null where that is 0.
inline cudaError_t gae(Dtype dtype, const GaeArgs& a, const Sequences& sequences, uint64_t* links,
                       cudaStream_t stream) {
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    return gae_chains(a) == 2 ? launch_gae<T, 2>(a, sequences, links, stream)
                              : launch_gae<T, 1>(a, sequences, links, stream);
  });
}

// ------------------------------------------------------------------------------------------- ppo_advantages

constexpr int kPpoChains = 2;  // the recurrence, and the score, which is carried to the last real token

// The rewards do not contain the score: it is the initial state, and the first real token from the right takes it.
template <class T>
__device__ __forceinline__ Tokens load_ppo_tokens(const PpoAdvantagesArgs& a, const Place& place) {
  const Eight<T> logprobs = load_tokens(static_cast<const T*>(a.logprobs), place);
  const Eight<T> ref_logprobs = load_tokens(static_cast<const T*>(a.ref_logprobs), place);
  const Eight<T> values = load_tokens(static_cast<const T*>(a.values), place);
  Tokens tokens;
  tokens.real = tokens.steps = bits_of(load_flags(a.mask, place));
  tokens.cuts = 0;
  float kl[kTokens];
#pragma unroll
  for (int j = 0; j < kTokens; ++j) {
    const bool real = tokens.real & 1u << j;
    const float log_ratio = to_float(logprobs.values[j]) - to_float(ref_logprobs.values[j]);
    kl[j] = real ? kl_estimate(log_ratio, a.estimator) : 0.0f;
    tokens.rewards[j] = -a.kl_coef * kl[j];
    tokens.values[j] = real ? to_float(values.values[j]) : 0.0f;
  }
  store_tokens(kl, place, a.kl);
  return tokens;
}

// Goes from a thread's last token to its first. The second state is the score until a token takes it, then 0. If
// `advantages` is given, results are written there, to the rewards, and as returns to the values. Returns whether a
// sequence ends among the tokens.
template <class T>
__device__ __forceinline__ bool ppo_back(const PpoAdvantagesArgs& a, const Sequences& sequences, int64_t first,
                                         int64_t behind, Tokens* tokens, Stretch<kPpoChains>* s, float* advantages) {
  bool ends = false;
  const auto enter = [&](int64_t sequence) {
    const float score = clamp_to(to_float(static_cast<const T*>(a.scores)[sequence]), a.score_clip);
    s->constant[0] = s->constant[1] = score;
    ends = true;
  };
  for_each_sequence(sequences, first, behind, enter, [&](unsigned of_sequence) {
    const unsigned steps = tokens->real & of_sequence;
#pragma unroll
    for (int j = kTokens - 1; j >= 0; --j) {
      if (!(steps & 1u << j)) continue;
      const float advantage = step(tokens->rewards[j], tokens->values[j], a.gamma, a.gamma * a.lam, 0, s);
      if (advantages) {
        advantages[j] = advantage;
        tokens->rewards[j] += s->constant[1];
        tokens->values[j] += advantage;
      }
      s->constant[1] = 0.0f;
    }
  });
  return ends;
}

template <class T>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    ppo_advantages_kernel(const __grid_constant__ PpoAdvantagesArgs a, const __grid_constant__ Sequences sequences,
                          Links links, bool packs, Moments* partial) {
  const int64_t tile = take_tile(links);
  const Place place = place_in_tile(tile, sequences.total, packs);
  Tokens tokens = load_ppo_tokens<T>(a, place);
  const int64_t behind = sequences.of(place.first + kTokens);
  Stretch<kPpoChains> own = Stretch<kPpoChains>::nothing();
  const bool ends = ppo_back<T>(a, sequences, place.first, behind, &tokens, &own, nullptr);
  own.scale[0] = finished_scale(own.scale[0], a.gamma * a.lam, ends);
  own.scale[1] = ends || tokens.real != 0 ? kCut : 1.0f;
  Stretch<kPpoChains> state = scan_tile(own, tile, sequences, links);
  float advantages[kTokens] = {};
  ppo_back<T>(a, sequences, place.first, behind, &tokens, &state, advantages);
  store_tokens(tokens.rewards, place, a.rewards);
  store_tokens(tokens.values, place, a.returns);
  store_tokens(advantages, place, a.advantages);
  Moments sums{};
#pragma unroll
  for (int j = 0; j < kTokens; ++j) {
    if (tokens.real & 1u << j) sums.add(advantages[j]);
  }
  sums = sum_over_block<kTileThreads>(sums);
  if (threadIdx.x == 0) partial[tile] = sums;
}

template <class T>
cudaError_t launch_ppo_advantages(const PpoAdvantagesArgs& a, const Sequences& sequences, uint64_t* links,
                                  Moments* partial, cudaStream_t stream) {
  const cudaError_t error = clear_links(sequences, kPpoChains, links, stream);
  if (error != cudaSuccess) return error;
  const bool packs = aligned(a.logprobs, a.ref_logprobs, a.values, a.mask, a.kl, a.rewards, a.advantages, a.returns);
  const int64_t tiles = tiles_of(sequences.total);
  const auto kernel = ppo_advantages_kernel<T>;
  if (tiles > 0) RF_LAUNCH(kernel, tiles, kTileThreads, stream, a, sequences, Links(links), packs, partial);
  launch_sum_moments(partial, tiles, a.moments, stream);
  return cudaGetLastError();
}

// `links` has link_bytes(sequences, kPpoChains) bytes, null if that is 0; `partial` has one entry per tile.
inline cudaError_t ppo_advantages(Dtype dtype, const PpoAdvantagesArgs& a, const Sequences& sequences, uint64_t* links,
                                  Moments* partial, cudaStream_t stream) {
  return with_dtype(
      dtype, [&](auto zero) { return launch_ppo_advantages<decltype(zero)>(a, sequences, links, partial, stream); });
}

}  // namespace cuda
}  // namespace rlhf_fast
