// SPDX-License-Identifier: Apache-2.0
// The boundary between PyTorch's stable ABI and the kernels: checks with messages, allocation, dtype switch. Only
// bindings include it. Python checks users' arguments; the checks here are those that memory safety needs if an
// operator is called directly.
//
// A family's binding (<family>_binding.h) is a template over a `Device`, which says which tensors it owns and launches
// the kernels: Cpu (cpu/device.h) or Cuda (cuda/device.h).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <limits>
#include <optional>
#include <vector>

#include "args.h"

namespace rlhf_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Shape = std::vector<int64_t>;

// RF_CHECK(condition, "token_stats: logits must be ...")
#define RF_CHECK(condition, ...) STD_TORCH_CHECK(condition, "rlhf_fast.", __VA_ARGS__)

inline Dtype dtype_of(const char* op, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return kFloat32;
    case ScalarType::BFloat16: return kBFloat16;
    case ScalarType::Half: return kFloat16;
    default: break;
  }
  RF_CHECK(false, op, ": the native backend serves float32, bfloat16 and float16; use the torch backend for others");
  return kFloat32;
}

inline Shape shape_of(const Tensor& x) {
  const auto sizes = x.sizes();
  return Shape(sizes.begin(), sizes.end());
}

inline int64_t numel_of(const Shape& shape) {
  int64_t n = 1;
  for (int64_t size : shape) n *= size;
  return n;
}

inline Tensor empty_of(const Tensor& like, const Shape& shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

// An empty tensor for an output that was not requested, created without the dispatcher, since ops have several.
inline Tensor no_entries(const Tensor& like, ScalarType dtype) {
  const int64_t size = 0, stride = 1;
  int32_t device_type = 0, device_index = 0;
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      1, &size, &stride, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
      device_index, &handle));
  return Tensor(handle);
}

inline Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// A tensor with one entry per row (or a fixed number of them), made dense and of the given dtype. Checks that it has
// `count` entries and is on the device of `like`, the op's first tensor.
inline Tensor row_tensor(const char* op, const char* name, const Tensor& x, ScalarType dtype, int64_t count,
                         const Tensor& like) {
  RF_CHECK(x.device() == like.device(), op, ": ", name, " must be on the device of the other tensors");
  RF_CHECK(x.numel() == count, op, ": ", name, " must have ", count, " entries, got ", x.numel());
  return dense(x.scalar_type() == dtype ? x : torch::stable::to(x, dtype));
}

inline OptionalTensor row_tensor(const char* op, const char* name, const OptionalTensor& x, ScalarType dtype,
                                 int64_t count, const Tensor& like) {
  return x ? OptionalTensor(row_tensor(op, name, *x, dtype, count, like)) : std::nullopt;
}

// A limit that may be missing. Not infinity in the schema: AOTInductor cannot load a package that holds one.
inline float limit_of(std::optional<double> limit) {
  return limit ? static_cast<float>(*limit) : std::numeric_limits<float>::infinity();
}

template <class T>
const T* data_of(const OptionalTensor& x) {
  return x ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}

template <class T>
const T* data_of(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <class T>
T* mutable_data_of(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// Offsets of the rows of (..., V); adjacent leading dimensions are merged if their strides allow it.
inline RowIndex row_index(const char* op, const Tensor& x) {
  RowIndex index{};
  for (int64_t d = 0; d + 1 < x.dim(); ++d) {
    const int64_t size = x.size(d), stride = x.stride(d);
    if (size == 1) continue;
    if (index.dims > 0 && index.strides[index.dims - 1] == size * stride) {
      index.sizes[index.dims - 1] *= size;
      index.strides[index.dims - 1] = stride;
      continue;
    }
    RF_CHECK(index.dims < RowIndex::kMaxDims, op, ": more than ", RowIndex::kMaxDims, " strided dimensions");
    index.sizes[index.dims] = size;
    index.strides[index.dims] = stride;
    ++index.dims;
  }
  return index;
}

template <class Device>
const Tensor& on_device(const char* op, const char* name, const Tensor& x) {
  RF_CHECK(Device::owns(x), op, ": ", name, " must be on ", Device::kName);
  return x;
}

// The logits with a dense last dimension: leading dimensions may be strided, only a strided vocabulary is copied.
template <class Device>
Tensor with_dense_rows(const char* op, const char* name, const Tensor& logits) {
  on_device<Device>(op, name, logits);
  RF_CHECK(logits.dim() >= 1, op, ": ", name, " must be (..., V)");
  const int64_t last = logits.dim() - 1;
  return logits.size(last) <= 1 || logits.stride(last) == 1 ? logits : torch::stable::contiguous(logits);
}

inline Shape row_shape(const Tensor& logits) {
  Shape shape = shape_of(logits);
  shape.pop_back();
  return shape;
}

inline int64_t counted_columns(const char* op, const Tensor& logits, int64_t vocab_size) {
  const int64_t width = logits.size(logits.dim() - 1);
  RF_CHECK(vocab_size <= width, op, ": vocab_size must be at most V = ", width, ", got ", vocab_size);
  return vocab_size < 0 ? width : vocab_size;
}

}  // namespace rlhf_fast
