// SPDX-License-Identifier: Apache-2.0
// The family kl on the CPU.
#include "../kl_binding.h"
#include "device.h"

namespace rlhf_fast {

namespace {

struct CpuKl : Cpu {
  static void token_kl(Dtype dtype, const TokenKlArgs& args, int64_t rows, const Tensor& /*like*/) {
    run_rows(kernels().token_kl[dtype], args, rows, 2 * args.columns);
  }
  static void token_kl_backward(Dtype dtype, const TokenKlArgs& args, int64_t rows, const Tensor& /*like*/) {
    run_rows(kernels().token_kl_backward[dtype], args, rows, 2 * args.columns);
  }
  static void token_kl_and_grad(Dtype dtype, const TokenKlArgs& args, int64_t rows, const Tensor& /*like*/) {
    run_rows(kernels().token_kl_and_grad[dtype], args, rows, 4 * args.columns);
  }
  static void approx_kl(Dtype dtype, const ApproxKlArgs& args, int64_t count, const Tensor& /*like*/) {
    run_rows(kernels().approx_kl[dtype], args, count, 1);
  }
  static void approx_kl_backward(Dtype dtype, const ApproxKlArgs& args, int64_t count, const Tensor& /*like*/) {
    run_rows(kernels().approx_kl_backward[dtype], args, count, 1);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlhf_fast, CPU, m) { KlBinding<CpuKl>::register_in(m); }

}  // namespace rlhf_fast
