// SPDX-License-Identifier: Apache-2.0
// The table of CPU kernels for one instruction set. Plain data only, as in args.h.
#pragma once

#include "../args.h"
#include "decode_attention_args.h"

namespace rlhf_fast {

// Every kernel works on rows (or sequences, or elements) [begin, end).
template <class Args>
using Kernel = void (*)(const Args& args, int64_t begin, int64_t end);

struct KernelTable {
  Kernel<TokenStatsArgs> token_stats[kDtypes];
  Kernel<TokenStatsBackwardArgs> token_stats_backward[kDtypes];
  Kernel<TokenKlArgs> token_kl[kDtypes];
  Kernel<TokenKlArgs> token_kl_backward[kDtypes];
  Kernel<TokenKlArgs> token_kl_and_grad[kDtypes];
  Kernel<ApproxKlArgs> approx_kl[kDtypes];
  Kernel<ApproxKlArgs> approx_kl_backward[kDtypes];
  Kernel<GaeArgs> gae[kDtypes];
  Kernel<VtraceArgs> vtrace[kDtypes];
  Kernel<PpoAdvantagesArgs> ppo_advantages[kDtypes];
  Kernel<WhitenArgs> whiten_moments[kDtypes];
  Kernel<WhitenArgs> whiten[kDtypes];
  Kernel<DecodeAttentionArgs> decode_attention[kDtypes];
};

}  // namespace rlhf_fast
