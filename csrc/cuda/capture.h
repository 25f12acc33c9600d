// SPDX-License-Identifier: Apache-2.0
// What may be done while PyTorch captures a stream into a CUDA graph.
#pragma once

#include <cuda_runtime_api.h>

namespace rlhf_fast {

// During its lifetime this thread may do what could disturb a capture of another stream. The driver loads a kernel at
// its first use, and drivers before CUDA 12.3 refuse that during a capture otherwise.
class RelaxedCapture {
 public:
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;  // then the mode before
};

}  // namespace rlhf_fast
