// SPDX-License-Identifier: Apache-2.0
// The CPU as a device of the bindings: its kernels take ranges of rows, spread over PyTorch's threads.
#pragma once

#include "../binding.h"
#include "capability.h"

namespace rlhf_fast {

struct Cpu {
  static constexpr const char* kName = "the CPU";
  static constexpr bool kHostMemory = true;  // a binding may look at values
  static bool owns(const Tensor& x) { return x.is_cpu(); }
};

// Runs kernel(args, begin, end) over `rows` rows that cost `work` entries each, on PyTorch's threads.
template <class Args>
void run_rows(Kernel<Args> kernel, const Args& args, int64_t rows, int64_t work) {
  constexpr int64_t kGrain = 32768;  // entries a thread should have to be worth waking
  const int64_t grain = work >= kGrain ? 1 : kGrain / (work > 0 ? work : 1) + 1;
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace rlhf_fast
