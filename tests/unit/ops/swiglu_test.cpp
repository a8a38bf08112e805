// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/ops/swiglu.h"

#include <gtest/gtest.h>

#include <cmath>

#include "capstan/base/error.h"
#include "capstan/ops/path.h"
#include "unit/ops/one_param.h"

namespace capstan::ops {
namespace {

using testing::normal;

TEST(Swiglu, KernelMatchesReference_EveryDtypeAndOddSizes) {
  for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf})
    for (const int64_t features : {1, 3, 8, 19, 64})
      for (const int64_t rows : {1, 7, 400}) {
        std::vector<Tensor> outs, grads;
        for (const Path form : {Path::kFused, Path::kReference}) {
          const PathGuard guard(form);
          const Tensor x = leaf(3 * normal({rows, 2 * features}, 1, dtype));
          const Tensor y = swiglu(x);
          run_backward(y, normal({rows, features}, 2));
          outs.push_back(y);
          grads.push_back(x.grad());
        }
        SCOPED_TRACE(fmt::format("{} rows {} features {}", at::toString(dtype), rows, features));
        ASSERT_TRUE(testing::near(outs[0], outs[1]));
        ASSERT_TRUE(testing::near(grads[0], grads[1]));
      }
}

TEST(Swiglu, GradientMatchesDifferences) {
  for (const Path form : {Path::kFused, Path::kReference}) {
    const PathGuard guard(form);
    const Tensor x = leaf(normal({2, 3, 10}, 1)), w = normal({2, 3, 5}, 2);
    run_backward(swiglu(x), w);
    const auto loss = [&] {
      at::NoGradGuard no_grad;
      return weighted_sum(swiglu(x), w);
    };
    EXPECT_TRUE(testing::is_gradient(loss, x.detach(), x.grad()));
  }
}

TEST(Swiglu, ExtremeGatesAreFiniteAndNanStays) {
  for (const auto dtype : {at::kFloat, at::kDouble}) {
    const Tensor gate = at::tensor({-1e30, -800.0, -100.0, -20.0, 0.0, 20.0, 100.0, 1e30},
                                   at::TensorOptions().dtype(dtype));
    const Tensor y = swiglu(at::cat({gate, at::ones({8}, gate.options())}).unsqueeze(0)).squeeze(0);
    EXPECT_TRUE(at::isfinite(y).all().item<bool>());
    EXPECT_EQ(y[0].item<double>(), 0.0);
    EXPECT_EQ(y[7].item<float>(), 1e30F);
    const Tensor bad = at::full({1, 16}, std::nan(""), gate.options());
    EXPECT_TRUE(at::isnan(swiglu(bad)).all().item<bool>());
  }
}

TEST(Swiglu, StridedInputAndOddWidth) {
  const Tensor x = normal({12, 5}, 1).t();
  EXPECT_TRUE(at::equal(swiglu(x), swiglu(x.contiguous())));
  EXPECT_THROW((void)swiglu(normal({2, 3}, 1)), InternalError);
}

}  // namespace
}  // namespace capstan::ops
