// SPDX-License-Identifier: Apache-2.0
// Whether the CUDA kernels of this build run on a device of this machine.
#pragma once

#include <string>

namespace rlhf_fast {

// Empty when they run there, else the reason that they do not. Launches a kernel of one thread and waits for it, on a
// stream of its own; PyTorch's streams, a capture in progress and the current device stay as they are.
std::string why_not_cuda(int device);

}  // namespace rlhf_fast
