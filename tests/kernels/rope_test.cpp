// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "kernels/array.h"

namespace capstan::kernels::test {
namespace {

struct Case {
  DType dtype;
  size_t rows, heads, head_size, row_stride;
  bool has_positions;
  size_t shift = 0;
};

constexpr size_t kLength = 64, kRowsPerSample = 5;

struct Table {
  Array cos, sin;
  explicit Table(DType dtype, size_t half)
      : cos(dtype, values(half, 0)), sin(dtype, values(half, 1)) {}
  static Values values(size_t half, int which) {
    Values out;
    for (size_t t = 0; t < kLength; ++t)
      for (size_t i = 0; i < half; ++i) {
        const double angle = static_cast<double>(t) *
                             std::pow(1e4, -static_cast<double>(i) / static_cast<double>(half));
        out.push_back(which == 0 ? std::cos(angle) : std::sin(angle));
      }
    return out;
  }
};

Values turned(const Case& c, Values x, const Table& table, const Values& positions, bool backward) {
  const Values cos = table.cos.values(), sin = table.sin.values();
  const size_t half = c.head_size / 2;
  for (size_t n = 0; n < c.rows; ++n) {
    const auto at = c.has_positions ? static_cast<size_t>(positions[n]) : n % kRowsPerSample;
    for (size_t h = 0; h < c.heads; ++h)
      for (size_t i = 0; i < half; ++i) {
        double& p = x[n * c.row_stride + h * c.head_size + i];
        double& q = x[n * c.row_stride + h * c.head_size + i + half];
        const double s = sin[at * half + i] * (backward ? -1 : 1), a = p, b = q;
        p = a * cos[at * half + i] - b * s;
        q = b * cos[at * half + i] + a * s;
      }
  }
  return x;
}

void check_case(const Case& c, bool backward) {
  SCOPED_TRACE(testing::Message() << name_of(c.dtype) << " " << c.rows << " x " << c.heads << " x "
                                  << c.head_size << (backward ? " backward" : " forward"));
  const Array x(c.dtype, random_values(c.rows * c.row_stride, 1), c.shift);
  const Table table(c.dtype == DType::kFp64 ? DType::kFp64 : DType::kFp32, c.head_size / 2);
  const Array positions(DType::kInt64, random_ids(c.rows, 2, kLength));
  const auto out = same_bits([&] {
    std::vector<Array> y;
    y.emplace_back(c.dtype, x.values(), c.shift);
    api().rope({.dtype = c.dtype,
                .x = y[0].data(),
                .rows = static_cast<int64_t>(c.rows),
                .row_stride = static_cast<int64_t>(c.row_stride),
                .heads = static_cast<int64_t>(c.heads),
                .head_size = static_cast<int64_t>(c.head_size),
                .cos = table.cos.data(),
                .sin = table.sin.data(),
                .positions = c.has_positions ? positions.as<int64_t>() : nullptr,
                .rows_per_sample = kRowsPerSample,
                .backward = backward},
               nullptr);
    return y;
  });
  expect_close(out[0].values(), turned(c, x.values(), table, positions.values(), backward), c.dtype,
               "x");
}

class Rope : public KernelTest {};
TEST_F(Rope, ForwardAndBackward_MatchReference) {
  const std::vector<Case> cases = {
      {DType::kBf16, 7, 3, 64, 320, true},        {DType::kBf16, 11, 14, 64, 896, false},
      {DType::kFp32, 6, 2, 128, 256, true},       {DType::kFp64, 5, 3, 8, 32, true},
      {DType::kBf16, 3, 2, 6, 17, true},          {DType::kFp32, 1, 1, 2, 2, false},
      {DType::kBf16, 4, 40, 128, 5120, false, 0}, {DType::kFp32, 3, 2, 16, 40, true, 1},
      {DType::kBf16, 0, 2, 64, 128, true},        {DType::kBf16, 3, 0, 64, 128, true},
  };
  for (const Case& c : cases) {
    check_case(c, false);
    check_case(c, true);
  }
}

TEST_F(Rope, OddHeadSize_IsRefused) {
  const Array x = Array::zeros(DType::kFp32, 9);
  EXPECT_ANY_THROW(api().rope({.dtype = DType::kFp32,
                               .x = x.data(),
                               .rows = 1,
                               .row_stride = 9,
                               .heads = 3,
                               .head_size = 3,
                               .cos = x.data(),
                               .sin = x.data()},
                              nullptr));
}

}  // namespace
}  // namespace capstan::kernels::test
