// SPDX-License-Identifier: Apache-2.0
// The family logprob on a GPU.
#include "../logprob_binding.h"
#include "device.h"
#include "logprob.cuh"

namespace rlhf_fast {

namespace {

struct CudaLogprob : Cuda {
  static void token_stats(Dtype dtype, const TokenStatsArgs& args, int64_t rows, const Tensor& like) {
    if (rows == 0) return;
    const Launch launch("token_stats", like);
    const int parts = row_parts("token_stats", launch, rows, args.columns, like);
    const Tensor partial = empty_of(like, {parts == 1 ? 0 : rows * parts * cuda::kFoldSize}, ScalarType::Byte);
    const bool together = cuda::run_together(parts, launch.device());
    launch.check(cuda::token_stats(dtype, args, rows, parts, together, partial.mutable_data_ptr(), launch.stream()),
                 "token_stats_kernel");
  }

  static void token_stats_backward(Dtype dtype, TokenStatsBackwardArgs args, int64_t rows, const Tensor& like) {
    if (rows == 0) return;
    const Launch launch("token_stats_backward", like);
    const int parts = row_parts("token_stats_backward", launch, rows, args.columns, like);
    const Tensor at_targets = empty_of(like, {rows * args.k}, ScalarType::Float);
    args.at_targets = mutable_data_of<float>(at_targets);
    launch.check(cuda::token_stats_backward(dtype, args, rows, parts, launch.stream()), "token_stats_backward_kernel");
  }
};

}  // namespace

RF_CUDA_LIBRARY(m) { LogprobBinding<CudaLogprob>::register_in(m); }

}  // namespace rlhf_fast
