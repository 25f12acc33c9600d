// SPDX-License-Identifier: Apache-2.0
// A CUDA runtime that runs nothing: it writes down what the bindings ask of it, and fails on demand. Linked with the
// extension's own CUDA objects, in the place of NVIDIA's, so that what a call does on its way to the GPU can be tested
// without one: guards, streams, launches and their sizes, memory to clear, errors.
//
// Also the two operators that make tensors which say they are on a CUDA device, while their memory is the host's.
#include <cuda_runtime_api.h>
#include <cxxabi.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstdlib>
#include <map>
#include <set>
#include <sstream>
#include <string>
#include <vector>

namespace rlhf_fast {
std::string why_not_cuda(int device);  // the extension's, csrc/cuda/probe.h
}

extern "C" void* fake_cuda_tensor(void* data, int64_t bytes, int64_t dims, const int64_t* sizes, const int64_t* strides,
                                  int32_t dtype, int32_t device);

namespace {

struct Runtime {
  std::map<const void*, std::string> kernels;  // by the address of the host's stub
  std::vector<std::string> lines;
  std::string log;  // of the last fake_cuda_log()
  std::string failing;
  int error = 0;       // what `failing` answers, once
  int last_error = 0;  // for cudaGetLastError()
  int device = 0;
  int driver = CUDART_VERSION;
  int code = 90;  // the architecture whose code would run
  int clusters = 1;
  bool capturing = false;  // as a driver before CUDA 12.3 does it
  cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;
  std::set<const void*> loaded;
  dim3 grid, block;
  size_t shared = 0;
  cudaStream_t stream = nullptr;
};

Runtime& runtime() {
  static Runtime* instance = new Runtime;  // outlives the objects' own exits
  return *instance;
}

template <class... Parts>
void note(const Parts&... parts) {
  std::ostringstream line;
  (line << ... << parts);
  runtime().lines.push_back(line.str());
}

cudaError_t answer(const char* function) {
  Runtime& r = runtime();
  if (r.failing != function) return cudaSuccess;
  r.failing.clear();
  return r.last_error = static_cast<cudaError_t>(r.error), static_cast<cudaError_t>(r.last_error);
}

// A kernel is loaded at its first use.
cudaError_t use(const char* function, const void* kernel) {
  Runtime& r = runtime();
  if (r.capturing && r.capture_mode != cudaStreamCaptureModeRelaxed && r.loaded.count(kernel) == 0) {
    return r.last_error = cudaErrorStreamCaptureUnsupported, cudaErrorStreamCaptureUnsupported;
  }
  r.loaded.insert(kernel);
  return answer(function);
}

std::string readable(const std::string& mangled) {
  int status = 0;
  char* text = abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, &status);
  std::string name = status == 0 ? text : mangled;
  std::free(text);
  if (name.rfind("void ", 0) == 0) name = name.substr(5);
  const std::string unnamed = "(anonymous namespace)::";
  if (const size_t at = name.find(unnamed); at != std::string::npos) name.erase(at, unnamed.size());
  return name.substr(0, name.find('('));
}

cudaError_t launched(const void* kernel, dim3 grid, dim3 block, cudaStream_t stream, int cluster) {
  note("launch ", readable(runtime().kernels[kernel]), " blocks=", grid.x, " threads=", block.x,
       " stream=", reinterpret_cast<uintptr_t>(stream), " device=", runtime().device, " cluster=", cluster);
  return use("launch", kernel);
}

}  // namespace

// ------------------------------------------------------------------------------------------- for the tests, by ctypes

