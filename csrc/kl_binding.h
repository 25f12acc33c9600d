// SPDX-License-Identifier: Apache-2.0
// Binding of the family kl: token_kl and approx_kl with their gradients.
//
// The device has a function for each op, with the op's name and arguments (dtype, args, rows, like); scratch memory is
// allocated like the tensor `like`.
#pragma once

#include <tuple>

#include "binding.h"

namespace rlhf_fast {

// Both logits tensors and the inputs per row, kept alive while a kernel runs.
template <class Device>
struct LogitsPair {
  Tensor logits;
  Tensor ref_logits;
  OptionalTensor mask;
  OptionalTensor temperature;
  OptionalTensor ref_temperature;
  Dtype dtype;
  int64_t rows;
  TokenKlArgs args{};

  LogitsPair(const char* op, const Tensor& x, const Tensor& y, const OptionalTensor& mask_,
             const OptionalTensor& row_temperature, const OptionalTensor& ref_row_temperature, double temperature_,
             double ref_temperature_, double logit_scale, double softcap, int64_t vocab_size, int64_t kind, double beta)
      : logits(with_dense_rows<Device>(op, "logits", x)),
        ref_logits(with_dense_rows<Device>(op, "ref_logits", y)),
        dtype(dtype_of(op, x)),
        rows(numel_of(row_shape(x))) {
    RF_CHECK(shape_of(x) == shape_of(y), op, ": ref_logits must have the shape of logits");
    RF_CHECK(x.device() == y.device(), op, ": ref_logits must be on the device of logits");
    RF_CHECK(x.scalar_type() == y.scalar_type(), op, ": ref_logits must have the dtype of logits");
    mask = row_tensor(op, "mask", mask_, ScalarType::Bool, rows, logits);
    temperature = row_tensor(op, "temperature", row_temperature, ScalarType::Float, rows, logits);
    ref_temperature = row_tensor(op, "ref_temperature", ref_row_temperature, ScalarType::Float, rows, logits);
    args.logits = logits.const_data_ptr();
    args.ref_logits = ref_logits.const_data_ptr();
    args.rows = row_index(op, logits);
    args.ref_rows = row_index(op, ref_logits);
    args.width = logits.size(logits.dim() - 1);
    args.columns = counted_columns(op, logits, vocab_size);
    const float scale = static_cast<float>(logit_scale), cap = static_cast<float>(softcap);
    args.transform = {data_of<float>(temperature), static_cast<float>(temperature_), scale, cap};
    args.ref_transform = {data_of<float>(ref_temperature), static_cast<float>(ref_temperature_), scale, cap};
    args.mask = data_of<bool>(mask);
    args.kind = static_cast<int>(kind);
    args.beta = static_cast<float>(beta);
  }
};

// The inputs of the estimators, dense, kept alive while a kernel runs.
template <class Device>
struct LogprobPair {
  Tensor logprobs;
  Tensor ref_logprobs;
  OptionalTensor ratio;
  OptionalTensor mask;
  ApproxKlArgs args{};

  LogprobPair(const char* op, const Tensor& x, const Tensor& y, const OptionalTensor& importance_ratio,
              const OptionalTensor& mask_, int64_t estimator, int64_t gradient, std::optional<double> clamp)
      : logprobs(dense(on_device<Device>(op, "logprobs", x))),
        ref_logprobs(row_tensor(op, "ref_logprobs", y, x.scalar_type(), x.numel(), x)),
        ratio(row_tensor(op, "importance_ratio", importance_ratio, x.scalar_type(), x.numel(), x)),
        mask(row_tensor(op, "mask", mask_, ScalarType::Bool, x.numel(), x)) {
    args.logprobs = logprobs.const_data_ptr();
    args.ref_logprobs = ref_logprobs.const_data_ptr();
    args.importance_ratio = ratio ? ratio->const_data_ptr() : nullptr;
    args.mask = data_of<bool>(mask);
    args.estimator = static_cast<int>(estimator);
    args.gradient = static_cast<int>(gradient);
    args.clamp = limit_of(clamp);
  }
};

template <class Device>
struct KlBinding {
  static std::tuple<Tensor, Tensor> token_kl(const Tensor& logits,      // (..., V)
                                             const Tensor& ref_logits,  // (..., V)
                                             const OptionalTensor& mask, const OptionalTensor& row_temperature,
                                             const OptionalTensor& ref_row_temperature, double temperature,
                                             double ref_temperature, double logit_scale, double softcap,
                                             int64_t vocab_size, int64_t kind, double beta) {
    LogitsPair<Device> pair("token_kl", logits, ref_logits, mask, row_temperature, ref_row_temperature, temperature,
                            ref_temperature, logit_scale, softcap, vocab_size, kind, beta);
    Shape shape = row_shape(logits);
    const Tensor kl = empty_of(logits, shape, ScalarType::Float);
    shape.push_back(6);
    const Tensor parts = empty_of(logits, shape, ScalarType::Float);
    pair.args.kl = mutable_data_of<float>(kl);
    pair.args.parts = mutable_data_of<float>(parts);
    Device::token_kl(pair.dtype, pair.args, pair.rows, logits);
    return {kl, parts};
  }

