// SPDX-License-Identifier: Apache-2.0
// The family logprob on the CPU.
#include "../logprob_binding.h"
#include "device.h"

namespace rlhf_fast {

namespace {

struct CpuLogprob : Cpu {
  static void token_stats(Dtype dtype, const TokenStatsArgs& args, int64_t rows, const Tensor& /*like*/) {
    run_rows(kernels().token_stats[dtype], args, rows, args.columns);
  }
  static void token_stats_backward(Dtype dtype, const TokenStatsBackwardArgs& args, int64_t rows,
                                   const Tensor& /*like*/) {
    run_rows(kernels().token_stats_backward[dtype], args, rows, args.columns);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlhf_fast, CPU, m) { LogprobBinding<CpuLogprob>::register_in(m); }

}  // namespace rlhf_fast
