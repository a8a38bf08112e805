// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "kernels/array.h"

namespace capstan::kernels::test {
namespace {

struct Case {
  DType dtype;
  size_t rows, columns, row_stride;
  double scale = 3.0;
  size_t shift = 0;
};

DType wide(const Case& c) { return c.dtype == DType::kFp64 ? DType::kFp64 : DType::kFp32; }

struct Inputs {
  Array logits, targets, weights;
  explicit Inputs(const Case& c)
      : logits(c.dtype, random_values(c.rows * c.row_stride, 1, c.scale), c.shift),
        targets(DType::kInt64, make_targets(c)),
        weights(wide(c), random_values(c.rows, 3)) {}
  static Values make_targets(const Case& c) {
    Values t = random_ids(c.rows, 2, static_cast<int64_t>(c.columns));
    for (size_t n = 1; n < t.size(); n += 3) t[n] = kIgnoredTarget;
    if (!t.empty()) t[0] = static_cast<double>(c.columns - 1);
    return t;
  }
};

struct Expected {
  Values top, sum, picked, lse, logprob, gradient;
};
Expected reference(const Case& c, const Inputs& in) {
  const Values x = in.logits.values(), targets = in.targets.values(), w = in.weights.values();
  Expected e{Values(c.rows), Values(c.rows), Values(c.rows), Values(c.rows), Values(c.rows), x};
  for (size_t n = 0; n < c.rows; ++n) {
    const double* row = x.data() + n * c.row_stride;
    e.top[n] = row[0];
    for (size_t v = 1; v < c.columns; ++v) e.top[n] = std::max(e.top[n], row[v]);
    for (size_t v = 0; v < c.columns; ++v) e.sum[n] += std::exp(row[v] - e.top[n]);
    e.lse[n] = e.top[n] + std::log(e.sum[n]);
    const bool is_ignored = targets[n] == kIgnoredTarget;
    const size_t target = is_ignored ? 0 : static_cast<size_t>(targets[n]);
    e.picked[n] = is_ignored ? 0 : row[target];
    e.logprob[n] = is_ignored ? 0 : row[target] - e.lse[n];
    for (size_t v = 0; v < c.columns; ++v)
      e.gradient[n * c.row_stride + v] =
          is_ignored ? 0 : w[n] * (std::exp(row[v] - e.lse[n]) - (v == target ? 1.0 : 0.0));
  }
  return e;
}

LogitRows rows_of(const Case& c, const Inputs& in, const Array& logits) {
  return {.dtype = c.dtype,
          .logits = logits.data(),
          .rows = static_cast<int64_t>(c.rows),
          .columns = static_cast<int64_t>(c.columns),
          .row_stride = static_cast<int64_t>(c.row_stride),
          .first_column = 0,
          .targets = in.targets.as<int64_t>()};
}

Tolerance gradient_tolerance(const Case& c) {
  Tolerance t = tolerance_of(c.dtype);
  t.absolute = c.dtype == DType::kBf16 ? 1e-4 : t.absolute;
  return t;
}

void check_fused(const Case& c, const Inputs& in, const Expected& e) {
  const auto out = same_bits([&] {
    std::vector<Array> y;
    y.emplace_back(c.dtype, in.logits.values(), c.shift);
    y.push_back(Array::of_size(wide(c), c.rows));
    y.push_back(Array::of_size(wide(c), c.rows));
    api().cross_entropy({rows_of(c, in, y[0]), nullptr, y[2].data()}, nullptr);
    api().cross_entropy({rows_of(c, in, y[0]), in.weights.data(), y[1].data()}, nullptr);
    return y;
  });
  expect_close(out[0].values(), e.gradient, gradient_tolerance(c), "gradient");
  expect_close(out[1].values(), e.logprob, wide(c), "logprob");
  EXPECT_EQ(out[1].bytes(), out[2].bytes());
}

void check_parts(const Case& c, const Inputs& in, const Expected& e) {
  const auto out = same_bits([&] {
    std::vector<Array> y;
    y.emplace_back(c.dtype, in.logits.values(), c.shift);
    for (int i = 0; i < 5; ++i) y.push_back(Array::of_size(wide(c), c.rows));
    api().logit_stats({rows_of(c, in, y[0]), y[1].data(), y[2].data(), y[3].data()}, nullptr);
    api().finish_stats({.dtype = wide(c),
                        .rows = static_cast<int64_t>(c.rows),
                        .top = y[1].data(),
                        .sum = y[2].data(),
                        .picked = y[3].data(),
                        .targets = in.targets.as<int64_t>(),
                        .lse = y[4].data(),
                        .logprob = y[5].data()},
                       nullptr);
    api().logit_gradient({rows_of(c, in, y[0]), y[4].data(), in.weights.data()}, nullptr);
    return y;
  });
  expect_close(out[1].values(), e.top, wide(c), "top");
  expect_close(out[2].values(), e.sum, wide(c), "sum");
  expect_close(out[3].values(), e.picked, wide(c), "picked");
  expect_close(out[4].values(), e.lse, wide(c), "lse");
  expect_close(out[5].values(), e.logprob, wide(c), "logprob");
  expect_close(out[0].values(), e.gradient, gradient_tolerance(c), "gradient");
}

class CrossEntropy : public KernelTest {};
TEST_F(CrossEntropy, FusedAndParts_MatchReference) {
  const std::vector<Case> cases = {
      {DType::kBf16, 7, 256, 256},       {DType::kFp32, 4, 100, 128},
      {DType::kFp64, 5, 33, 33},         {DType::kBf16, 5, 1003, 1003},
      {DType::kFp32, 1, 1, 1},           {DType::kBf16, 2, 3, 5},
      {DType::kBf16, 3, 64, 64, 40.0},   {DType::kFp32, 3, 50, 50, 200.0},
      {DType::kBf16, 4, 77, 80, 3.0, 3}, {DType::kFp32, 0, 10, 10},
  };
  for (const Case& c : cases) {
    SCOPED_TRACE(testing::Message() << name_of(c.dtype) << " " << c.rows << " x " << c.columns
                                    << ", scale " << c.scale);
    const Inputs in(c);
    const Expected e = reference(c, in);
    check_fused(c, in, e);
    check_parts(c, in, e);
  }
}

TEST_F(CrossEntropy, BigOddVocabulary_MatchesReference) {
  const Case c{DType::kBf16, 2, 50257, 50257};
  const Inputs in(c);
  check_fused(c, in, reference(c, in));
}

// Two ranks with 60 and 40 columns, and one that holds none.
TEST_F(CrossEntropy, VocabularyCutOverRanks_GivesTheWholeResult) {
  const Case c{DType::kFp32, 6, 100, 100};
  const Inputs in(c);
  const Expected e = reference(c, in);
  const size_t cuts[] = {0, 60, 100, 100};
  std::vector<Values> tops, sums, picked;
  const auto part = [&](size_t rank, const Array& logits) {
    LogitRows rows = rows_of(c, in, logits);
    rows.logits = logits.as<float>() + cuts[rank];
    rows.first_column = static_cast<int64_t>(cuts[rank]);
    rows.columns = static_cast<int64_t>(cuts[rank + 1] - cuts[rank]);
    return rows;
  };
  for (size_t rank = 0; rank < 3; ++rank) {
    const Array t = Array::of_size(DType::kFp32, c.rows), s = Array::of_size(DType::kFp32, c.rows),
                p = Array::of_size(DType::kFp32, c.rows);
    api().logit_stats({part(rank, in.logits), t.data(), s.data(), p.data()}, nullptr);
    tops.push_back(t.values());
    sums.push_back(s.values());
    picked.push_back(p.values());
  }
  Values top_all = tops[0], sum_all(c.rows), picked_all(c.rows);
  for (size_t n = 0; n < c.rows; ++n)
    for (size_t rank = 1; rank < 3; ++rank) top_all[n] = std::max(top_all[n], tops[rank][n]);
  const Array top(DType::kFp32, top_all);
  for (size_t rank = 0; rank < 3; ++rank) {
    const Array s(DType::kFp32, sums[rank]), t(DType::kFp32, tops[rank]);
    api().rescale_sums({DType::kFp32, static_cast<int64_t>(c.rows), t.data(), top.data(), s.data()},
                       nullptr);
    const Values scaled = s.values();
    for (size_t n = 0; n < c.rows; ++n) {
      sum_all[n] += scaled[n];
      picked_all[n] += picked[rank][n];
    }
  }
  expect_close(sum_all, e.sum, DType::kFp32, "sum");
  expect_close(picked_all, e.picked, DType::kFp32, "picked");
  const Array lse(DType::kFp32, e.lse);
  const Array logits(DType::kFp32, in.logits.values());
  for (size_t rank = 0; rank < 3; ++rank)
    api().logit_gradient({part(rank, logits), lse.data(), in.weights.data()}, nullptr);
  expect_close(logits.values(), e.gradient, DType::kFp32, "gradient");
}

TEST_F(CrossEntropy, MinusInfinityLogits_HaveNoShare) {
  Values x(600, -INFINITY);
  x[17] = 1.0;
  x[590] = 1.0;
  const Array logits(DType::kBf16, x), targets(DType::kInt64, {17.0});
  const Array logprob = Array::of_size(DType::kFp32, 1);
  api().cross_entropy({{.dtype = DType::kBf16,
                        .logits = logits.data(),
                        .rows = 1,
                        .columns = 600,
                        .row_stride = 600,
                        .targets = targets.as<int64_t>()},
                       nullptr,
                       logprob.data()},
                      nullptr);
  expect_close(logprob.values(), {-std::log(2.0)}, DType::kFp32, "logprob");
}

}  // namespace
}  // namespace capstan::kernels::test
