// SPDX-License-Identifier: Apache-2.0
// The CPU as a device of the bindings: its kernels take ranges of rows, divided over PyTorch's threads.
#pragma once

#include <algorithm>

#include "../binding.h"
#include "capability.h"

namespace rlhf_fast {

struct Cpu {
  static constexpr const char* kName = "the CPU";
  static constexpr bool kHostMemory = true;  // a binding may read values
  static bool owns(const Tensor& x) { return x.is_cpu(); }
};

// Runs kernel(args, begin, end) over `rows` rows that each cost `work` logits of token_logprobs, on PyTorch's threads.
// Waking and joining a sleeping thread takes tens of microseconds, so a thread is only used for at least about 90 us of
// work: docs/performance.md has the measurements.
template <class Args>
void run_rows(Kernel<Args> kernel, const Args& args, int64_t rows, int64_t work) {
  constexpr int64_t kThreadsWork = 262144;
  const int64_t threads = std::max<int64_t>(1, rows * work / kThreadsWork);
  const int64_t grain = (rows + threads - 1) / threads;  // parallel_for takes as many threads as there are grains
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace rlhf_fast