extern "C" {

const char* fake_cuda_log() {
  Runtime& r = runtime();
  r.log.clear();
  for (const std::string& line : r.lines) r.log += line + "\n";
  r.lines.clear();
  return r.log.c_str();
}
// The next call of the function answers this error; "launch" is any launch of a kernel.
void fake_cuda_fail(const char* function, int error) {
  runtime().failing = function;
  runtime().error = error;
}
void fake_cuda_set(int driver, int code, int clusters) {
  runtime().driver = driver;
  runtime().code = code;
  runtime().clusters = clusters;
}
// All kernels are unloaded, and PyTorch captures from now on, or not.
void fake_cuda_capture(int capturing) {
  runtime().loaded.clear();
  runtime().capturing = capturing != 0;
}

const char* fake_cuda_why_not(int device) {
  static std::string reason;
  reason = rlhf_fast::why_not_cuda(device);
  return reason.c_str();
}

// ------------------------------------------------------------------------------------------- PyTorch's device guard

AOTITorchError aoti_torch_create_device_guard(int32_t index, DeviceGuardHandle* guard) {
  note("guard ", index);
  *guard = reinterpret_cast<DeviceGuardHandle>(static_cast<uintptr_t>(runtime().device + 1));
  runtime().device = index;
  return 0;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle guard) {
  runtime().device = static_cast<int>(reinterpret_cast<uintptr_t>(guard)) - 1;
  note("guard back to ", runtime().device);
  return 0;
}

// ------------------------------------------------------------------------------------------- the CUDA runtime

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  runtime().kernels[host] = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st* stream) {
  Runtime& r = runtime();
  r.grid = grid, r.block = block, r.shared = shared, r.stream = stream;
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const Runtime& r = runtime();
  *grid = r.grid, *block = r.block, *shared = r.shared, *static_cast<cudaStream_t*>(stream) = r.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void**, size_t, cudaStream_t stream) {
  return launched(reinterpret_cast<const void*>(kernel), grid, block, stream, 1);
}
cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void**, size_t, cudaStream_t stream) {
  return launched(kernel, grid, block, stream, 1);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void**) {
  int cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) cluster = config->attrs[i].val.clusterDim.x;
  }
  return launched(kernel, config->gridDim, config->blockDim, config->stream, cluster);
}
cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void* kernel, const cudaLaunchConfig_t* config) {
  note("clusters of ", config->attrs[0].val.clusterDim.x, "?");
  *count = runtime().clusters;
  return use("cudaOccupancyMaxActiveClusters", kernel);
}
cudaError_t cudaMemsetAsync(void* to, int byte, size_t bytes, cudaStream_t stream) {
  note("memset to=", reinterpret_cast<uintptr_t>(to), " byte=", byte, " bytes=", bytes,
       " stream=", reinterpret_cast<uintptr_t>(stream));
  return answer("cudaMemsetAsync");
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  *attributes = cudaFuncAttributes{};
  attributes->ptxVersion = attributes->binaryVersion = runtime().code;
  return use("cudaFuncGetAttributes", kernel);
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  note("attribute ", static_cast<int>(attribute), " of ", device);
  *value = attribute == cudaDevAttrMultiProcessorCount ? 132 : 50 << 20;  // the L2 cache's bytes
  return answer("cudaDeviceGetAttribute");
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = runtime().driver;
  return answer("cudaDriverGetVersion");
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return answer("cudaRuntimeGetVersion");
}
cudaError_t cudaGetDevice(int* device) {
  *device = runtime().device;
  return answer("cudaGetDevice");
}
cudaError_t cudaSetDevice(int device) {
  note("set device ", device);
  runtime().device = device;
  return answer("cudaSetDevice");
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = reinterpret_cast<cudaStream_t>(uintptr_t{0x5715});
  return answer("cudaStreamCreateWithFlags");
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
  note("synchronize");
  return answer("cudaStreamSynchronize");
}
cudaError_t cudaStreamDestroy(cudaStream_t) { return answer("cudaStreamDestroy"); }
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, runtime().capture_mode);
  note("capture mode ", static_cast<int>(runtime().capture_mode));
  return answer("cudaThreadExchangeStreamCaptureMode");
}
cudaError_t cudaGetLastError() {
  const auto error = static_cast<cudaError_t>(runtime().last_error);
  runtime().last_error = 0;
  return error;
}
const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "an error of the test"; }

}  // extern "C"

// ------------------------------------------------------------------------------------------- tensors

namespace {

using torch::stable::Tensor;

// The same memory, dtype and layout on another kind of device; a device below 0 is the host. The source lives on for
// ever.
Tensor elsewhere(const Tensor& x, int64_t device) {
  static auto* kept = new std::vector<Tensor>;
  kept->push_back(x);
  int32_t dtype = 0;
  aoti_torch_get_dtype(x.get(), &dtype);
  const auto sizes = x.sizes(), strides = x.strides();
  std::vector<int64_t> of(sizes.begin(), sizes.end()), by(strides.begin(), strides.end());
  int64_t bytes = x.numel() == 0 ? 0 : x.element_size();
  for (size_t d = 0; x.numel() != 0 && d < of.size(); ++d) bytes += (of[d] - 1) * by[d] * x.element_size();
  void* begin = x.numel() == 0 ? nullptr : const_cast<void*>(x.const_data_ptr());
  return Tensor(static_cast<AtenTensorHandle>(
      fake_cuda_tensor(begin, bytes, x.dim(), of.data(), by.data(), dtype, static_cast<int32_t>(device))));
}

Tensor on_device(const Tensor& x, int64_t index) { return elsewhere(x, index); }
Tensor on_host(const Tensor& x) { return elsewhere(x, -1); }

}  // namespace

STABLE_TORCH_LIBRARY(rlhf_fast_fake_cuda, m) {
  m.def("on_device(Tensor x, int index) -> Tensor");
  m.def("on_host(Tensor x) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(rlhf_fast_fake_cuda, CPU, m) { m.impl("on_device", TORCH_BOX(&on_device)); }
STABLE_TORCH_LIBRARY_IMPL(rlhf_fast_fake_cuda, CUDA, m) { m.impl("on_host", TORCH_BOX(&on_host)); }
