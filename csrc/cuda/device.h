// SPDX-License-Identifier: Apache-2.0
// The GPU as a device of the bindings: stream, number of multiprocessors, and launches with errors that name the
// kernel.
#pragma once

#include <atomic>

#include "../binding.h"
#include "softmax.cuh"

#ifndef RF_EMULATE
#include <torch/csrc/stable/accelerator.h>

#include "capture.h"
#include "torch_stream.h"
#endif

namespace rlhf_fast {

struct Cuda {
#ifdef RF_EMULATE
  static constexpr const char* kName = "the CPU (emulated GPU)";
  static bool owns(const Tensor& x) { return x.is_cpu(); }
#else
  static constexpr const char* kName = "a CUDA device";
  static bool owns(const Tensor& x) { return x.is_cuda(); }
#endif
  static constexpr bool kHostMemory = false;
};

// During its lifetime the tensor's device is the current one; launches go to PyTorch's current stream of that device.
class Launch {
 public:
#ifdef RF_EMULATE
  Launch(const char* op, const Tensor& /*like*/) : op_(op) {}
  int multiprocessors() const { return 4; }  // few, so that small tests split rows over blocks
#else
  Launch(const char* op, const Tensor& like) : op_(op), device_(like.get_device_index()), guard_(device_) {
    const CurrentStream current_stream = current_stream_of_torch();
    RF_CHECK(current_stream != nullptr, op, ": this process has no PyTorch with CUDA (libtorch_cuda.so)");
    void* stream = nullptr;
    RF_CHECK(current_stream(device_, &stream) == 0, op, ": PyTorch gave no CUDA stream");
    stream_ = static_cast<cudaStream_t>(stream);
  }

  int multiprocessors() const {
    constexpr int kMaxDevices = 64;
    static std::atomic<int> known[kMaxDevices];
    int count = device_ < kMaxDevices ? known[device_].load() : 0;
    if (count == 0) {
      check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device_), "cudaDeviceGetAttribute");
      if (device_ < kMaxDevices) known[device_].store(count);
    }
    return count;
  }
#endif

#ifdef RF_EMULATE
  int device() const { return 0; }
#else
  int device() const { return device_; }
#endif
  cudaStream_t stream() const { return stream_; }

  // Raises the error of a launch, with the kernel's name.
  void check(cudaError_t error, const char* kernel) const {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // clears the runtime's copy, which the next caller would take for its own error
    RF_CHECK(false, op_, ": the CUDA kernel ", kernel, " failed: ", cudaGetErrorString(error));
  }

 private:
  const char* op_;
#ifndef RF_EMULATE
  int device_;
  torch::stable::accelerator::DeviceGuard guard_;
  RelaxedCapture relaxed_;  // the kernel may have to be loaded
#endif
  cudaStream_t stream_ = nullptr;
};

// Checks the limits of a launch; returns the number of blocks per row of logits (see softmax.cuh).
inline int row_parts(const char* op, const Launch& launch, int64_t rows, int64_t columns, const Tensor& logits) {
  constexpr int64_t kMost = 0x7fffffff;
  RF_CHECK(columns <= kMost, op, ": logits must have at most ", kMost, " columns, got ", columns);
  const int64_t parts = cuda::parts_of_row(rows, columns, launch.multiprocessors(), logits.element_size());
  RF_CHECK(rows <= kMost / parts, op, ": logits must have at most ", kMost / parts, " rows, got ", rows);
  return static_cast<int>(parts);
}

}  // namespace rlhf_fast

// Where a family registers: as CUDA kernels of the ops' namespace, or in the namespace of the tests' emulator.
#ifdef RF_EMULATE
#define RF_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(rlhf_fast_emulated, CPU, m)
#else
#define RF_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(rlhf_fast, CUDA, m)
#endif
