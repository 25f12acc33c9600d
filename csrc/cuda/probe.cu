// SPDX-License-Identifier: Apache-2.0
#include "probe.h"

#include "capture.h"
#include "compat.cuh"
#include "torch_stream.h"

namespace rlhf_fast {

namespace {

static __global__ void probe_kernel() {}

std::string version_name(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string failed(const char* what, cudaError_t error) {
  cudaGetLastError();  // clear the error, so that PyTorch does not find it
  return std::string(what) + " failed: " + cudaGetErrorString(error);
}

std::string why_not_driver() {
  int driver = 0, runtime = 0;
  cudaError_t error = cudaDriverGetVersion(&driver);
  if (error == cudaSuccess) error = cudaRuntimeGetVersion(&runtime);
  if (error != cudaSuccess) return failed("the question for the driver's version", error);
  if (driver == 0) return "no NVIDIA driver is installed";
  if (driver / 1000 >= runtime / 1000) return "";
  return "the NVIDIA driver supports CUDA " + version_name(driver) + ", and the kernels were built with CUDA " +
         version_name(runtime) + ": update the driver, or build with a CUDA " + std::to_string(driver / 1000) +
         " toolkit";
}

// Launches on a new stream and waits for the end.
std::string why_not_launch() {
  cudaFuncAttributes attributes;
  cudaError_t error = cudaFuncGetAttributes(&attributes, probe_kernel);
  if (error != cudaSuccess) {
    return failed("loading the kernels", error) + "; build with CUDAARCHS set to this GPU's architecture";
  }
  cudaStream_t stream = nullptr;
  error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  if (error != cudaSuccess) return failed("making a stream", error);
  cudaGetLastError();  // clear errors of earlier callers
  RF_LAUNCH(probe_kernel, 1, 1, stream);
  error = cudaGetLastError();
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  cudaStreamDestroy(stream);
  return error == cudaSuccess ? "" : failed("a first launch", error);
}

}  // namespace

std::string why_not_cuda(int device) {
  if (current_stream_of_torch() == nullptr) return "this process has no PyTorch with CUDA (libtorch_cuda.so)";
  std::string reason = why_not_driver();
  if (!reason.empty()) return reason;
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error != cudaSuccess) return failed("choosing the device", error);
  {
    const RelaxedCapture relaxed;  // this thread may be capturing another stream
    reason = why_not_launch();
  }
  cudaSetDevice(before);
  return reason;
}

}  // namespace rlhf_fast
