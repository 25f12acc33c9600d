// SPDX-License-Identifier: Apache-2.0
// The family gae on the CPU.
#include "../gae_binding.h"
#include "device.h"

namespace rlhf_fast {

namespace {

// In row order: the same on any number of threads.
void add_moments(const double* row_moments, int64_t rows, double* moments) {
  for (int k = 0; k < 3; ++k) moments[k] = 0;
  for (int64_t n = 0; n < rows; ++n) {
    for (int k = 0; k < 3; ++k) moments[k] += row_moments[3 * n + k];
  }
}

struct CpuGae : Cpu {
  static void gae(Dtype dtype, const GaeArgs& args, int64_t sequences, int64_t total, const Tensor& /*like*/) {
    const int64_t token = args.dones || args.truncated ? 6 : 2;  // with flags the scan is not used
    run_rows(kernels().gae[dtype], args, sequences, sequences > 0 ? token * total / sequences : 1);
  }
  static void vtrace(Dtype dtype, const VtraceArgs& args, int64_t sequences, int64_t total, const Tensor& /*like*/) {
    run_rows(kernels().vtrace[dtype], args, sequences, sequences > 0 ? 8 * total / sequences : 1);
  }
  static void ppo_advantages(Dtype dtype, const PpoAdvantagesArgs& args, int64_t rows, const Tensor& /*like*/) {
    run_rows(kernels().ppo_advantages[dtype], args, rows, 4 * args.length);
    add_moments(args.row_moments, rows, args.moments);
  }
  static void whiten_moments(Dtype dtype, const WhitenArgs& args, int64_t rows, const Tensor& /*like*/) {
    run_rows(kernels().whiten_moments[dtype], args, rows, args.length);
    add_moments(args.row_moments, rows, args.moments);
  }
  static void whiten(Dtype dtype, const WhitenArgs& args, int64_t rows, const Tensor& /*like*/) {
    run_rows(kernels().whiten[dtype], args, rows, args.length);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlhf_fast, CPU, m) { GaeBinding<CpuGae>::register_in(m); }

}  // namespace rlhf_fast
