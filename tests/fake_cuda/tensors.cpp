// SPDX-License-Identifier: Apache-2.0
// Tensors that say they are on a CUDA device, over memory of the host. PyTorch's public ways to make a tensor start
// CUDA first; this goes by c10, below them. In a file of its own, since the stable ABI's headers exclude c10's.
#include <c10/core/Storage.h>
#include <c10/core/TensorImpl.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstdint>

// Operators of PyTorch guard the device before they look for a kernel; there is none to switch to.
namespace {
using Guard = c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>;
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
}  // namespace

// An at::Tensor is one such pointer. `dtype` as c10::ScalarType; device < 0 is the CPU.
extern "C" void* fake_cuda_tensor(void* data, int64_t bytes, int64_t dims, const int64_t* sizes, const int64_t* strides,
                                  int32_t dtype, int32_t device) {
  const c10::Device place = device < 0 ? c10::Device(c10::kCPU) : c10::Device(c10::kCUDA, device);
  c10::Storage storage(c10::Storage::use_byte_size_t{}, bytes, c10::DataPtr(data, place), nullptr, false);
  const auto key = device < 0 ? c10::DispatchKey::CPU : c10::DispatchKey::CUDA;
  const auto type = c10::scalarTypeToTypeMeta(static_cast<c10::ScalarType>(dtype));
  auto impl = c10::make_intrusive<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), type);
  impl->set_sizes_and_strides({sizes, static_cast<size_t>(dims)}, {strides, static_cast<size_t>(dims)});
  return new c10::intrusive_ptr<c10::TensorImpl>(std::move(impl));
}
