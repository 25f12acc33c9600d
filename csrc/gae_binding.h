// SPDX-License-Identifier: Apache-2.0
// Binding of the family gae: gae, vtrace, ppo_advantages and the two steps of whitening.
//
// The device has a function for each op, with the op's name and arguments (dtype, args, the number of rows or
// sequences, for packed ones that of tokens, like); scratch memory is allocated like the tensor `like`. Functions that
// compute moments also sum those of all rows, in an order that does not depend on threads.
#pragma once

#include <cmath>
#include <tuple>

#include "binding.h"

namespace rlhf_fast {

// Any shape as rows: the last dimension, or all of a vector, which is one row however long it is.
inline int64_t row_length(const Tensor& x) { return x.dim() == 0 ? 1 : x.size(x.dim() - 1); }
inline int64_t row_count(const Tensor& x) { return x.numel() == 0 ? 0 : x.numel() / row_length(x); }

// How many sequences rewards (B, T), or (total,) with cu_seqlens, are.
inline int64_t sequence_count(const char* op, const Tensor& rewards, const OptionalTensor& cu_seqlens) {
  RF_CHECK(rewards.dim() == (cu_seqlens ? 1 : 2), op, ": rewards must be (B, T), or (total,) with cu_seqlens");
  if (!cu_seqlens) return rewards.size(0);
  const int64_t count = cu_seqlens->numel() - 1;
  RF_CHECK(count > 0 || (count == 0 && rewards.numel() == 0), op, ": cu_seqlens must have an entry for each sequence ",
           "and one more, got ", count + 1, " for ", rewards.numel(), " tokens");
  return count;
}

template <class Device>
struct GaeBinding {
  // A GPU's memory is not looked at: its kernels stay within the tensors whatever the bounds are.
  static void check_bounds(const char* op, const OptionalTensor& bounds, int64_t sequences, int64_t total) {
    if (!Device::kHostMemory || !bounds) return;
    const int64_t* b = data_of<int64_t>(bounds);
    RF_CHECK(b[0] == 0 && b[sequences] == total, op, ": cu_seqlens must rise from 0 to ", total);
    for (int64_t s = 0; s < sequences; ++s) RF_CHECK(b[s] <= b[s + 1], op, ": cu_seqlens must not fall");
  }

  static std::tuple<Tensor, Tensor> gae(const Tensor& rewards,  // (B, T) or (total,)
                                        const Tensor& values, const OptionalTensor& mask, const OptionalTensor& dones,
                                        const OptionalTensor& truncated, const OptionalTensor& bootstrap_values,
                                        const OptionalTensor& cu_seqlens,  // (S + 1,)
                                        const OptionalTensor& row_lam,     // (B,) or (S,)
                                        const OptionalTensor& row_value_lam, double gamma, double lam, double value_lam,
                                        bool carry) {
    constexpr const char* op = "gae";
    const Dtype dtype = dtype_of(op, rewards);
    const ScalarType type = rewards.scalar_type();
    const int64_t total = rewards.numel();
    on_device<Device>(op, "rewards", rewards);
    RF_CHECK(!truncated || bootstrap_values, op, ": truncated needs bootstrap_values");
    const int64_t sequences = sequence_count(op, rewards, cu_seqlens);
    const Tensor dense_rewards = row_tensor(op, "rewards", rewards, type, total, rewards);
    const Tensor dense_values = row_tensor(op, "values", values, type, total, rewards);
    const OptionalTensor dense_mask = row_tensor(op, "mask", mask, ScalarType::Bool, total, rewards);
    const OptionalTensor dense_dones = row_tensor(op, "dones", dones, ScalarType::Bool, total, rewards);
    const OptionalTensor dense_truncated = row_tensor(op, "truncated", truncated, ScalarType::Bool, total, rewards);
    const OptionalTensor dense_bootstrap = row_tensor(op, "bootstrap_values", bootstrap_values, type, total, rewards);
    const OptionalTensor bounds = row_tensor(op, "cu_seqlens", cu_seqlens, ScalarType::Long, sequences + 1, rewards);
    const OptionalTensor lams = row_tensor(op, "lam", row_lam, ScalarType::Float, sequences, rewards);
    const OptionalTensor value_lams = row_tensor(op, "value_lam", row_value_lam, ScalarType::Float, sequences, rewards);
    check_bounds(op, bounds, sequences, total);
    const Tensor advantages = empty_of(rewards, shape_of(rewards), ScalarType::Float);
    const Tensor returns = empty_of(rewards, shape_of(rewards), ScalarType::Float);

    GaeArgs args{};
    args.rewards = dense_rewards.const_data_ptr();
    args.values = dense_values.const_data_ptr();
    args.mask = data_of<bool>(dense_mask);
    args.dones = data_of<bool>(dense_dones);
    args.truncated = data_of<bool>(dense_truncated);
    args.bootstrap_values = data_of<void>(dense_bootstrap);
    args.cu_seqlens = data_of<int64_t>(bounds);
    args.length = cu_seqlens ? 0 : rewards.size(1);
    args.row_lam = data_of<float>(lams);
    args.row_value_lam = data_of<float>(value_lams);
    args.gamma = static_cast<float>(gamma);
    args.lam = static_cast<float>(lam);
    args.value_lam = static_cast<float>(value_lam);
    args.carry = carry;
    args.advantages = mutable_data_of<float>(advantages);
    args.returns = mutable_data_of<float>(returns);
    Device::gae(dtype, args, sequences, total, rewards);
    return {advantages, returns};
  }

