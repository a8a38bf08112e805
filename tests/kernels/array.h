// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Typed device arrays with host values in fp64, and comparisons. Inputs are rounded to their dtype
// when an Array is made, so values() is what the kernel sees.
#pragma once
#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "kernels/device.h"

namespace capstan::kernels::test {

using Values = std::vector<double>;
using Bytes = std::vector<unsigned char>;

class Array {
 public:
  // `shift` elements lie before the first one, so that it may not be aligned.
  Array(DType dtype, const Values& values, size_t shift = 0);
  static Array of_size(DType dtype, size_t count, size_t shift = 0);  // filled with NaN or -1
  static Array zeros(DType dtype, size_t count);
  [[nodiscard]] void* data() const;
  template <class T>
  [[nodiscard]] T* as() const {
    return static_cast<T*>(data());
  }
  [[nodiscard]] Values values() const;
  [[nodiscard]] Bytes bytes() const;

 private:
  Array(DType dtype, size_t count, size_t shift, const Bytes& bytes);
  DType dtype_;
  size_t count_, shift_;
  Memory memory_;
};

[[nodiscard]] Values random_values(size_t count, uint64_t seed, double scale = 1.0);
[[nodiscard]] Values random_ids(size_t count, uint64_t seed, int64_t below);

// Largest relative and absolute error of a result in this dtype that is computed in at least fp32.
struct Tolerance {
  double relative, absolute;
};
[[nodiscard]] Tolerance tolerance_of(DType dtype);
void expect_close(const Values& actual, const Values& expected, Tolerance tolerance,
                  const char* what);
inline void expect_close(const Values& actual, const Values& expected, DType dtype,
                         const char* what) {
  expect_close(actual, expected, tolerance_of(dtype), what);
}

// Calls `run`, which makes fresh arrays and launches kernels on them, under several orders of
// threads. All calls must return the same bits; returns the arrays of the first.
[[nodiscard]] std::vector<Array> same_bits(const std::function<std::vector<Array>()>& run);

class KernelTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (const auto why = missing_device()) GTEST_SKIP() << *why;
  }
};

}  // namespace capstan::kernels::test
