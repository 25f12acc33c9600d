// SPDX-License-Identifier: Apache-2.0
// driver.cpp: the families of tokens: gae, vtrace, and with ppo_advantages whitening and approx_kl.
#pragma once

#include "driver_common.h"
#if RF_PARTS & 20
#include "gae.cuh"
#endif
#if RF_PARTS & 8
#include "vtrace.cuh"
#endif
#if RF_PARTS & 16
#include "approx_kl.cuh"
#endif

namespace {

// Of packed sequences; on a GPU nobody looks at them. No two claim the same token: vtrace would write it twice.
constexpr int64_t kFar = int64_t{1} << 62;
const std::vector<int64_t> kAnyBounds[] = {{0, 400, kFar, -7, -5}, {900, 20, 400}, {kFar, -kFar, 5}, {7, 7, 7}};

#if RF_PARTS & 4

// Where sequences begin and end in flat arrays: rows of one length, or packed ones of any.
struct Bounds {
  std::vector<int64_t> of;
  int64_t length;  // 0 if packed

  Bounds(int64_t rows, int64_t length_) : length(length_) {
    for (int64_t r = 0; r <= rows; ++r) of.push_back(r * length);
  }
  explicit Bounds(const std::vector<int64_t>& lengths) : of{0}, length(0) {
    for (int64_t each : lengths) of.push_back(of.back() + each);
  }
  int64_t count() const { return static_cast<int64_t>(of.size()) - 1; }
  cuda::Sequences sequences() const { return {length == 0 ? of.data() : nullptr, length, count(), of.back()}; }
};

// multiprocessors: of the GPU; with few of them a block goes along a whole row. Without carry masked tokens are steps.
void check_gae(const Bounds& bounds, bool decoupled, int multiprocessors, bool walks, bool carry = true) {
  const int64_t total = bounds.of.back();
  const std::vector<float> rewards = normal(total), values = normal(total), bootstrap = normal(total);
  const Flags mask(total, 0.8), dones(total, 0.01), truncated(total, 0.01);
  std::vector<float> advantages(total), returns(total), row_lam(bounds.count());
  GaeArgs a{};
  a.rewards = rewards.data(), a.values = values.data(), a.mask = mask.data(), a.dones = dones.data();
  a.truncated = truncated.data(), a.bootstrap_values = bootstrap.data(), a.length = bounds.length;
  a.gamma = 0.99f, a.lam = 0.95f, a.value_lam = decoupled ? 1.0f : 0.95f, a.carry = carry;
  a.advantages = advantages.data(), a.returns = returns.data();
  for (int64_t r = 0; r < bounds.count(); ++r) row_lam[r] = 0.9f + 0.01f * static_cast<float>(r % 10);
  if (!decoupled) a.row_lam = a.row_value_lam = row_lam.data();
  const cuda::Sequences sequences = bounds.sequences();
  expect("whether rows are walked", cuda::walks_rows(a, sequences, multiprocessors), walks, 0);
  std::vector<uint64_t> links(cuda::link_bytes(sequences, cuda::gae_chains(a)) / sizeof(uint64_t));
  cuda::gae(kFloat32, a, sequences, walks, links.empty() ? nullptr : links.data(), nullptr);
  for (int64_t r = 0; r < bounds.count(); ++r) {
    double next_value = 0, advantage = 0, for_return = 0;
    for (int64_t i = bounds.of[r + 1] - 1; i >= bounds.of[r]; --i) {
      if (!mask[i])
        expect("advantage where masked", advantages[i], 0, 0), expect("return where masked", returns[i], 0, 0);
      if (!mask[i] && carry) continue;
      const double value = mask[i] ? values[i] : 0, reward = mask[i] ? rewards[i] : 0;
      if (mask[i] && (dones[i] || truncated[i])) next_value = advantage = for_return = 0;
      if (mask[i] && truncated[i] && !dones[i]) next_value = bootstrap[i];
      const double delta = reward + a.gamma * next_value - value;
      advantage = delta + a.gamma * (a.row_lam ? row_lam[r] : a.lam) * advantage;
      for_return = delta + a.gamma * (a.row_lam ? row_lam[r] : a.value_lam) * for_return;
      next_value = value;
      if (!mask[i]) continue;
      expect("advantage", advantages[i], advantage, 1e-4);
      expect("return", returns[i], for_return + value, 1e-4);
    }
  }
}

// A kernel ends whatever they are, and stays within the arrays.
void check_gae_of_any_bounds(const std::vector<int64_t>& bounds) {
  const int64_t total = 2 * cuda::kTile + 13, count = static_cast<int64_t>(bounds.size()) - 1;
  std::vector<float> in(total), advantages(total), returns(total), row_lam(count);
  GaeArgs a{};
  a.rewards = a.values = in.data(), a.carry = true, a.gamma = 1, a.row_lam = a.row_value_lam = row_lam.data();
  a.advantages = advantages.data(), a.returns = returns.data();
  const cuda::Sequences sequences{bounds.data(), 0, count, total};
  std::vector<uint64_t> links(cuda::link_bytes(sequences, 1) / sizeof(uint64_t));
  cuda::gae(kFloat32, a, sequences, false, links.data(), nullptr);
}

// A row of more tiles than a warp has lanes, undiscounted, so that the last token counts in the first; whole numbers.
void check_far_tiles() {
  const int64_t total = 40 * cuda::kTile + 3;
  std::vector<float> rewards(total), values(total), advantages(total), returns(total);
  for (int64_t i = 0; i < total; ++i) rewards[i] = static_cast<float>(i % 7 - 3);
  GaeArgs a{};
  a.rewards = rewards.data(), a.values = values.data(), a.length = total, a.carry = true;
  a.gamma = a.lam = a.value_lam = 1, a.advantages = advantages.data(), a.returns = returns.data();
  const cuda::Sequences sequences{nullptr, total, 1, total};
  std::vector<uint64_t> links(cuda::link_bytes(sequences, 1) / sizeof(uint64_t));
  cuda::gae(kFloat32, a, sequences, false, links.data(), nullptr);
  double sum = 0;
  for (int64_t i = total - 1; i >= 0; --i) expect("advantage of a long row", advantages[i], sum += rewards[i], 0);
}

// Which sequence a token is of, also where numbers take more than 32 bits.
void check_sequences() {
  for (const int64_t length : {int64_t{3}, int64_t{70'000}, int64_t{1} << 31, int64_t{5} << 32}) {
    const cuda::Sequences sequences{nullptr, length, 9, 9 * length};
    for (const int64_t token : {int64_t{0}, length - 1, length, 4 * length + 1, 9 * length - 1, 9 * length + 2}) {
      expect("sequence", static_cast<double>(sequences.of(token)), static_cast<double>(token / length), 0);
    }
  }
}

void check_gae() {
  constexpr int kMany = 1 << 20;
  for (const bool decoupled : {false, true}) {
    check_gae({2, 5 * cuda::kTile + 3}, decoupled, 1, false);
    check_gae({3, 3 * cuda::kTile}, decoupled, kMany, false);
    check_gae({5, cuda::kTile / 2 + 1}, decoupled, 1, false, decoupled);
    check_gae({40, 7}, decoupled, 1, false);
    check_gae({3, 3 * cuda::kTile + 8}, decoupled, 1, false);  // half a pair of lanes
    check_gae({3, 3 * cuda::kTile + 16}, decoupled, 3, true);
    check_gae({2, cuda::kTile - 48}, decoupled, 2, true, !decoupled);
    // Sequences that begin within a thread's tokens, at its first, and at a tile's.
    check_gae(Bounds({1, 0, 3, 0, 0, 2 * cuda::kTile, 13, cuda::kTile - 17, 1, 0, 7, 40}), decoupled, 1, false,
              decoupled);
  }
  for (const auto& bounds : kAnyBounds) check_gae_of_any_bounds(bounds);
  check_far_tiles();
  check_sequences();
}

#endif
#if RF_PARTS & 8

// Sequences of `length` tokens; packed: the last of them is one token shorter, so that no bound is on a boundary of
// eight. extreme: with infinite rewards, and log-ratios whose exp underflows or is 0.
void check_vtrace(int64_t rows, int64_t length, bool packed, bool carry, bool extreme = false) {
  const int64_t total = rows * length - packed;
  const std::vector<float> values = normal(total), bootstrap = normal(total);
  std::vector<float> rewards = normal(total), log_ratios = normal(total);
  for (int64_t i = 0; extreme && i < total; ++i) {
    if (i % 61 == 60) rewards[i] = INFINITY;
    if (i % 7 == 3) log_ratios[i] = -200;
    if (i % 37 == 30) log_ratios[i] = -INFINITY;
  }
  const Flags mask(total, 0.8), dones(total, 0.05), truncated(total, 0.05);
  std::vector<float> advantages(total), returns(total);
  std::vector<int64_t> bounds;
  for (int64_t r = 0; r <= rows; ++r) bounds.push_back(r == rows ? total : r * length - (packed && r == 1));
  VtraceArgs a{};
  a.rewards = rewards.data(), a.values = values.data(), a.log_ratios = log_ratios.data(), a.mask = mask.data();
  a.dones = dones.data(), a.truncated = truncated.data(), a.bootstrap_values = bootstrap.data(), a.length = length;
  a.gamma = 0.99f, a.decay = 0.99f * 0.95f, a.log_rho_limit = std::log(1.5f), a.c_clip = 0.9f, a.carry = carry;
  a.advantages = advantages.data(), a.returns = returns.data();
  cuda::vtrace(kFloat32, a, {packed ? bounds.data() : nullptr, length, rows, total}, nullptr);
  for (int64_t r = 0; r < rows; ++r) {
    double next_value = 0, gain = 0;
    for (int64_t i = bounds[r + 1] - 1; i >= bounds[r]; --i) {
      if (!mask[i] && carry) continue;
      const double ratio = mask[i] ? std::min(1.5, std::exp(static_cast<double>(log_ratios[i]))) : 1;
      const double value = mask[i] ? values[i] : 0, reward = mask[i] ? rewards[i] : 0;
      if (mask[i] && (dones[i] || truncated[i])) next_value = gain = 0;
      if (mask[i] && truncated[i] && !dones[i]) next_value = bootstrap[i];
      const double error = reward + a.gamma * next_value - value;
      const double advantage = ratio * (error + a.gamma * gain);
      gain = ratio * error + a.decay * std::min(0.9, ratio) * gain;
      next_value = value;
      expect("vtrace advantage", advantages[i], mask[i] ? advantage : 0, 1e-4);
      expect("vtrace return", returns[i], mask[i] ? value + gain : 0, 1e-4);
    }
  }
}

// As check_gae_of_any_bounds.
void check_vtrace_of_any_bounds(const std::vector<int64_t>& bounds) {
  const int64_t total = 2 * cuda::kTile + 13, count = static_cast<int64_t>(bounds.size()) - 1;
  std::vector<float> in(total), advantages(total), returns(total);
  VtraceArgs a{};
  a.rewards = a.values = a.log_ratios = in.data(), a.carry = true, a.gamma = a.decay = a.c_clip = 1;
  a.advantages = advantages.data(), a.returns = returns.data();
  cuda::vtrace(kFloat32, a, {bounds.data(), 0, count, total}, nullptr);
}

void check_vtrace() {
  for (const bool packed : {false, true}) {
    check_vtrace(3, 3 * cuda::kTile, packed, true);
    check_vtrace(2, 2 * cuda::kTile + 13, packed, false);
    check_vtrace(9, 7, packed, true);
  }
  check_vtrace(2, 2 * cuda::kTile + 13, false, true, true);
  for (const auto& bounds : kAnyBounds) check_vtrace_of_any_bounds(bounds);
}

#endif
#if RF_PARTS & 16

void check_ppo(int64_t rows, int64_t length) {
  const int64_t total = rows * length;
  const std::vector<float> scores = normal(rows), logprobs = normal(total), ref = normal(total), values = normal(total);
  Flags mask(total, 0.8);
  for (int64_t r = 0; r < rows; ++r) {  // the score goes to a thread, or a tile, further left
    const int64_t padding = std::min(length, r % 2 == 0 ? 2 * cuda::kTokens + 1 : cuda::kTile + 3);
    std::fill_n(mask.bytes.begin() + (r + 1) * length - padding, padding, 0);
  }
  std::vector<float> kl(total), rewards(total), advantages(total), returns(total);
  double moments[3];
  PpoAdvantagesArgs a{};
  a.scores = scores.data(), a.logprobs = logprobs.data(), a.ref_logprobs = ref.data(), a.values = values.data();
  a.mask = mask.data(), a.length = length, a.kl_coef = 0.1f, a.estimator = kK1, a.gamma = 0.99f, a.lam = 0.95f;
  a.score_clip = 1.0f, a.kl = kl.data(), a.rewards = rewards.data(), a.advantages = advantages.data();
  a.returns = returns.data(), a.moments = moments;
  const cuda::Sequences sequences{nullptr, length, rows, total};
  std::vector<uint64_t> links(cuda::link_bytes(sequences, cuda::kPpoChains) / sizeof(uint64_t));
  std::vector<cuda::Moments> partial(cuda::tiles_of(total));
  cuda::ppo_advantages(kFloat32, a, sequences, links.empty() ? nullptr : links.data(), partial.data(), nullptr);
  double count = 0, sum = 0, squares = 0;
  for (int64_t r = 0; r < rows; ++r) {
    double next_value = 0, advantage = 0, score = std::min(1.0f, std::max(-1.0f, scores[r]));
    for (int64_t t = length - 1; t >= 0; --t) {
      const int64_t i = r * length + t;
      expect("kl", kl[i], mask[i] ? static_cast<double>(logprobs[i]) - ref[i] : 0, 1e-6);
      if (!mask[i]) {
        for (const float of_none : {rewards[i], advantages[i], returns[i]}) expect("where masked", of_none, 0, 0);
        continue;
      }
      const double reward = -a.kl_coef * (logprobs[i] - ref[i]) + score;
      score = 0;
      advantage = reward + a.gamma * next_value - values[i] + a.gamma * a.lam * advantage;
      next_value = values[i];
      expect("reward", rewards[i], reward, 1e-5);
      expect("ppo advantage", advantages[i], advantage, 1e-4);
      expect("ppo return", returns[i], advantage + values[i], 1e-4);
      count += 1, sum += advantages[i], squares += static_cast<double>(advantages[i]) * advantages[i];
    }
  }
  const double wanted[] = {count, sum, squares};
  for (int i = 0; i < 3; ++i) expect("moments", moments[i], wanted[i], 1e-9);
}

void check_whiten(int64_t total, bool shift_mean) {
  const std::vector<float> values = normal(total);
  const Flags mask(total, 0.7);
  std::vector<float> whitened(total);
  std::vector<cuda::Moments> partial(cuda::whiten_blocks(total));
  double moments[3];
  WhitenArgs a{};
  a.values = values.data(), a.mask = mask.data(), a.length = total, a.moments = moments, a.shift_mean = shift_mean;
  a.whitened = whitened.data();
  cuda::whiten_moments(kFloat32, a, total, partial.data(), nullptr);
  cuda::whiten(kFloat32, a, total, nullptr);
  double count = 0, sum = 0, squares = 0;
  for (int64_t i = 0; i < total; ++i) {
    if (mask[i]) count += 1, sum += values[i], squares += static_cast<double>(values[i]) * values[i];
  }
  const double mean = sum / count, variance = (squares - count * mean * mean) / (count - 1);
  for (int64_t i = 0; i < total; ++i) {
    const double white = (values[i] - mean) / std::sqrt(variance + 1e-8) + (shift_mean ? 0 : mean);
    expect("whitened", whitened[i], mask[i] ? white : 0, 1e-5);
  }
}

// Value and slope in d = log p - log q.
std::pair<double, double> estimated(double d, int estimator) {
  if (estimator == kK1) return {d, 1};
  if (estimator == kK2) return {d * d / 2, d};
  if (estimator == kK3) return {std::exp(-d) - 1 + d, 1 - std::exp(-d)};
  return {std::abs(d), d > 0 ? 1 : -1};
}

void check_approx_kl(int64_t count, int estimator, int gradient) {
  constexpr double kClamp = 1.5;
  const std::vector<float> p = normal(count), q = normal(count), ratio = normal(count), grad_kl = normal(count);
  const Flags mask(count, 0.8);
  std::vector<float> kl(count), grad(count), grad_ratio(count);
  ApproxKlArgs a{};
  a.logprobs = p.data(), a.ref_logprobs = q.data(), a.importance_ratio = ratio.data(), a.mask = mask.data();
  a.estimator = estimator, a.gradient = gradient, a.clamp = kClamp, a.kl = kl.data(), a.grad_kl = grad_kl.data();
  a.grad_logprobs = grad.data(), a.grad_ratio = grad_ratio.data();
  cuda::approx_kl(kFloat32, a, count, nullptr);
  cuda::approx_kl_backward(kFloat32, a, count, nullptr);
  for (int64_t i = 0; i < count; ++i) {
    const double d = static_cast<double>(p[i]) - q[i], real = mask[i];
    const auto [value, slope] = estimated(d, estimator);
    const double limited = std::min(kClamp, std::max(-kClamp, value)), passed = gradient == kValue ? slope : d;
    expect("approx_kl", kl[i], real * limited * ratio[i], 1e-5);
    expect("its gradient", grad[i], real * passed * ratio[i] * grad_kl[i], 1e-5);
    expect("its ratio's gradient", grad_ratio[i], real * limited * grad_kl[i], 1e-5);
  }
}

void check_ppo() {
  check_ppo(2, 3 * cuda::kTile + 5);
  check_ppo(9, 100);
  for (const bool shift_mean : {true, false}) check_whiten(cuda::kTile + 5, shift_mean);
  for (const int estimator : {kK1, kK2, kK3, kAbs}) check_approx_kl(cuda::kTile / 2 + 3, estimator, kValue);
  check_approx_kl(2 * cuda::kTile + 3, kK3, kStraightThrough);
}

#endif

}  // namespace