  static std::tuple<Tensor, Tensor> vtrace(const Tensor& rewards,  // (B, T) or (total,)
                                           const Tensor& values, const Tensor& log_ratios, const OptionalTensor& mask,
                                           const OptionalTensor& dones, const OptionalTensor& truncated,
                                           const OptionalTensor& bootstrap_values,
                                           const OptionalTensor& cu_seqlens,  // (S + 1,)
                                           double gamma, double lam, double rho_clip, double c_clip, bool carry) {
    constexpr const char* op = "vtrace";
    on_device<Device>(op, "rewards", rewards);
    RF_CHECK(!truncated || bootstrap_values, op, ": truncated needs bootstrap_values");
    const ScalarType type = rewards.scalar_type();
    const int64_t total = rewards.numel(), sequences = sequence_count(op, rewards, cu_seqlens);
    const Tensor inputs[] = {row_tensor(op, "rewards", rewards, type, total, rewards),
                             row_tensor(op, "values", values, type, total, rewards),
                             row_tensor(op, "log_ratios", log_ratios, type, total, rewards)};
    const OptionalTensor flags[] = {row_tensor(op, "mask", mask, ScalarType::Bool, total, rewards),
                                    row_tensor(op, "dones", dones, ScalarType::Bool, total, rewards),
                                    row_tensor(op, "truncated", truncated, ScalarType::Bool, total, rewards)};
    const OptionalTensor bootstrap = row_tensor(op, "bootstrap_values", bootstrap_values, type, total, rewards);
    const OptionalTensor bounds = row_tensor(op, "cu_seqlens", cu_seqlens, ScalarType::Long, sequences + 1, rewards);
    check_bounds(op, bounds, sequences, total);
    const Tensor advantages = empty_of(rewards, shape_of(rewards), ScalarType::Float);
    const Tensor returns = empty_of(rewards, shape_of(rewards), ScalarType::Float);

    VtraceArgs args{};
    args.rewards = inputs[0].const_data_ptr();
    args.values = inputs[1].const_data_ptr();
    args.log_ratios = inputs[2].const_data_ptr();
    args.mask = data_of<bool>(flags[0]);
    args.dones = data_of<bool>(flags[1]);
    args.truncated = data_of<bool>(flags[2]);
    args.bootstrap_values = data_of<void>(bootstrap);
    args.cu_seqlens = data_of<int64_t>(bounds);
    args.length = cu_seqlens ? 0 : rewards.size(1);
    args.gamma = static_cast<float>(gamma);
    args.decay = static_cast<float>(gamma * lam);
    args.log_rho_limit = static_cast<float>(std::log(rho_clip));
    args.c_clip = static_cast<float>(c_clip);
    args.carry = carry;
    args.advantages = mutable_data_of<float>(advantages);
    args.returns = mutable_data_of<float>(returns);
    Device::vtrace(dtype_of(op, rewards), args, sequences, total, rewards);
    return {advantages, returns};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> ppo_advantages(
      const Tensor& scores,    // (B,)
      const Tensor& logprobs,  // (B, T), as the next three
      const Tensor& ref_logprobs, const Tensor& values, const Tensor& mask, double kl_coef, int64_t estimator,
      double gamma, double lam, std::optional<double> score_clip) {
    constexpr const char* op = "ppo_advantages";
    on_device<Device>(op, "logprobs", logprobs);
    RF_CHECK(logprobs.dim() == 2, op, ": logprobs must be (B, T)");
    const ScalarType type = logprobs.scalar_type();
    const int64_t batch = logprobs.size(0), length = logprobs.size(1), total = batch * length;
    const Tensor inputs[] = {row_tensor(op, "scores", scores, type, batch, logprobs),
                             row_tensor(op, "logprobs", logprobs, type, total, logprobs),
                             row_tensor(op, "ref_logprobs", ref_logprobs, type, total, logprobs),
                             row_tensor(op, "values", values, type, total, logprobs),
                             row_tensor(op, "mask", mask, ScalarType::Bool, total, logprobs)};
    const auto result = [&] { return empty_of(logprobs, {batch, length}, ScalarType::Float); };
    const Tensor kl = result(), rewards = result(), advantages = result(), returns = result();
    const Tensor row_moments = empty_of(logprobs, {batch, 3}, ScalarType::Double);
    const Tensor moments = empty_of(logprobs, {3}, ScalarType::Double);

    PpoAdvantagesArgs args{};
    args.scores = inputs[0].const_data_ptr();
    args.logprobs = inputs[1].const_data_ptr();
    args.ref_logprobs = inputs[2].const_data_ptr();
    args.values = inputs[3].const_data_ptr();
    args.mask = data_of<bool>(inputs[4]);
    args.length = length;
    args.kl_coef = static_cast<float>(kl_coef);
    args.estimator = static_cast<int>(estimator);
    args.gamma = static_cast<float>(gamma);
    args.lam = static_cast<float>(lam);
    args.score_clip = limit_of(score_clip);
    args.kl = mutable_data_of<float>(kl);
    args.rewards = mutable_data_of<float>(rewards);
    args.advantages = mutable_data_of<float>(advantages);
    args.returns = mutable_data_of<float>(returns);
    args.row_moments = mutable_data_of<double>(row_moments);
    args.moments = mutable_data_of<double>(moments);
    Device::ppo_advantages(dtype_of(op, logprobs), args, batch, logprobs);
    return {kl, rewards, advantages, returns, moments};
  }

  static Tensor whiten_moments(const Tensor& values, const Tensor& mask) {
    constexpr const char* op = "masked_whiten";
    on_device<Device>(op, "values", values);
    const Tensor x = row_tensor(op, "values", values, values.scalar_type(), values.numel(), values);
    const Tensor real = row_tensor(op, "mask", mask, ScalarType::Bool, values.numel(), values);
    const Tensor row_moments = empty_of(values, {row_count(x), 3}, ScalarType::Double);
    const Tensor moments = empty_of(values, {3}, ScalarType::Double);
    WhitenArgs args{};
    args.values = x.const_data_ptr();
    args.mask = data_of<bool>(real);
    args.length = row_length(x);
    args.row_moments = mutable_data_of<double>(row_moments);
    args.moments = mutable_data_of<double>(moments);
    Device::whiten_moments(dtype_of(op, x), args, row_count(x), values);
    return moments;
  }

  static Tensor whiten(const Tensor& values, const Tensor& mask, const Tensor& moments, bool shift_mean) {
    constexpr const char* op = "masked_whiten";
    on_device<Device>(op, "values", values);
    const Tensor x = row_tensor(op, "values", values, values.scalar_type(), values.numel(), values);
    const Tensor real = row_tensor(op, "mask", mask, ScalarType::Bool, values.numel(), values);
    const Tensor sums = row_tensor(op, "moments", moments, ScalarType::Double, 3, values);
    const Tensor whitened = empty_of(values, shape_of(values), ScalarType::Float);
    WhitenArgs args{};
    args.values = x.const_data_ptr();
    args.mask = data_of<bool>(real);
    args.length = row_length(x);
    args.moments = mutable_data_of<double>(sums);
    args.shift_mean = shift_mean;
    args.whitened = mutable_data_of<float>(whitened);
    Device::whiten(dtype_of(op, x), args, row_count(x), values);
    return whitened;
  }

  template <class Library>
  static void register_in(Library& m) {
    m.impl("gae", TORCH_BOX(&gae));
    m.impl("vtrace", TORCH_BOX(&vtrace));
    m.impl("ppo_advantages", TORCH_BOX(&ppo_advantages));
    m.impl("whiten_moments", TORCH_BOX(&whiten_moments));
    m.impl("whiten", TORCH_BOX(&whiten));
  }
};

}  // namespace rlhf_fast
