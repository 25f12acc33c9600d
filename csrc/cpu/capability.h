// SPDX-License-Identifier: Apache-2.0
// The instruction set of the CPU kernels: the best one that the host and the build have, limited by RLHF_FAST_CPU.
#pragma once

#include "kernels.h"

namespace rlhf_fast {

enum class Capability : int { kDefault = 0, kAvx2 = 1, kAvx512 = 2 };

// The names are those of RLHF_FAST_CPU: "default", "avx2", "avx512".
const char* name_of(Capability capability);
bool parse(const char* name, Capability* capability);

// The best one of this host and this build.
Capability best_capability();

// The same, limited by the environment variable RLHF_FAST_CPU, which is read at the first call, or by the last `cap`.
// An unknown name in the environment sets no limit here; the Python side raises an error for it.
Capability capability();
void cap(Capability limit);

// The kernels of capability().
const KernelTable& kernels();

}  // namespace rlhf_fast
