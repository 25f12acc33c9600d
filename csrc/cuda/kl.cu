// SPDX-License-Identifier: Apache-2.0
// The family kl on a GPU.
#include "../kl_binding.h"
#include "approx_kl.cuh"
#include "device.h"
#include "kl.cuh"

namespace rlhf_fast {

namespace {

void run_token_kl(const char* op, Dtype dtype, const TokenKlArgs& args, int64_t rows, const Tensor& like, int steps) {
  if (rows == 0) return;
  const Launch launch(op, like);
  cuda::RowSplit split{row_parts(op, launch, rows, args.columns, like), false};
  if (steps != cuda::kGradientStep) {
    const bool writes = steps & cuda::kGradientStep, reads_once = args.kind == kReverse || args.kind == kForward;
    const int64_t row_bytes = args.columns * like.element_size() * (writes ? 3 : 2);
    const int64_t rows_in_flight = int64_t{cuda::kRowBlocks} * launch.multiprocessors();
    split = cuda::split_rows(split.parts, rows, rows_in_flight * row_bytes, writes || !reads_once, launch.device());
  }
  const bool handed_on = split.parts > 1 && steps != cuda::kGradientStep;
  const int64_t partial_bytes = handed_on ? rows * split.parts * static_cast<int64_t>(sizeof(cuda::KlPartial)) : 0;
  const Tensor partial = empty_of(like, {partial_bytes}, ScalarType::Byte);
  launch.check(cuda::token_kl(dtype, args, rows, split, steps, partial.mutable_data_ptr(), launch.stream()),
               "token_kl_kernel");
}

void check_count(const char* op, int64_t count) {
  RF_CHECK(cuda::tiles_of(count) <= 0x7fffffff, op, ": logprobs has too many tokens: ", count);
}

struct CudaKl : Cuda {
  static void token_kl(Dtype dtype, const TokenKlArgs& args, int64_t rows, const Tensor& like) {
    run_token_kl("token_kl", dtype, args, rows, like, cuda::kFoldStep | cuda::kMeansStep | cuda::kFinishStep);
  }
  static void token_kl_backward(Dtype dtype, const TokenKlArgs& args, int64_t rows, const Tensor& like) {
    if (args.grad_logits == nullptr && args.grad_ref_logits == nullptr) return;
    run_token_kl("token_kl_backward", dtype, args, rows, like, cuda::kGradientStep);
  }
  static void token_kl_and_grad(Dtype dtype, const TokenKlArgs& args, int64_t rows, const Tensor& like) {
    run_token_kl("token_kl_and_grad", dtype, args, rows, like,
                 cuda::kFoldStep | cuda::kMeansStep | cuda::kFinishStep | cuda::kGradientStep);
  }

  static void approx_kl(Dtype dtype, const ApproxKlArgs& args, int64_t count, const Tensor& like) {
    if (count == 0) return;
    check_count("approx_kl", count);
    const Launch launch("approx_kl", like);
    launch.check(cuda::approx_kl(dtype, args, count, launch.stream()), "approx_kl_kernel");
  }
  static void approx_kl_backward(Dtype dtype, const ApproxKlArgs& args, int64_t count, const Tensor& like) {
    if (count == 0) return;
    check_count("approx_kl_backward", count);
    const Launch launch("approx_kl_backward", like);
    launch.check(cuda::approx_kl_backward(dtype, args, count, launch.stream()), "approx_kl_backward_kernel");
  }
};

}  // namespace

RF_CUDA_LIBRARY(m) { KlBinding<CudaKl>::register_in(m); }

}  // namespace rlhf_fast
