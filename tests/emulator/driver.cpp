// SPDX-License-Identifier: Apache-2.0
// Every CUDA kernel on the emulator, against plain loops in double: a program of its own, without PyTorch, so that
// sanitizers which Python does not stand can watch it. See proof.py for the ways it is compiled and run.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "approx_kl.cuh"
#include "gae.cuh"
#include "kl.cuh"
#include "logprob.cuh"

using namespace rlhf_fast;

namespace {

int failures = 0;
std::mt19937 engine(1);

void expect(const char* what, double got, double wanted, double tolerance) {
  if (std::abs(got - wanted) <= tolerance * (1 + std::abs(wanted))) return;
  if (++failures <= 20) std::printf("%s: got %.9g, wanted %.9g\n", what, got, wanted);
}

std::vector<float> normal(int64_t count, float scale = 1) {
  std::normal_distribution<float> distribution(0, scale);
  std::vector<float> x(count);
  for (float& value : x) value = distribution(engine);
  return x;
}

// bool has no data() in a vector.
struct Flags {
  std::vector<char> bytes;
  explicit Flags(int64_t count, double share) : bytes(count) {
    std::bernoulli_distribution distribution(share);
    for (char& byte : bytes) byte = distribution(engine);
  }
  const bool* data() const { return reinterpret_cast<const bool*>(bytes.data()); }
  bool operator[](int64_t i) const { return bytes[i]; }
};

// Logits as the kernels get them, one entry past an aligned address, and as double.
template <class T>
struct Logits {
  std::vector<T> memory;
  std::vector<double> values;
  int64_t width;
  RowIndex rows{};

