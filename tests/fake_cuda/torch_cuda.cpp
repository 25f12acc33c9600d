// SPDX-License-Identifier: Apache-2.0
// What the extension looks for in PyTorch's CUDA library. Loaded as Python loads that one: under its name, privately.
#include <cstdint>

static int32_t failing = 0;

extern "C" {

// A stream per device; a number, as nothing looks into it.
int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  *stream = reinterpret_cast<void*>(static_cast<uintptr_t>(0x1000 + device));
  return failing;
}
void fail_to_give_streams(int32_t code) { failing = code; }
}
