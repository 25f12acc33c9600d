// SPDX-License-Identifier: Apache-2.0
// PyTorch's current CUDA stream, from a library that this extension is not linked to.
#pragma once

#include <dlfcn.h>

#include <atomic>
#include <cstdint>

namespace rlhf_fast {

// aoti_torch_get_current_cuda_stream of PyTorch's C interface; returns 0 on success.
using CurrentStream = int32_t (*)(int32_t device, void** stream);

// Null if no PyTorch with CUDA is loaded. The function exists only in libtorch_cuda.so. If the extension were linked to
// it, it would not load with a PyTorch without CUDA; a weak reference would stay unresolved, since Python loads
// PyTorch's libraries with local symbols. So the library is looked up by name among those that are loaded.
inline CurrentStream current_stream_of_torch() {
  static std::atomic<CurrentStream> known{nullptr};
  CurrentStream found = known.load(std::memory_order_relaxed);
  if (found != nullptr) return found;
  constexpr const char* kFunction = "aoti_torch_get_current_cuda_stream";
  void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
  void* symbol = library != nullptr ? dlsym(library, kFunction) : nullptr;
  if (symbol == nullptr) symbol = dlsym(RTLD_DEFAULT, kFunction);  // a PyTorch built as one library with global symbols
  found = reinterpret_cast<CurrentStream>(symbol);
  known.store(found, std::memory_order_relaxed);
  return found;
}

}  // namespace rlhf_fast