  Logits(int64_t n, int64_t width_, int64_t stride) : memory(n * stride + 1), values(n * width_), width(width_) {
    rows.dims = 1;
    rows.sizes[0] = n;
    rows.strides[0] = stride;
    const std::vector<float> x = normal(n * stride, 2);
    for (int64_t i = 0; i < n * stride; ++i) cuda::from_float(x[i], data() + i);
    for (int64_t r = 0; r < n; ++r) {
      for (int64_t c = 0; c < width; ++c) values[r * width + c] = cuda::to_float(data()[r * stride + c]);
    }
  }
  T* data() { return memory.data() + 1; }
  const double* row(int64_t r) const { return values.data() + r * width; }
};

constexpr Dtype dtype_of(float) { return kFloat32; }
constexpr Dtype dtype_of(cuda::BFloat16) { return kBFloat16; }

// log-probabilities of a row of logits divided by the temperature.
std::vector<double> logprobs_of(const double* x, int64_t count, double temperature) {
  double max = -INFINITY, sum = 0;
  for (int64_t i = 0; i < count; ++i) max = std::max(max, x[i] / temperature);
  for (int64_t i = 0; i < count; ++i) sum += std::exp(x[i] / temperature - max);
  std::vector<double> result(count);
  for (int64_t i = 0; i < count; ++i) result[i] = x[i] / temperature - max - std::log(sum);
  return result;
}

LogitTransform at_temperature(float temperature) { return {nullptr, temperature, 1.0f, 0.0f}; }

constexpr float kTemperature = 0.8f;

// ------------------------------------------------------------------------------------------- logprob

template <class T>
void check_stats(int64_t n, int64_t width, int64_t stride, int parts) {
  constexpr int64_t kTargets = 2;
  Logits<T> x(n, width, stride);
  std::vector<int64_t> targets(n * kTargets), argmax(n);
  for (int64_t& target : targets) target = static_cast<int64_t>(engine() % width);
  std::vector<float> logprobs(n * kTargets), entropy(n), logsumexp(n), squares(n), saved(2 * n);
  std::vector<char> partial(n * parts * cuda::kFoldSize);
  TokenStatsArgs a{};
  a.logits = x.data(), a.rows = x.rows, a.width = a.columns = width, a.transform = at_temperature(kTemperature);
  a.targets = targets.data(), a.k = kTargets, a.logprobs = logprobs.data(), a.entropy = entropy.data();
  a.logsumexp = logsumexp.data(), a.sum_sq_probs = squares.data(), a.argmax = argmax.data(), a.parts = saved.data();
  cuda::token_stats(dtype_of(T{}), a, n, parts, partial.data(), nullptr);

  const std::vector<float> grad = normal(n * kTargets), grad_entropy = normal(n);
  std::vector<float> at_targets(n * kTargets);
  TokenStatsBackwardArgs b{};
  b.logits = b.grad_logits = x.data(), b.rows = b.grad_rows = x.rows, b.width = b.columns = width;
  b.transform = a.transform, b.targets = a.targets, b.k = kTargets, b.grad_logprobs = grad.data();
  b.grad_entropy = grad_entropy.data(), b.entropy = entropy.data(), b.parts = saved.data();
  b.at_targets = at_targets.data();
  cuda::token_stats_backward(dtype_of(T{}), b, n, parts, nullptr);

  for (int64_t r = 0; r < n; ++r) {
    const std::vector<double> logp = logprobs_of(x.row(r), width, kTemperature);
    double h = 0, sq = 0, total = 0;
    int64_t best = 0;
    for (int64_t c = 0; c < width; ++c) {
      h -= std::exp(logp[c]) * logp[c];
      sq += std::exp(2 * logp[c]);
      if (x.row(r)[c] > x.row(r)[best]) best = c;
    }
    expect("entropy", entropy[r], h, 1e-5);
    expect("sum_sq_probs", squares[r], sq, 1e-5);
    expect("argmax", static_cast<double>(argmax[r]), static_cast<double>(best), 0);
    expect("logsumexp", logsumexp[r], x.row(r)[0] / kTemperature - logp[0], 1e-5);
    for (int64_t k = 0; k < kTargets; ++k) {
      expect("logprobs", logprobs[r * kTargets + k], logp[targets[r * kTargets + k]], 1e-5);
      total += grad[r * kTargets + k];
    }
    for (int64_t c = 0; c < width; ++c) {
      double dz = std::exp(logp[c]) * (-total - grad_entropy[r] * (logp[c] + h));
      for (int64_t k = 0; k < kTargets; ++k) dz += targets[r * kTargets + k] == c ? grad[r * kTargets + k] : 0;
      expect("gradient", cuda::to_float(x.data()[r * stride + c]), dz / kTemperature, sizeof(T) == 2 ? 1e-2 : 1e-5);
    }
  }
}

// ------------------------------------------------------------------------------------------- kl

double log_of_mixture(double p, double q, double beta) { return std::log((1 - beta) * p + beta * q); }

// Value and gradient of a row in p.
double kl_of(const std::vector<double>& p, const std::vector<double>& q, int kind, double beta,
             std::vector<double>* g) {
  std::vector<double> slope(p.size());
  double value = 0, mean = 0;
  for (size_t c = 0; c < p.size(); ++c) {
    const double a = std::exp(p[c]), b = std::exp(q[c]), m = log_of_mixture(a, b, beta);
    if (kind == kReverse) slope[c] = p[c] - q[c], value += a * slope[c];
    if (kind == kForward) value += b * (q[c] - p[c]);
    if (kind == kJsd) slope[c] = (1 - beta) * (p[c] - m), value += a * slope[c] + beta * b * (q[c] - m);
    if (kind == kTv) slope[c] = a > b ? 0.5 : -0.5, value += (a - b) * slope[c];
    mean += a * slope[c];
  }
  for (size_t c = 0; c < p.size(); ++c) {
    (*g)[c] = kind == kForward ? std::exp(p[c]) - std::exp(q[c]) : std::exp(p[c]) * (slope[c] - mean);
  }
  return value;
}

template <class T>
void check_kl(int64_t n, int64_t width, int64_t stride, int kind, cuda::RowSplit split) {
  constexpr float kBeta = 0.3f;
  Logits<T> x(n, width, stride), y(n, width, width);
  std::vector<float> kl(n), saved(6 * n);
  const std::vector<float> grad_kl = normal(n);
  std::vector<T> grad(n * width);
  std::vector<cuda::KlPartial> partial(n * split.parts);
  TokenKlArgs a{};
  a.logits = x.data(), a.ref_logits = y.data(), a.rows = x.rows, a.ref_rows = y.rows, a.width = a.columns = width;
  a.transform = at_temperature(kTemperature), a.ref_transform = at_temperature(1.0f), a.kind = kind, a.beta = kBeta;
  a.kl = kl.data(), a.parts = saved.data(), a.grad_kl = grad_kl.data(), a.grad_logits = grad.data();
  constexpr int kAll = cuda::kFoldStep | cuda::kMeansStep | cuda::kFinishStep | cuda::kGradientStep;
  cuda::token_kl(dtype_of(T{}), a, n, split, kAll, partial.data(), nullptr);
  for (int64_t r = 0; r < n; ++r) {
    std::vector<double> wanted(width);
    const double value =
        kl_of(logprobs_of(x.row(r), width, kTemperature), logprobs_of(y.row(r), width, 1), kind, kBeta, &wanted);
    expect("kl", kl[r], value, 1e-5);
    for (int64_t c = 0; c < width; ++c) {
      const double got = cuda::to_float(grad[r * width + c]);
      expect("kl gradient", got, wanted[c] * grad_kl[r] / kTemperature, sizeof(T) == 2 ? 1e-2 : 1e-5);
    }
  }
}

// ------------------------------------------------------------------------------------------- tokens

void check_gae(int64_t rows, int64_t length, bool decoupled) {
  const int64_t total = rows * length;
  const std::vector<float> rewards = normal(total), values = normal(total), bootstrap = normal(total);
  const Flags mask(total, 0.8), dones(total, 0.01), truncated(total, 0.01);
  std::vector<float> advantages(total), returns(total);
  GaeArgs a{};
  a.rewards = rewards.data(), a.values = values.data(), a.mask = mask.data(), a.dones = dones.data();
  a.truncated = truncated.data(), a.bootstrap_values = bootstrap.data(), a.length = length;
  a.gamma = 0.99f, a.lam = 0.95f, a.value_lam = decoupled ? 1.0f : 0.95f, a.carry = true;
  a.advantages = advantages.data(), a.returns = returns.data();
  const cuda::Sequences sequences{nullptr, length, rows, total};
  std::vector<uint64_t> links(cuda::link_bytes(sequences, cuda::gae_chains(a)) / sizeof(uint64_t));
  cuda::gae(kFloat32, a, sequences, links.empty() ? nullptr : links.data(), nullptr);
  for (int64_t r = 0; r < rows; ++r) {
    double next_value = 0, advantage = 0, for_return = 0;
    for (int64_t t = length - 1; t >= 0; --t) {
      const int64_t i = r * length + t;
      if (!mask[i]) continue;
      if (dones[i] || truncated[i]) next_value = advantage = for_return = 0;
      if (truncated[i] && !dones[i]) next_value = bootstrap[i];
      const double delta = rewards[i] + a.gamma * next_value - values[i];
      advantage = delta + a.gamma * a.lam * advantage;
      for_return = delta + a.gamma * a.value_lam * for_return;
      next_value = values[i];
      expect("advantage", advantages[i], advantage, 1e-4);
      expect("return", returns[i], for_return + values[i], 1e-4);
    }
  }
}

void check_ppo(int64_t rows, int64_t length) {
  const int64_t total = rows * length;
  const std::vector<float> scores = normal(rows), logprobs = normal(total), ref = normal(total), values = normal(total);
  const Flags mask(total, 0.8);
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
      if (!mask[i]) continue;
      const double reward = -a.kl_coef * (logprobs[i] - ref[i]) + score;
      score = 0;
      advantage = reward + a.gamma * next_value - values[i] + a.gamma * a.lam * advantage;
      next_value = values[i];
      expect("reward", rewards[i], reward, 1e-5);
      expect("ppo advantage", advantages[i], advantage, 1e-4);
      count += 1, sum += advantages[i], squares += static_cast<double>(advantages[i]) * advantages[i];
    }
  }
  const double wanted[] = {count, sum, squares};
  for (int i = 0; i < 3; ++i) expect("moments", moments[i], wanted[i], 1e-9);
}

