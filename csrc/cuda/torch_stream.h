// SPDX-License-Identifier: Apache-2.0
// PyTorch's current CUDA stream, from a library that this extension is not linked to.
#pragma once

#include <dlfcn.h>

#include <atomic>
#include <cstdint>

namespace rlhf_fast {

// aoti_torch_get_current_cuda_stream of PyTorch's C interface; returns 0 on success.
using CurrentStream = int32_t (*)(int32_t device, void** stream);

// Null where no PyTorch with CUDA is loaded. The function lives in libtorch_cuda.so alone. A link to that library would
// keep the extension from loading beside a PyTorch without CUDA, and a weak reference stays unresolved: Python loads
// PyTorch's libraries privately. So the library is looked up by its name among those that are loaded.
inline CurrentStream current_stream_of_torch() {
  static std::atomic<CurrentStream> known{nullptr};
  CurrentStream found = known.load(std::memory_order_relaxed);
  if (found != nullptr) return found;
  constexpr const char* kFunction = "aoti_torch_get_current_cuda_stream";
  void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
  void* symbol = library != nullptr ? dlsym(library, kFunction) : nullptr;
  if (symbol == nullptr) symbol = dlsym(RTLD_DEFAULT, kFunction);  // a PyTorch in one library, loaded for all
  found = reinterpret_cast<CurrentStream>(symbol);
  known.store(found, std::memory_order_relaxed);
  return found;
}

}  // namespace rlhf_fast