  static std::tuple<Tensor, Tensor> token_kl_backward(const Tensor& grad_kl, const Tensor& logits,
                                                      const Tensor& ref_logits, const OptionalTensor& mask,
                                                      const OptionalTensor& row_temperature,
                                                      const OptionalTensor& ref_row_temperature, const Tensor& parts,
                                                      double temperature, double ref_temperature, double logit_scale,
                                                      double softcap, int64_t vocab_size, int64_t kind, double beta,
                                                      bool needs_grad, bool needs_ref_grad) {
    constexpr const char* op = "token_kl_backward";
    LogitsPair<Device> pair(op, logits, ref_logits, mask, row_temperature, ref_row_temperature, temperature,
                            ref_temperature, logit_scale, softcap, vocab_size, kind, beta);
    const Tensor dense_grad = row_tensor(op, "grad_kl", grad_kl, ScalarType::Float, pair.rows, logits);
    Tensor dense_parts = row_tensor(op, "parts", parts, ScalarType::Float, 6 * pair.rows, logits);
    const Tensor grad_logits = empty_of(logits, needs_grad ? shape_of(logits) : Shape{0}, logits.scalar_type());
    const Tensor grad_ref = empty_of(logits, needs_ref_grad ? shape_of(logits) : Shape{0}, logits.scalar_type());
    pair.args.parts = mutable_data_of<float>(dense_parts);
    pair.args.grad_kl = data_of<float>(dense_grad);
    pair.args.grad_logits = needs_grad ? grad_logits.mutable_data_ptr() : nullptr;
    pair.args.grad_ref_logits = needs_ref_grad ? grad_ref.mutable_data_ptr() : nullptr;
    Device::token_kl_backward(pair.dtype, pair.args, pair.rows, logits);
    return {grad_logits, grad_ref};
  }

  // Value and gradient of the policy's side together, for a gradient in the KL that is known beforehand.
  static std::tuple<Tensor, Tensor> token_kl_and_grad(const Tensor& grad_kl, const Tensor& logits,
                                                      const Tensor& ref_logits, const OptionalTensor& mask,
                                                      const OptionalTensor& row_temperature,
                                                      const OptionalTensor& ref_row_temperature, double temperature,
                                                      double ref_temperature, double logit_scale, double softcap,
                                                      int64_t vocab_size, int64_t kind, double beta) {
    constexpr const char* op = "token_kl_and_grad";
    LogitsPair<Device> pair(op, logits, ref_logits, mask, row_temperature, ref_row_temperature, temperature,
                            ref_temperature, logit_scale, softcap, vocab_size, kind, beta);
    const Tensor dense_grad = row_tensor(op, "grad_kl", grad_kl, ScalarType::Float, pair.rows, logits);
    const Tensor kl = empty_of(logits, row_shape(logits), ScalarType::Float);
    const Tensor parts = empty_of(logits, {pair.rows, 6}, ScalarType::Float);
    const Tensor grad_logits = empty_of(logits, shape_of(logits), logits.scalar_type());
    pair.args.kl = mutable_data_of<float>(kl);
    pair.args.parts = mutable_data_of<float>(parts);
    pair.args.grad_kl = data_of<float>(dense_grad);
    pair.args.grad_logits = grad_logits.mutable_data_ptr();
    Device::token_kl_and_grad(pair.dtype, pair.args, pair.rows, logits);
    return {kl, grad_logits};
  }

  static Tensor approx_kl(const Tensor& logprobs, const Tensor& ref_logprobs, const OptionalTensor& importance_ratio,
                          const OptionalTensor& mask, int64_t estimator, int64_t gradient,
                          std::optional<double> clamp) {
    LogprobPair<Device> pair("approx_kl", logprobs, ref_logprobs, importance_ratio, mask, estimator, gradient, clamp);
    const Tensor kl = empty_of(logprobs, shape_of(logprobs), ScalarType::Float);
    pair.args.kl = mutable_data_of<float>(kl);
    Device::approx_kl(dtype_of("approx_kl", logprobs), pair.args, logprobs.numel(), logprobs);
    return kl;
  }

  static std::tuple<Tensor, Tensor> approx_kl_backward(const Tensor& grad_kl, const Tensor& logprobs,
                                                       const Tensor& ref_logprobs,
                                                       const OptionalTensor& importance_ratio,
                                                       const OptionalTensor& mask, int64_t estimator, int64_t gradient,
                                                       std::optional<double> clamp) {
    constexpr const char* op = "approx_kl_backward";
    LogprobPair<Device> pair(op, logprobs, ref_logprobs, importance_ratio, mask, estimator, gradient, clamp);
    const Tensor dense_grad = row_tensor(op, "grad_kl", grad_kl, ScalarType::Float, logprobs.numel(), logprobs);
    const Tensor grad = empty_of(logprobs, shape_of(logprobs), ScalarType::Float);
    const Tensor grad_ratio = empty_of(logprobs, importance_ratio ? shape_of(logprobs) : Shape{0}, ScalarType::Float);
    pair.args.grad_kl = data_of<float>(dense_grad);
    pair.args.grad_logprobs = mutable_data_of<float>(grad);
    pair.args.grad_ratio = importance_ratio ? mutable_data_of<float>(grad_ratio) : nullptr;
    Device::approx_kl_backward(dtype_of(op, logprobs), pair.args, logprobs.numel(), logprobs);
    return {grad, grad_ratio};
  }

  template <class Library>
  static void register_in(Library& m) {
    m.impl("token_kl", TORCH_BOX(&token_kl));
    m.impl("token_kl_backward", TORCH_BOX(&token_kl_backward));
    m.impl("token_kl_and_grad", TORCH_BOX(&token_kl_and_grad));
    m.impl("approx_kl", TORCH_BOX(&approx_kl));
    m.impl("approx_kl_backward", TORCH_BOX(&approx_kl_backward));
  }
};

}  // namespace rlhf_fast