void check_whiten(int64_t total) {
  const std::vector<float> values = normal(total);
  const Flags mask(total, 0.7);
  std::vector<float> whitened(total);
  std::vector<cuda::Moments> partial(cuda::whiten_blocks(total));
  double moments[3];
  WhitenArgs a{};
  a.values = values.data(), a.mask = mask.data(), a.length = total, a.moments = moments, a.shift_mean = true;
  a.whitened = whitened.data();
  cuda::whiten_moments(kFloat32, a, total, partial.data(), nullptr);
  cuda::whiten(kFloat32, a, total, nullptr);
  double count = 0, sum = 0, squares = 0;
  for (int64_t i = 0; i < total; ++i) {
    if (mask[i]) count += 1, sum += values[i], squares += static_cast<double>(values[i]) * values[i];
  }
  const double mean = sum / count, variance = (squares - count * mean * mean) / (count - 1);
  for (int64_t i = 0; i < total; ++i) {
    expect("whitened", whitened[i], mask[i] ? (values[i] - mean) / std::sqrt(variance + 1e-8) : 0, 1e-5);
  }
}

void check_approx_kl(int64_t count) {
  const std::vector<float> p = normal(count), q = normal(count), ratio = normal(count), grad_kl = normal(count);
  std::vector<float> kl(count), grad(count), grad_ratio(count);
  ApproxKlArgs a{};
  a.logprobs = p.data(), a.ref_logprobs = q.data(), a.importance_ratio = ratio.data(), a.estimator = kK3;
  a.clamp = 100.0f, a.kl = kl.data(), a.grad_kl = grad_kl.data(), a.grad_logprobs = grad.data();
  a.grad_ratio = grad_ratio.data();
  cuda::approx_kl(kFloat32, a, count, nullptr);
  cuda::approx_kl_backward(kFloat32, a, count, nullptr);
  for (int64_t i = 0; i < count; ++i) {
    const double d = static_cast<double>(p[i]) - q[i], value = std::min(100.0, std::expm1(-d) + d);
    expect("approx_kl", kl[i], value * ratio[i], 1e-5);
    expect("its gradient", grad[i], -std::expm1(-d) * ratio[i] * grad_kl[i], 1e-5);
    expect("its ratio's gradient", grad_ratio[i], value * grad_kl[i], 1e-5);
  }
}

}  // namespace

