// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Numbers of tests: comparing tensors by dtype, and gradients against central differences in fp64.
#pragma once
#include <ATen/core/Tensor.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <functional>

namespace capstan::testing {

struct Tolerance {
  double rtol, atol;
};
// |a - b| <= rtol |b| + atol. One table for all tests: fp64 1e-11, fp32 2e-5, bf16 and fp16 2e-2
// (and 1e-2 of the scale).
[[nodiscard]] Tolerance tolerance_of(at::ScalarType dtype);
[[nodiscard]] ::testing::AssertionResult near(const at::Tensor& got, const at::Tensor& want,
                                              Tolerance tolerance);
// By the coarser dtype of the two.
[[nodiscard]] ::testing::AssertionResult near(const at::Tensor& got, const at::Tensor& want);

// `loss` reads `variable` (contiguous fp64, changed in place and restored) and returns a number;
// `gradient` is its claimed derivative. Checks up to `samples` elements spread over the tensor.
[[nodiscard]] ::testing::AssertionResult is_gradient(const std::function<double()>& loss,
                                                     const at::Tensor& variable,
                                                     const at::Tensor& gradient,
                                                     int64_t samples = 40);

// Normal numbers that depend on the seed only.
[[nodiscard]] at::Tensor normal(at::IntArrayRef sizes, uint64_t seed,
                                at::ScalarType dtype = at::ScalarType::Double);

}  // namespace capstan::testing
