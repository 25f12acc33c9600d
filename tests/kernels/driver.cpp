// SPDX-License-Identifier: Apache-2.0
// The CPU kernels against float64 without PyTorch: for machines, and emulators of machines, that have none.
//
//   c++ -std=c++17 -O2 -DRF_ISA=isa_default -Icsrc tests/kernels/driver.cpp -o driver && ./driver
//
// Prints what differs and a closing line; ends with 1 if anything does. `make check-aarch64` runs it under qemu. The
// truths share no code with the kernels. tests/ does far more; this covers what an instruction set can get wrong:
// conversions (all of them), elementary functions, every dtype, lengths around the vectors' width.
#include "numbers.h"

using namespace rlhf_fast;
using namespace rlhf_fast::RF_ISA;
using truth::expect;
using truth::Row;

namespace {

// ------------------------------------------------------------------------------------------- kernels

template <class T>
struct Kind;
template <>
struct Kind<float> {
  static constexpr const char* name = "float32";
  static constexpr double rounding = 0;  // of a result that is stored in the logits' dtype
};
template <>
struct Kind<BFloat16> {
  static constexpr const char* name = "bfloat16";
  static constexpr double rounding = 1.0 / 256;
};
template <>
struct Kind<Half> {
  static constexpr const char* name = "float16";
  static constexpr double rounding = 1.0 / 2048;
};

// Random numbers in the dtype, and the same in float64.
template <class T>
std::vector<T> numbers(int64_t count, double scale, Row* exact) {
  std::vector<T> x(static_cast<size_t>(count));
  exact->clear();
  for (auto& one : x) {
    from_float(static_cast<float>(scale * normal()), &one);
    exact->push_back(to_float(one));
  }
  return x;
}

RowIndex one_row() {
  RowIndex rows{};
  rows.dims = 1;
  rows.sizes[0] = 1;
  return rows;
}

LogitTransform transform(float temperature) { return {nullptr, temperature, 1.0f, 0.0f}; }

template <class T>
void check_row(int64_t columns) {
  const std::string label = std::string(Kind<T>::name) + ", " + std::to_string(columns) + " columns: ";
  const float temperature = 0.7f;
  Row z, y, kl_gradient;
  const std::vector<T> logits = numbers<T>(columns, 3, &z), ref = numbers<T>(columns, 3, &y);
  for (double& x : z) x /= temperature;
  for (double& x : y) x /= temperature;
  const Row logp = truth::log_softmax(z), p = truth::softmax(z);
  double entropy = 0, squares = 0;
  for (size_t j = 0; j < z.size(); ++j) {
    entropy -= p[j] * logp[j];
    squares += p[j] * p[j];
  }

  const int64_t target = columns / 2;
  float logprob, got_entropy, got_logsumexp, got_squares, parts[6];
  int64_t argmax;
  TokenStatsArgs stats{};
  stats.logits = logits.data();
  stats.rows = one_row();
  stats.width = stats.columns = columns;
  stats.transform = transform(temperature);
  stats.targets = &target;
  stats.k = 1;
  stats.logprobs = &logprob;
  stats.entropy = &got_entropy;
  stats.logsumexp = &got_logsumexp;
  stats.sum_sq_probs = &got_squares;
  stats.argmax = &argmax;
  stats.parts = parts;
  token_stats<T>(stats, 0, 1);
  const auto at = static_cast<size_t>(target);
  expect(label + "logprob", logprob, logp[at], 2e-6, 4e-7);
  expect(label + "entropy", got_entropy, entropy, 4e-6, 1e-6);
  expect(label + "logsumexp", got_logsumexp, truth::logsumexp(z), 2e-6, 4e-7);
  expect(label + "sum of squares", got_squares, squares, 0, 2e-6);
  expect(label + "argmax", z[static_cast<size_t>(argmax)], *std::max_element(z.begin(), z.end()), 0, 0);

  const float grad_logprob = 1.5f, grad_entropy = 0.25f;
  std::vector<T> gradient(logits.size());
  TokenStatsBackwardArgs backward{};
  backward.logits = logits.data();
  backward.rows = backward.grad_rows = one_row();
  backward.width = backward.columns = columns;
  backward.transform = transform(temperature);
  backward.targets = &target;
  backward.k = 1;
  backward.grad_logprobs = &grad_logprob;
  backward.grad_entropy = &grad_entropy;
  backward.entropy = &got_entropy;
  backward.parts = parts;
  backward.grad_logits = gradient.data();
  token_stats_backward<T>(backward, 0, 1);
  for (size_t j = 0; j < z.size(); ++j) {
    const double want =
        ((j == at ? grad_logprob : 0) - grad_logprob * p[j] - grad_entropy * p[j] * (logp[j] + entropy)) / temperature;
    expect(label + "gradient", to_float(gradient[j]), want, 3e-6, Kind<T>::rounding);
  }

  float kl;
  const float one = 1.0f;
  TokenKlArgs both{};
  both.logits = logits.data();
  both.ref_logits = ref.data();
  both.rows = both.ref_rows = one_row();
  both.width = both.columns = columns;
  both.transform = both.ref_transform = transform(temperature);
  both.kind = kReverse;
  both.kl = &kl;
  both.parts = parts;
  token_kl<T>(both, 0, 1);
  expect(label + "KL", kl, truth::kl(z, y, &kl_gradient), 4e-6, 1e-6);
  both.grad_kl = &one;
  both.grad_logits = gradient.data();
  token_kl_backward<T>(both, 0, 1);
  for (size_t j = 0; j < z.size(); ++j)
    expect(label + "gradient of KL", to_float(gradient[j]), kl_gradient[j] / temperature, 6e-6, Kind<T>::rounding);
}

// The total variation of two nearly equal rows: its terms are added up, not the two sides, whose sums would cancel.
void check_small_distance() {
  for (int row = 0; row < 20; ++row) {
    Row z, y;
    const std::vector<float> logits = numbers<float>(4000, 0.5, &z);
    std::vector<float> ref = logits;
    for (size_t j = 0; j < ref.size(); ++j) y.push_back(ref[j] += j < ref.size() / 2 ? 1e-3f : -1e-3f);
    float kl, parts[6];
    TokenKlArgs args{};
    args.logits = logits.data();
    args.ref_logits = ref.data();
    args.rows = args.ref_rows = one_row();
    args.width = args.columns = 4000;
    args.transform = args.ref_transform = transform(1.0f);
    args.kind = kTv;
    args.kl = &kl;
    args.parts = parts;
    token_kl<float>(args, 0, 1);
    const Row p = truth::softmax(z), q = truth::softmax(y);
    double want = 0;
    for (size_t j = 0; j < p.size(); ++j) want += std::fabs(p[j] - q[j]) / 2;
    expect("a small distance", kl, want, 0, 3e-5);
  }
}

template <class T>
void check_sequence(int64_t length) {
  const std::string label = std::string(Kind<T>::name) + ", " + std::to_string(length) + " tokens: ";
  Row r, v;
  const std::vector<T> rewards = numbers<T>(length, 1, &r), values = numbers<T>(length, 1, &v);
  const auto size = static_cast<size_t>(length);
  std::vector<float> advantages(size), returns(size), whitened(size), kl(size);
  GaeArgs gae_args{};
  gae_args.rewards = rewards.data();
  gae_args.values = values.data();
  gae_args.length = length;
  gae_args.gamma = 0.99f;
  gae_args.lam = gae_args.value_lam = 0.95f;
  gae_args.advantages = advantages.data();
  gae_args.returns = returns.data();
  gae<T>(gae_args, 0, 1);
  const Row want = truth::gae(r, v, 0.99f, 0.95f);
  for (size_t t = 0; t < size; ++t) {
    expect(label + "advantage", advantages[t], want[t], 1e-5, 1e-6);
    expect(label + "return", returns[t], want[t] + v[t], 1e-5, 1e-6);
  }

  std::vector<char> real(size, 1);
  const bool* mask = reinterpret_cast<const bool*>(real.data());
  double row_moments[3], mean = 0;
  WhitenArgs moments{};
  moments.values = rewards.data();
  moments.mask = mask;
  moments.length = length;
  moments.row_moments = moments.moments = row_moments;
  moments.whitened = whitened.data();
  moments.shift_mean = true;
  whiten_moments<T>(moments, 0, 1);
  for (double x : r) mean += x / static_cast<double>(size);
  expect(label + "count", row_moments[0], static_cast<double>(size), 0, 0);
  expect(label + "sum", row_moments[1], mean * static_cast<double>(size), 1e-5, 1e-6);
  if (size > 1) {
    whiten<T>(moments, 0, 1);
    double sum = 0, squares = 0;
    for (float x : whitened) sum += x;
    for (float x : whitened) squares += static_cast<double>(x) * x;
    expect(label + "mean of what is whitened", sum / static_cast<double>(size), 0, 1e-5, 0);
    expect(label + "its variance", squares / static_cast<double>(size), 1, 1.0 / static_cast<double>(size), 1e-4);
  }

  ApproxKlArgs approx{};
  approx.logprobs = rewards.data();
  approx.ref_logprobs = values.data();
  approx.estimator = kK3;
  approx.clamp = kInf;
  approx.kl = kl.data();
  approx_kl<T>(approx, 0, length);
  for (size_t t = 0; t < size; ++t) expect(label + "k3", kl[t], std::expm1(v[t] - r[t]) - (v[t] - r[t]), 2e-6, 2e-6);
}

// Six query heads on two key heads; the keys lie apart, and the first is masked.
template <class T>
void check_decode_attention(int64_t length, int64_t size) {
  const std::string label =
      std::string(Kind<T>::name) + ", " + std::to_string(length) + " keys of " + std::to_string(size) + ": ";
  const int64_t key_heads = 2, shared = 3, stride = size + 1, head_stride = stride * (length + 2);
  Row q, k, v;
  const std::vector<T> query = numbers<T>(key_heads * shared * size, 1, &q);
  const std::vector<T> keys = numbers<T>(key_heads * head_stride, 1, &k);
  const std::vector<T> values = numbers<T>(key_heads * head_stride, 1, &v);
  std::vector<char> seen(static_cast<size_t>(length), 1);
  if (length > 1) seen[0] = 0;
  std::vector<T> output(query.size());
  DecodeAttentionArgs args{};
  args.query = query.data();
  args.key = keys.data();
  args.value = values.data();
  args.mask = reinterpret_cast<const bool*>(seen.data());
  args.key_strides[1] = args.value_strides[1] = head_stride;
  args.key_strides[2] = args.value_strides[2] = stride;
  args.key_heads = key_heads;
  args.shared = shared;
  args.length = length;
  args.size = args.value_size = size;
  args.scale = 0.25f;
  args.output = output.data();
  decode_attention<T>(args, 0, key_heads);
  const auto at = [&](const Row& x, int64_t head, int64_t j, int64_t d) {
    return x[static_cast<size_t>(head / shared * head_stride + j * stride + d)];
  };
  for (int64_t head = 0; head < key_heads * shared; ++head) {
    Row weights(static_cast<size_t>(length), 0.0);
    double sum = 0;
    for (int64_t j = length > 1 ? 1 : 0; j < length; ++j) {
      double score = 0;
      for (int64_t d = 0; d < size; ++d) score += q[static_cast<size_t>(head * size + d)] * at(k, head, j, d);
      sum += weights[static_cast<size_t>(j)] = std::exp(0.25 * score);
    }
    for (int64_t d = 0; d < size; ++d) {
      double want = 0;
      for (int64_t j = 0; j < length; ++j) want += weights[static_cast<size_t>(j)] / sum * at(v, head, j, d);
      expect(label + "attention", to_float(output[static_cast<size_t>(head * size + d)]), want, 4e-6,
             Kind<T>::rounding + 1e-6);
    }
  }
}

template <class T>
void check_dtype() {
  for (int64_t length : {1, 2, 3, 15, 16, 17, 33}) {
    for (int64_t size : {1, 8, 17, 64, 80}) check_decode_attention<T>(length, size);
  }
  for (int64_t columns : {1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 1000, 1024, 1025, 4099}) check_row<T>(columns);
  for (int64_t length : {1, 2, 3, 4, 5, 7, 8, 9, 16, 31, 33, 257}) check_sequence<T>(length);
}

}  // namespace

int main() {
  check_conversions<Half>("float16", 5);
  check_conversions<BFloat16>("bfloat16", 8);
  check_tails<float>("float32");
  check_tails<Half>("float16");
  check_tails<BFloat16>("bfloat16");
  check_arithmetic();
  check_small_distance();
  check_dtype<float>();
  check_dtype<BFloat16>();
  check_dtype<Half>();
  std::printf("%d lanes: %lld comparisons, %d failed\n", kLanes, static_cast<long long>(truth::comparisons),
              truth::failures);
  return truth::failures > 0;
}