int main() {
  const int64_t round = int64_t{cuda::kRowThreads} * 16;  // columns of several loads a thread
  for (const int parts : {1, 3}) {
    check_stats<cuda::BFloat16>(3, round + 37, round + 37, parts);
    check_stats<float>(2, round + 9, round + 16, parts);
  }
  for (const int kind : {kReverse, kForward, kJsd, kTv}) {
    check_kl<cuda::BFloat16>(3, round + 37, round + 37, kind, {1, false});
    check_kl<float>(2, round + 5, round + 8, kind, {3, false});
    check_kl<float>(2, round + 5, round + 5, kind, {2, true});
    check_kl<cuda::BFloat16>(1, round + 5, round + 5, kind, {cuda::kMaxCluster, true});
  }
  for (const bool decoupled : {false, true}) {
    check_gae(2, 5 * cuda::kTile + 3, decoupled);
    check_gae(5, cuda::kTile / 2 + 1, decoupled);
    check_gae(40, 7, decoupled);
  }
  check_ppo(2, 3 * cuda::kTile + 5);
  check_ppo(9, 100);
  check_whiten(3 * cuda::kTile + 5);
  check_approx_kl(2 * cuda::kTile + 3);
  if (failures > 0) return std::printf("%d wrong numbers\n", failures), 1;
  std::printf("every kernel is right\n");
  return 0;
}
