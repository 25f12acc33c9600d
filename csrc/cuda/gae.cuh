// SPDX-License-Identifier: Apache-2.0
// GAE and PPO advantages on a GPU: rlhf_fast/ops/gae.py has the mathematics, scan.cuh the scan.
//
// A thread keeps its eight tokens in registers. It goes over them once to compute the affine map that they apply to the
// recurrence's state, gets the state to the right of them from the scan, and goes over them again to write the results.
#pragma once

#include "gae_rows.cuh"
#include "gae_tokens.cuh"
#include "whiten.cuh"

namespace rlhf_fast {
namespace cuda {

// ------------------------------------------------------------------------------------------- gae

// The decays of a sequence; past the last sequence, those of the last.
template <int kChains>
__device__ __forceinline__ Decays<kChains> decays_of(const GaeArgs& a, const Sequences& sequences, int64_t sequence) {
  return {a, sequence < sequences.count ? sequence : sequences.count - 1};
}

// Walks from a thread's last token to its first, through all sequences among them. Returns whether one ends there.
template <bool kWrite, int kChains>
__device__ __forceinline__ bool gae_back(const GaeArgs& a, const Sequences& sequences, int64_t first, int64_t behind,
                                         Tokens* tokens, Stretch<kChains>* s) {
  Decays<kChains> decays = decays_of<kChains>(a, sequences, behind);
  bool ends = false;
  const auto enter = [&](int64_t sequence) {
    for (float& x : s->constant) x = 0.0f;
    decays = decays_of<kChains>(a, sequences, sequence);
    ends = true;
  };
  for_each_sequence(sequences, first, behind, enter,
                    [&](unsigned of_sequence) { go_back<kWrite>(a.gamma, decays, of_sequence, tokens, s); });
  return ends;
}

template <class T, int kChains>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    gae_kernel(const __grid_constant__ GaeArgs a, const __grid_constant__ Sequences sequences, Links links,
               bool packs) {
  const int64_t tile = take_tile(links);
  const Place place = place_in_tile(tile, sequences.total, packs);
  Tokens tokens = tokens_of(a, place, load_gae<T>(a, place));
  const int64_t behind = sequences.of(place.first + kTokens);
  Stretch<kChains> own = Stretch<kChains>::nothing();
  const bool ends = gae_back<false>(a, sequences, place.first, behind, &tokens, &own);
  finish_scales(decays_of<kChains>(a, sequences, behind), ends || tokens.cuts != 0, &own);
  Stretch<kChains> state = scan_tile(own, tile, sequences, links);
  gae_back<true>(a, sequences, place.first, behind, &tokens, &state);
  store_tokens(place, Results{tokens.rewards, a.advantages}, Results{tokens.values, a.returns});
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

// At least one sequence and one token. walks: the result of walks_rows(). If false, `links` has
// link_bytes(sequences, gae_chains(a)), or is null where that is 0.
inline cudaError_t gae(Dtype dtype, const GaeArgs& a, const Sequences& sequences, bool walks, uint64_t* links,
                       cudaStream_t stream) {
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (walks) {
      return gae_chains(a) == 2 ? launch_gae_rows<T, 2>(a, sequences.count, stream)
                                : launch_gae_rows<T, 1>(a, sequences.count, stream);
    }
    return gae_chains(a) == 2 ? launch_gae<T, 2>(a, sequences, links, stream)
                              : launch_gae<T, 1>(a, sequences, links, stream);
  });
}

// ------------------------------------------------------------------------------------------- ppo_advantages

constexpr int kPpoChains = 2;  // the recurrence, and the score, which is carried to the last real token

// The rewards do not contain the score: it is the initial state, and the first real token from the right takes it.
template <class T>
__device__ __forceinline__ Tokens load_ppo_tokens(const PpoAdvantagesArgs& a, const Place& place) {
  const auto loads = load_together<T>(place, a.logprobs, a.ref_logprobs, a.values);
  const auto& [logprobs, ref_logprobs, values] = loads.of;
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
  store_tokens(place, Results{kl, a.kl});
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
  store_tokens(place, Results{tokens.rewards, a.rewards}, Results{tokens.values, a.returns},
               Results{advantages, a.advantages});
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
