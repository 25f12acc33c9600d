// SPDX-License-Identifier: Apache-2.0
// Binding of the family logprob: token_stats and its gradient, out of place and in place.
//
// The device has token_stats(dtype, args, rows, like) and token_stats_backward(dtype, args, rows, like); scratch memory
// is allocated like the tensor `like`.
#pragma once

#include <tuple>

#include "binding.h"
#include "math.h"

namespace rlhf_fast {

inline LogitTransform make_transform(const OptionalTensor& row_temperature, double temperature, double scale,
                                     double softcap) {
  return {data_of<float>(row_temperature), static_cast<float>(temperature), static_cast<float>(scale),
          static_cast<float>(softcap)};
}

inline int64_t targets_per_row(const char* op, const OptionalTensor& targets, const Tensor& logits, int64_t rows) {
  if (!targets) return 0;
  RF_CHECK(targets->dim() == logits.dim() - 1 || targets->dim() == logits.dim(), op,
           ": targets must have the rows' shape, or that and K");
  const int64_t k = targets->dim() == logits.dim() ? targets->size(targets->dim() - 1) : 1;
  RF_CHECK(targets->numel() == rows * k, op, ": targets must have the rows' shape, or that and K");
  return k;
}

template <class Device>
struct LogprobBinding {
  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> token_stats(
      const Tensor& logits,           // (..., V)
      const OptionalTensor& targets,  // (...) or (..., K)
      const OptionalTensor& mask,     // (...)
      const OptionalTensor& row_temperature, double temperature, double logit_scale, double softcap, int64_t vocab_size,
      int64_t outputs, bool /*inplace_backward*/) {
    constexpr const char* op = "token_stats";
    const Tensor x = with_dense_rows<Device>(op, "logits", logits);
    const Dtype dtype = dtype_of(op, x);
    const Shape rows = row_shape(x);
    const int64_t n = numel_of(rows), k = targets_per_row(op, targets, x, n);
    RF_CHECK(!(outputs & kLogprobs) || targets, op, ": logprobs need targets");

    const auto result = [&](int bit, const Shape& shape, ScalarType type) {
      return outputs & bit ? empty_of(x, shape, type) : no_entries(x, type);
    };
    const Tensor logprobs = result(kLogprobs, targets ? shape_of(*targets) : rows, ScalarType::Float);
    const Tensor entropy = result(kEntropy, rows, ScalarType::Float);
    const Tensor logsumexp = result(kLogsumexp, rows, ScalarType::Float);
    const Tensor sum_sq_probs = result(kSumSqProbs, rows, ScalarType::Float);
    const Tensor argmax = result(kArgmax, rows, ScalarType::Long);
    Shape parts_shape = rows;
    parts_shape.push_back(2);
    const Tensor parts = empty_of(x, parts_shape, ScalarType::Float);

    const OptionalTensor dense_targets = row_tensor(op, "targets", targets, ScalarType::Long, n * k, x);
    const OptionalTensor dense_mask = row_tensor(op, "mask", mask, ScalarType::Bool, n, x);
    const OptionalTensor dense_temperature = row_tensor(op, "temperature", row_temperature, ScalarType::Float, n, x);
    const auto pointer = [&](int bit, const Tensor& t) { return outputs & bit ? mutable_data_of<float>(t) : nullptr; };

    TokenStatsArgs args{};
    args.logits = x.const_data_ptr();
    args.rows = row_index(op, x);
    args.width = x.size(x.dim() - 1);
    args.columns = counted_columns(op, x, vocab_size);
    args.transform = make_transform(dense_temperature, temperature, logit_scale, softcap);
    args.targets = data_of<int64_t>(dense_targets);
    args.k = k;
    args.mask = data_of<bool>(dense_mask);
    args.outputs = static_cast<int>(outputs);
    args.logprobs = pointer(kLogprobs, logprobs);
    args.entropy = pointer(kEntropy, entropy);
    args.logsumexp = pointer(kLogsumexp, logsumexp);
    args.sum_sq_probs = pointer(kSumSqProbs, sum_sq_probs);
    args.argmax = outputs & kArgmax ? mutable_data_of<int64_t>(argmax) : nullptr;
    args.parts = mutable_data_of<float>(parts);
    Device::token_stats(dtype, args, n, x);
    return {logprobs, entropy, logsumexp, sum_sq_probs, argmax, parts};
  }

