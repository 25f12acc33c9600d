// SPDX-License-Identifier: Apache-2.0
// Whether the CUDA kernels of this build run on a device of this machine.
#pragma once

#include <string>

namespace rlhf_fast {

// Empty if they run there, else the reason why not. Launches a kernel of one thread on a new stream and waits for it;
// PyTorch's streams, a capture in progress and the current device are not affected.
std::string why_not_cuda(int device);

}  // namespace rlhf_fast
