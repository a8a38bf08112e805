// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels/array.h"

namespace capstan::kernels::test {
namespace {

struct Case {
  RouterShape shape;
  bool has_bias, has_balance;
  double z;
};

std::vector<Case> cases() {
  constexpr auto k32 = DType::kFp32, k64 = DType::kFp64;
  return {
      {{k32, 9, 8, 2}, false, true, 0.1},
      {{k32, 6, 64, 6, false, false}, true, false, 0},
      {{k64, 7, 256, 8, true, true, 8, 4, 2.5}, true, true, 0.01},
      {{k64, 5, 60, 4, true, false, 1, 1, 1.5}, true, true, 0.1},
      {{k32, 3, 512, 32}, false, true, 0},
      {{k64, 1, 1, 1}, false, false, 0.5},
      {{k32, 5, 12, 3, false, true, 12, 5}, false, false, 0},
      {{k32, 0, 8, 2}, false, false, 0},
  };
}

constexpr int64_t kRows = 3;

struct Inputs {
  Array logits, bias, grad_weights, balance, row;
  explicit Inputs(const RouterShape& s)
      : logits(s.dtype, random_values(size(s.tokens * s.experts), 1, 2.0)),
        bias(s.dtype, random_values(size(s.experts), 2, 0.1)),
        grad_weights(s.dtype, random_values(size(s.tokens * s.per_token), 3)),
        balance(s.dtype, random_values(size(kRows * s.experts), 4)),
        row(DType::kInt64, random_ids(size(s.tokens), 5, kRows)) {}
  static size_t size(int64_t n) { return static_cast<size_t>(n); }
};

struct Token {
  Values logits, scores;
  std::vector<size_t> chosen;
  Values weights;
};

std::vector<bool> open_experts(const RouterShape& s, const Values& value) {
  const auto size = static_cast<size_t>(s.experts / s.groups),
             groups = static_cast<size_t>(s.groups);
  std::vector<std::pair<double, size_t>> sums;
  for (size_t g = 0; g < groups; ++g) {
    Values v(value.begin() + static_cast<std::ptrdiff_t>(g * size),
             value.begin() + static_cast<std::ptrdiff_t>((g + 1) * size));
    std::sort(v.begin(), v.end(), std::greater<>());
    sums.emplace_back(-(v[0] + (v.size() > 1 ? v[1] : 0.0)), g);
  }
  std::sort(sums.begin(), sums.end());
  std::vector<bool> open(value.size(), s.groups == 1);
  for (size_t i = 0; s.groups > 1 && i < static_cast<size_t>(s.groups_per_token); ++i)
    for (size_t e = 0; e < size; ++e) open[sums[i].second * size + e] = true;
  return open;
}

Token route(const RouterShape& s, const Values& logits, const Values& bias) {
  Token t{logits, logits, {}, {}};
  const double top = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const double x : logits) sum += std::exp(x - top);
  Values value;
  for (size_t e = 0; e < logits.size(); ++e) {
    t.scores[e] = s.sigmoid ? 1 / (1 + std::exp(-logits[e])) : std::exp(logits[e] - top) / sum;
    value.push_back(t.scores[e] + (bias.empty() ? 0 : bias[e]));
  }
  const auto open = open_experts(s, value);
  std::vector<size_t> order;
  for (size_t e = 0; e < logits.size(); ++e)
    if (open[e]) order.push_back(e);
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return value[a] > value[b]; });
  double total = 0;
  for (size_t j = 0; j < static_cast<size_t>(s.per_token); ++j) {
    t.chosen.push_back(order[j]);
    total += t.scores[order[j]];
  }
  for (const size_t e : t.chosen)
    t.weights.push_back(s.scaling * t.scores[e] / (s.normalize ? total : 1));
  return t;
}

// Of one token, whose choice stays: grad . weights + sum balance x share + z logsumexp^2.
double loss(const Case& c, Values logits, const std::vector<size_t>& chosen, const Values& grad,
            const Values& balance) {
  RouterShape s = c.shape;
  double top = *std::max_element(logits.begin(), logits.end()), sum = 0, total = 0, result = 0;
  for (const double x : logits) sum += std::exp(x - top);
  Values scores;
  for (const double x : logits)
    scores.push_back(s.sigmoid ? 1 / (1 + std::exp(-x)) : std::exp(x - top) / sum);
  for (const size_t e : chosen) total += scores[e];
  for (size_t j = 0; j < chosen.size(); ++j)
    result += grad[j] * s.scaling * scores[chosen[j]] / (s.normalize ? total : 1);
  const double all = std::accumulate(scores.begin(), scores.end(), 0.0);
  for (size_t e = 0; c.has_balance && e < scores.size(); ++e)
    result += balance[e] * scores[e] / all;
  const double lse = top + std::log(sum);
  return result + c.z * lse * lse;
}

