// SPDX-License-Identifier: Apache-2.0
// The arguments of kernels: one struct of plain data for each op, the same on CPU and GPU.
// This header is compiled with different instruction sets and by nvcc, so it defines no functions.
#pragma once

#include <cstdint>

namespace rlhf_fast {

enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kDtypes = 3 };

// Where row n of a tensor (..., V) begins: leading sizes and strides in elements, outermost first.
struct RowIndex {
  static constexpr int kMaxDims = 8;
  int dims;
  int64_t sizes[kMaxDims];
  int64_t strides[kMaxDims];
};

// z = softcap * tanh(scale * x / softcap) / temperature; softcap 0 leaves the tanh out.
struct LogitTransform {
  const float* row_temperature;  // (N,) or null
  float temperature;
  float scale;
  float softcap;
};

struct TokenStatsArgs {
  const void* logits;  // rows of `width` entries, of which the first `columns` are the vocabulary
  RowIndex rows;
  int64_t width;
  int64_t columns;
  LogitTransform transform;
  const int64_t* targets;  // (N, k) or null
  int64_t k;
  const bool* mask;  // (N,) or null
  int outputs;       // bits of Output
  float* logprobs;   // (N, k)
  float* entropy;    // (N,), like the next three; null if not requested
  float* logsumexp;
  float* sum_sq_probs;
  int64_t* argmax;
  float* parts;  // (N, 2): row max of u (cpu/logprob_kernel.h), log-sum
};

struct TokenStatsBackwardArgs {
  const void* logits;
  RowIndex rows;
  int64_t width;
  int64_t columns;
  LogitTransform transform;
  const int64_t* targets;  // (N, k) or null
  int64_t k;
  const bool* mask;             // (N,) or null
  const float* grad_logprobs;   // (N, k) or null
  const float* grad_entropy;    // (N,) or null
  const float* grad_logsumexp;  // (N,) or null
  const float* entropy;         // (N,) or null
  const float* parts;           // (N, 2)
  void* grad_logits;            // may be `logits`
  RowIndex grad_rows;
  float* at_targets;  // (N, k), scratch memory, GPU only
};

struct TokenKlArgs {
  const void* logits;
  const void* ref_logits;
  RowIndex rows;
  RowIndex ref_rows;
  int64_t width;
  int64_t columns;
  LogitTransform transform;
  LogitTransform ref_transform;
  const bool* mask;  // (N,) or null
  int kind;
  float beta;
  float* kl;     // (N,)
  float* parts;  // (N, 6): max, log-sum, ref max, ref log-sum, sum p s_p, sum q s_q
  // backward only
  const float* grad_kl;   // (N,)
  void* grad_logits;      // (N, width) or null
  void* grad_ref_logits;  // (N, width) or null
};

struct ApproxKlArgs {
  const void* logprobs;  // (N,), as all others
  const void* ref_logprobs;
  const void* importance_ratio;  // or null
  const bool* mask;              // or null
  int estimator;
  int gradient;
  float clamp;
  float* kl;
  // backward only
  const float* grad_kl;
  float* grad_logprobs;
  float* grad_ratio;  // or null
};

// Sequence s covers `length` tokens: a row of (B, T), or [cu_seqlens[s], cu_seqlens[s + 1]) of (total,).
struct GaeArgs {
  const void* rewards;
  const void* values;
  const bool* mask;  // each of the next four may be null
  const bool* dones;
  const bool* truncated;
  const void* bootstrap_values;
  const int64_t* cu_seqlens;  // (S + 1,) or null
  int64_t length;             // T where cu_seqlens is null
  const float* row_lam;       // (S,) or null
  const float* row_value_lam;
  float gamma;
  float lam;
  float value_lam;
  bool carry;
  float* advantages;
  float* returns;
};

// As GaeArgs; the ratios are limited by their logarithm, before the exponential.
struct VtraceArgs {
  const void* rewards;
  const void* values;
  const void* log_ratios;
  const bool* mask;  // each of the next five may be null
  const bool* dones;
  const bool* truncated;
  const void* bootstrap_values;
  const int64_t* cu_seqlens;  // (S + 1,)
  int64_t length;             // T where cu_seqlens is null
  float gamma;
  float decay;          // gamma lam
  float log_rho_limit;  // rho_clip's
  float c_clip;
  bool carry;
  float* advantages;
  float* returns;
};

struct PpoAdvantagesArgs {
  const void* scores;  // (B,)
  const void* logprobs;
  const void* ref_logprobs;
  const void* values;
  const bool* mask;
  int64_t length;
  float kl_coef;
  int estimator;
  float gamma;
  float lam;
  float score_clip;
  float* kl;
  float* rewards;
  float* advantages;
  float* returns;
  double* row_moments;  // (B, 3): count, sum, sum of squares of the advantages
  double* moments;      // (3,): their sum
};

struct WhitenArgs {
  const void* values;  // rows of `length`
  const bool* mask;
  int64_t length;
  double* row_moments;  // (B, 3), for whiten_moments
  double* moments;      // (3,): their sum, written by whiten_moments, read by whiten
  bool shift_mean;
  float* whitened;
};

}  // namespace rlhf_fast