  // Writes the gradient of `logits` to `grad_logits`, which may be the same tensor.
  static void write_gradient(const OptionalTensor& grad_logprobs, const OptionalTensor& grad_entropy,
                             const OptionalTensor& grad_logsumexp, const Tensor& logits, const Tensor& grad_logits,
                             const OptionalTensor& targets, const OptionalTensor& mask,
                             const OptionalTensor& row_temperature, const OptionalTensor& entropy, const Tensor& parts,
                             double temperature, double logit_scale, double softcap, int64_t vocab_size) {
    constexpr const char* op = "token_stats_backward";
    const Dtype dtype = dtype_of(op, logits);
    const int64_t n = numel_of(row_shape(logits)), k = targets_per_row(op, targets, logits, n);
    RF_CHECK(!grad_logprobs || targets, op, ": the gradient of logprobs needs targets");
    RF_CHECK(!grad_entropy || entropy, op, ": the gradient of entropy needs the entropy");
    const OptionalTensor rows[] = {
        row_tensor(op, "targets", targets, ScalarType::Long, n * k, logits),
        row_tensor(op, "mask", mask, ScalarType::Bool, n, logits),
        row_tensor(op, "temperature", row_temperature, ScalarType::Float, n, logits),
        row_tensor(op, "grad_logprobs", grad_logprobs, ScalarType::Float, n * k, logits),
        row_tensor(op, "grad_entropy", grad_entropy, ScalarType::Float, n, logits),
        row_tensor(op, "grad_logsumexp", grad_logsumexp, ScalarType::Float, n, logits),
        row_tensor(op, "entropy", entropy, ScalarType::Float, n, logits),
        row_tensor(op, "parts", OptionalTensor(parts), ScalarType::Float, 2 * n, logits),
    };
    TokenStatsBackwardArgs args{};
    args.logits = logits.const_data_ptr();
    args.rows = row_index(op, logits);
    args.width = logits.size(logits.dim() - 1);
    args.columns = counted_columns(op, logits, vocab_size);
    args.transform = make_transform(rows[2], temperature, logit_scale, softcap);
    args.targets = data_of<int64_t>(rows[0]);
    args.k = grad_logprobs ? k : 0;
    args.mask = data_of<bool>(rows[1]);
    args.grad_logprobs = data_of<float>(rows[3]);
    args.grad_entropy = data_of<float>(rows[4]);
    args.grad_logsumexp = data_of<float>(rows[5]);
    args.entropy = data_of<float>(rows[6]);
    args.parts = data_of<float>(rows[7]);
    args.grad_logits = grad_logits.mutable_data_ptr();
    args.grad_rows = row_index(op, grad_logits);
    Device::token_stats_backward(dtype, args, n, logits);
  }

  static Tensor token_stats_backward(const OptionalTensor& grad_logprobs, const OptionalTensor& grad_entropy,
                                     const OptionalTensor& grad_logsumexp, const Tensor& logits,
                                     const OptionalTensor& targets, const OptionalTensor& mask,
                                     const OptionalTensor& row_temperature, const OptionalTensor& entropy,
                                     const Tensor& parts, double temperature, double logit_scale, double softcap,
                                     int64_t vocab_size) {
    const Tensor x = with_dense_rows<Device>("token_stats_backward", "logits", logits);
    const Tensor grad = empty_of(x, shape_of(x), x.scalar_type());
    write_gradient(grad_logprobs, grad_entropy, grad_logsumexp, x, grad, targets, mask, row_temperature, entropy, parts,
                   temperature, logit_scale, softcap, vocab_size);
    return grad;
  }

  static void token_stats_backward_(const OptionalTensor& grad_logprobs, const OptionalTensor& grad_entropy,
                                    const OptionalTensor& grad_logsumexp, const Tensor& logits,
                                    const OptionalTensor& targets, const OptionalTensor& mask,
                                    const OptionalTensor& row_temperature, const OptionalTensor& entropy,
                                    const Tensor& parts, double temperature, double logit_scale, double softcap,
                                    int64_t vocab_size) {
    const Tensor x = with_dense_rows<Device>("token_stats_backward_", "logits", logits);
    write_gradient(grad_logprobs, grad_entropy, grad_logsumexp, x, x, targets, mask, row_temperature, entropy, parts,
                   temperature, logit_scale, softcap, vocab_size);
    if (x.get() != logits.get())
      torch::stable::copy_(const_cast<Tensor&>(logits), x);  // a strided vocabulary was copied
  }

  template <class Library>
  static void register_in(Library& m) {
    m.impl("token_stats", TORCH_BOX(&token_stats));
    m.impl("token_stats_backward", TORCH_BOX(&token_stats_backward));
    m.impl("token_stats_backward_", TORCH_BOX(&token_stats_backward_));
  }
};

}  // namespace rlhf_fast