Values part(const Values& values, size_t index, int64_t width) {
  const auto first = values.begin() + static_cast<std::ptrdiff_t>(index) * width;
  return {first, first + width};
}

std::vector<Array> run(const Case& c, const Inputs& in) {
  const RouterShape& s = c.shape;
  std::vector<Array> y;
  y.push_back(Array::of_size(s.dtype, Inputs::size(s.tokens * s.experts)));
  y.push_back(Array::of_size(DType::kInt64, Inputs::size(s.tokens * s.per_token)));
  y.push_back(Array::of_size(s.dtype, Inputs::size(s.tokens * s.per_token)));
  y.push_back(Array::of_size(s.dtype, Inputs::size(s.tokens * s.experts)));
  api().router_forward({s, in.logits.data(), c.has_bias ? in.bias.data() : nullptr, y[0].data(),
                        y[1].as<int64_t>(), y[2].data()},
                       nullptr);
  api().router_backward(
      {s, in.logits.data(), y[1].as<int64_t>(), in.grad_weights.data(),
       c.has_balance ? in.balance.data() : nullptr, in.row.as<int64_t>(), c.z, y[3].data()},
      nullptr);
  return y;
}

void check_gradient(const Case& c, const Inputs& in, const Token& t, size_t n,
                    const Values& actual) {
  const Values grad = part(in.grad_weights.values(), n, c.shape.per_token);
  const auto row = static_cast<size_t>(in.row.values()[n]);
  const Values balance = part(in.balance.values(), row, c.shape.experts);
  Values expected;
  for (size_t e = 0; e < t.logits.size(); ++e) {
    const double h = 1e-4;
    Values up = t.logits, down = t.logits;
    up[e] += h;
    down[e] -= h;
    expected.push_back(
        (loss(c, up, t.chosen, grad, balance) - loss(c, down, t.chosen, grad, balance)) / (2 * h));
  }
  expect_close(actual, expected, {1e-4, 2e-6}, "grad_logits");
}

class RouterKernel : public KernelTest {};
TEST_F(RouterKernel, ChoiceWeightsAndGradient_MatchReference) {
  for (const Case& c : cases()) {
    const RouterShape& s = c.shape;
    SCOPED_TRACE(testing::Message()
                 << s.tokens << " tokens, " << s.per_token << " of " << s.experts);
    const Inputs in(s);
    const auto out = same_bits([&] { return run(c, in); });
    for (size_t n = 0; n < Inputs::size(s.tokens); ++n) {
      const Token t = route(s, part(in.logits.values(), n, s.experts),
                            c.has_bias ? in.bias.values() : Values{});
      expect_close(part(out[0].values(), n, s.experts), t.scores, s.dtype, "scores");
      EXPECT_EQ(part(out[1].values(), n, s.per_token), Values(t.chosen.begin(), t.chosen.end()));
      expect_close(part(out[2].values(), n, s.per_token), t.weights, s.dtype, "weights");
      check_gradient(c, in, t, n, part(out[3].values(), n, s.experts));
    }
  }
}

TEST_F(RouterKernel, EqualScoresAndNan_ChooseDistinctExperts) {
  Values logits(2 * 40, 1.0);
  for (size_t e = 0; e < 40; ++e) logits[40 + e] = NAN;
  const Case c{{DType::kFp32, 2, 40, 3, true}, false, false, 0};
  const Array x(DType::kFp32, logits), scores = Array::of_size(DType::kFp32, 80);
  const Array chosen = Array::of_size(DType::kInt64, 6), weights = Array::of_size(DType::kFp32, 6);
  api().router_forward(
      {c.shape, x.data(), nullptr, scores.data(), chosen.as<int64_t>(), weights.data()}, nullptr);
  EXPECT_EQ(chosen.values(), (Values{0, 1, 2, 0, 1, 2}));
}

}  // namespace
}  // namespace capstan::kernels::test
