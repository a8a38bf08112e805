// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/ops/gelu.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numbers>

#include "capstan/ops/path.h"
#include "unit/ops/one_param.h"

namespace capstan::ops {
namespace {

using testing::normal;

constexpr GeluForm kForms[] = {GeluForm::kTanh, GeluForm::kErf};
constexpr Path kPaths[] = {Path::kFused, Path::kReference};

// By the C library, one number at a time.
double by_definition(double x, GeluForm form) {
  if (form == GeluForm::kErf) return x / 2 * (1 + std::erf(x / std::numbers::sqrt2));
  const double inner = std::sqrt(2 / std::numbers::pi) * (x + 0.044715 * x * x * x);
  return x / 2 * (1 + std::tanh(inner));
}

TEST(Gelu, IsItsDefinition) {
  for (const GeluForm form : kForms)
    for (const Path path : kPaths) {
      const PathGuard guard(path);
      const Tensor x = at::linspace(-9, 9, 181, at::kDouble), y = gelu(x, form);
      for (int64_t i = 0; i < x.numel(); ++i)
        EXPECT_NEAR(y[i].item<double>(), by_definition(x[i].item<double>(), form), 1e-14);
    }
}

TEST(Gelu, KernelMatchesReference_EveryDtypeAndOddSizes) {
  for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf})
    for (const GeluForm form : kForms)
      for (const int64_t features : {1, 3, 8, 19, 64})
        for (const int64_t rows : {1, 7, 400}) {
          std::vector<Tensor> outs, grads;
          for (const Path path : kPaths) {
            const PathGuard guard(path);
            const Tensor x = leaf(3 * normal({rows, features}, 1, dtype));
            const Tensor y = gelu(x, form);
            ASSERT_EQ(y.scalar_type(), dtype);
            run_backward(y, normal({rows, features}, 2));
            outs.push_back(y);
            grads.push_back(x.grad());
          }
          SCOPED_TRACE(fmt::format("{} rows {} features {}", at::toString(dtype), rows, features));
          testing::Tolerance tolerance = testing::tolerance_of(dtype);
          // 1 + tanh(-3) loses digits in fp32, whoever computes it.
          if (dtype == at::kFloat) tolerance.atol = 5e-6;
          ASSERT_TRUE(testing::near(outs[0], outs[1], tolerance));
          ASSERT_TRUE(testing::near(grads[0], grads[1], tolerance));
        }
}

TEST(Gelu, GradientMatchesDifferences) {
  for (const GeluForm form : kForms)
    for (const Path path : kPaths) {
      const PathGuard guard(path);
      const Tensor x = leaf(2 * normal({2, 3, 10}, 1)), w = normal({2, 3, 10}, 2);
      run_backward(gelu(x, form), w);
      const auto loss = [&] {
        at::NoGradGuard no_grad;
        return weighted_sum(gelu(x, form), w);
      };
      EXPECT_TRUE(testing::is_gradient(loss, x.detach(), x.grad()));
    }
}

TEST(Gelu, StridedInputAndLargeNumbers) {
  const Tensor x = normal({12, 5}, 1).t(), kept = x.clone();
  for (const GeluForm form : kForms) {
    EXPECT_TRUE(at::equal(gelu(x, form), gelu(x.contiguous(), form)));
    const Tensor large = at::tensor({-1e4, -100.0, 100.0, 1e4}, at::kFloat);
    EXPECT_TRUE(at::equal(gelu(large, form), at::relu(large)));
    EXPECT_TRUE(at::isnan(gelu(at::full({16}, std::nan("")), form)).all().item<bool>());
  }
  EXPECT_TRUE(at::equal(x, kept));
}

}  // namespace
}  // namespace capstan::ops
