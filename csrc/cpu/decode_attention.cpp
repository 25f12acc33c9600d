// SPDX-License-Identifier: Apache-2.0
// Binding and launch of decode_attention, which only the CPU has: on GPUs PyTorch's own kernels are fast.
#include "device.h"

namespace rlhf_fast {

namespace {

constexpr const char* kOp = "decode_attention";

Tensor with_dense_last(const Tensor& x) {
  return x.size(x.dim() - 1) <= 1 || x.stride(x.dim() - 1) == 1 ? x : torch::stable::contiguous(x);
}

Tensor decode_attention(const Tensor& query,         // (B, H, D)
                        const Tensor& key,           // (B, K, T, D)
                        const Tensor& value,         // (B, K, T, D')
                        const OptionalTensor& mask,  // (B, T)
                        double scale) {
  const Dtype dtype = dtype_of(kOp, query);
  RF_CHECK(query.dim() == 3 && key.dim() == 4 && value.dim() == 4, kOp,
           ": query must be (B, H, D), key and value (B, K, T, D)");
  RF_CHECK(Cpu::owns(query) && Cpu::owns(key) && Cpu::owns(value), kOp, ": all tensors must be on the CPU");
  RF_CHECK(key.scalar_type() == query.scalar_type() && value.scalar_type() == query.scalar_type(), kOp,
           ": query, key and value must have one dtype");
  const int64_t rows = query.size(0), heads = query.size(1), key_heads = key.size(1), length = key.size(2);
  RF_CHECK(key.size(0) == rows && value.size(0) == rows && value.size(1) == key_heads && value.size(2) == length &&
               key.size(3) == query.size(2),
           kOp, ": sizes of query, key and value differ");
  RF_CHECK(key_heads > 0 && heads % key_heads == 0, kOp, ": the heads must be a multiple of the key heads");
  const Tensor dense_query = dense(query), keys = with_dense_last(key), values = with_dense_last(value);
  OptionalTensor seen;
  if (mask) {
    RF_CHECK(Cpu::owns(*mask) && mask->scalar_type() == ScalarType::Bool && mask->dim() == 2 && mask->size(0) == rows &&
                 mask->size(1) == length,
             kOp, ": mask must be (B, T) bool on the CPU");
    seen = with_dense_last(*mask);
  }
  const Tensor output = empty_of(query, {rows, heads, value.size(3)}, query.scalar_type());

  DecodeAttentionArgs args{};
  args.query = dense_query.const_data_ptr();
  args.key = keys.const_data_ptr();
  args.value = values.const_data_ptr();
  args.mask = data_of<bool>(seen);
  for (int d = 0; d < 3; ++d) {
    args.key_strides[d] = keys.stride(d);
    args.value_strides[d] = values.stride(d);
  }
  args.mask_stride = seen ? seen->stride(0) : 0;
  args.key_heads = key_heads;
  args.shared = heads / key_heads;
  args.length = length;
  args.size = query.size(2);
  args.value_size = value.size(3);
  args.scale = static_cast<float>(scale);
  args.output = output.mutable_data_ptr();
  run_rows(kernels().decode_attention[dtype], args, rows * key_heads, length * args.size);
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlhf_fast, CPU, m) { m.impl("decode_attention", TORCH_BOX(&decode_attention)); }

}  // namespace rlhf_fast
