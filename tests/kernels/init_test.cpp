// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/base/philox.h"

#include "kernels/array.h"

namespace capstan::kernels::test {
namespace {

class FillNormal : public KernelTest {};

template <class T>
void check(DType dtype, size_t count, uint64_t first) {
  std::vector<T> expected(count);
  philox::fill_normal(std::span<T>(expected), 42, 7, first, 0.02);
  const auto out = same_bits([&] {
    std::vector<Array> y;
    y.push_back(Array::of_size(dtype, count));
    api().fill_normal({.dtype = dtype,
                       .out = y[0].data(),
                       .count = static_cast<int64_t>(count),
                       .seed = 42,
                       .stream = 7,
                       .first = first,
                       .deviation = 0.02},
                      nullptr);
    return y;
  });
  EXPECT_EQ(out[0].values(), Values(expected.begin(), expected.end()));
}

TEST_F(FillNormal, AnyRange_HasTheBitsOfTheCpu) {
  for (const size_t count : {0u, 1u, 1000u, 50000u}) {
    check<float>(DType::kFp32, count, 0);
    check<double>(DType::kFp64, count, (uint64_t{1} << 40) + 3);
  }
}

TEST_F(FillNormal, Runs_AreRowsOfALongerRow) {
  constexpr size_t kRows = 13, kWidth = 29;
  constexpr int64_t kLength = 7;
  std::vector<double> whole(kRows * kWidth);
  philox::fill_normal(std::span<double>(whole), 42, 7, 11, 1.0);
  Values expected;
  for (size_t row = 0; row < kRows; ++row)
    for (size_t i = 0; i < kLength; ++i) expected.push_back(whole[row * kWidth + i]);
  const Array out = Array::of_size(DType::kFp64, expected.size());
  api().fill_normal({.dtype = DType::kFp64,
                     .out = out.data(),
                     .count = static_cast<int64_t>(expected.size()),
                     .seed = 42,
                     .stream = 7,
                     .first = 11,
                     .length = kLength,
                     .stride = kWidth},
                    nullptr);
  EXPECT_EQ(out.values(), expected);
}

TEST_F(FillNormal, Bf16_IsTheRoundedFp32) {
  std::vector<float> wide(999);
  philox::fill_normal(std::span<float>(wide), 42, 7, 5, 1.0);
  const Array expected(DType::kBf16, Values(wide.begin(), wide.end()));
  const Array out = Array::of_size(DType::kBf16, wide.size());
  api().fill_normal(
      {.dtype = DType::kBf16, .out = out.data(), .count = 999, .seed = 42, .stream = 7, .first = 5},
      nullptr);
  EXPECT_EQ(out.bytes(), expected.bytes());
}

}  // namespace
}  // namespace capstan::kernels::test
