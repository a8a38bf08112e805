// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Products that do more in their pass (GELU, its derivative, sums of rows) against plain math in
// fp64: by cuBLASLt, and in parts. On a GPU by the library, on the fake device by the definition.
#include <gtest/gtest.h>

#include <cmath>

#include "capstan/device/accelerator.h"
#include "capstan/ops/gelu.h"
#include "capstan/ops/gemm.h"
#include "unit/ops/one_param.h"

namespace capstan::ops {
namespace {

using testing::normal;

struct Shape {
  int64_t m, n, k;
};
constexpr Shape kShapes[] = {{64, 32, 48}, {40, 24, 16}, {7, 8, 9}};
constexpr testing::Tolerance kFp32{2e-5, 2e-5};

Tensor on_device(const Tensor& x) { return x.to(device::run_device()); }
Tensor wide(const Tensor& x) { return x.to(at::kCPU, at::kDouble); }
Tensor nan_like(at::IntArrayRef sizes, at::ScalarType type) {
  return on_device(at::full(sizes, NAN, type));
}

// By cuBLASLt and, without a Gemm, in parts.
template <class Check>
void both_ways(const Check& check) {
  {
    SCOPED_TRACE("in parts");
    check([](const Product& p) { multiply(p); });
  }
  SCOPED_TRACE("in one pass");
  const auto gemm = Gemm::share(GemmLibrary::kCublaslt);
  check([&gemm](const Product& p) {
    const bool is_whole = p.out_MN.size(0) % 8 == 0 && p.a_MK.size(1) % 8 == 0;
    const bool is_fused = gemm->multiply(p);
    EXPECT_TRUE(is_fused || !is_whole) << "no algorithm";
    if (!is_fused) multiply(p);
  });
}

TEST(GpuEpilogue, GeluOfASumWithBias) {
  both_ways([](const auto& run) {
    for (const auto type : {at::kBFloat16, at::kHalf})
      for (const Shape& s : kShapes) {
        if (s.k % 8 != 0) continue;
        const Tensor x = normal({s.m, s.k}, 1, type), w = normal({s.n, s.k}, 2, type),
                     b = 3 * normal({s.n}, 3, type);
        const Product p{.out_MN = nan_like({s.m, s.n}, type),
                        .a_MK = on_device(x),
                        .b_KN = on_device(w).t(),
                        .bias_N = on_device(b),
                        .sum_MN = nan_like({s.m, s.n}, type)};
        run(p);
        const Tensor sum = at::mm(wide(x), wide(w).t()) + wide(b);
        EXPECT_TRUE(testing::near(wide(p.sum_MN), sum, testing::tolerance_of(type)));
        EXPECT_TRUE(
            testing::near(wide(p.out_MN), at::gelu(sum, "tanh"), testing::tolerance_of(type)));
      }
  });
}

TEST(GpuEpilogue, TheDerivativeOfGelu) {
  both_ways([](const auto& run) {
    for (const auto type : {at::kBFloat16, at::kHalf})
      for (const Shape& s : kShapes) {
        if (s.k % 8 != 0) continue;
        const Tensor dy = normal({s.m, s.k}, 1, type), w = normal({s.k, s.n}, 2, type),
                     at_sum = 2 * normal({s.m, s.n}, 3, type);
        const Product p{.out_MN = nan_like({s.m, s.n}, type),
                        .a_MK = on_device(dy),
                        .b_KN = on_device(w),
                        .gelu_at_MN = on_device(at_sum)};
        run(p);
        const Tensor want = at::gelu_backward(at::mm(wide(dy), wide(w)), wide(at_sum), "tanh");
        EXPECT_TRUE(testing::near(wide(p.out_MN), want, testing::tolerance_of(type)));
        EXPECT_TRUE(at::equal(p.gelu_at_MN.cpu(), at_sum)) << "is read only";
      }
  });
}

TEST(GpuEpilogue, SumsOfTheGradientBesideTheWeights) {
  both_ways([](const auto& run) {
    for (const auto type : {at::kBFloat16, at::kHalf})
      for (const Shape& s : kShapes)
        for (const bool accumulates : {false, true}) {
          const Tensor dy = normal({s.k, s.m}, 1, type), x = normal({s.k, s.n}, 2, type),
                       before = normal({s.m, s.n}, 3, at::kFloat);
          const Product p{
              .out_MN = accumulates ? on_device(before) : nan_like({s.m, s.n}, at::kFloat),
              .a_MK = on_device(dy).t(),
              .b_KN = on_device(x),
              .accumulates = accumulates,
              .row_sums_M = nan_like({s.m}, at::kFloat)};
          run(p);
          const Tensor product = at::mm(wide(dy).t(), wide(x));
          EXPECT_TRUE(
              testing::near(wide(p.out_MN), accumulates ? wide(before) + product : product, kFp32));
          EXPECT_TRUE(testing::near(wide(p.row_sums_M), wide(dy).sum(0), kFp32));
        }
  });
}

// Each candidate is timed beside the product alone with kernels behind it; the choice is kept as
// text and gives the product.
TEST(GpuEpilogue, AMeasuredChoiceGivesTheProduct) {
  const auto gemm = Gemm::share(GemmLibrary::kAuto);
  const auto type = at::kBFloat16;
  const Tensor x = normal({64, 48}, 1, type), w = normal({32, 48}, 2, type),
               b = normal({32}, 3, type);
  const Product p{.out_MN = nan_like({64, 32}, type),
                  .a_MK = on_device(x),
                  .b_KN = on_device(w).t(),
                  .bias_N = on_device(b),
                  .sum_MN = nan_like({64, 32}, type)};
  const GemmChoice choice = gemm->measure(*lt_problem_of(p));
  EXPECT_GT(choice.us, 0);
  EXPECT_GT(choice.rival_us, 0);
  EXPECT_EQ(gemm->adopt(parse_choices(text_of({choice}, "here"), "here")), 1);
  multiply(p);
  const Tensor sum = at::mm(wide(x), wide(w).t()) + wide(b);
  EXPECT_TRUE(testing::near(wide(p.sum_MN), sum, testing::tolerance_of(type)));
  EXPECT_TRUE(testing::near(wide(p.out_MN), at::gelu(sum, "tanh"), testing::tolerance_of(type)));
}

}  // namespace
}  // namespace capstan::ops
