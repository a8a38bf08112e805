// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What cuBLASLt would be asked for, and choices as text.
#include "capstan/ops/gemm.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "capstan/base/error.h"

namespace capstan::ops {
namespace {

Tensor bf16(at::IntArrayRef sizes) { return at::zeros(sizes, at::kBFloat16); }
Tensor fp8(at::IntArrayRef sizes, at::ScalarType type = at::kFloat8_e4m3fn) {
  return at::zeros(sizes, at::kByte).view(type);
}

// y [5, 3] = x [5, 7] W^T of W [3, 7].
TEST(Gemm, AProjectionIsItsTransposedColumns) {
  const auto p = lt_problem_of({.out_MN = bf16({5, 3}),
                                .a_MK = bf16({5, 7}),
                                .b_KN = bf16({3, 7}).t(),
                                .bias_N = bf16({3})});
  ASSERT_TRUE(p);
  EXPECT_EQ(p->a, (LtMatrix{LtType::kBf16, 7, 3, 7}));
  EXPECT_EQ(p->b, (LtMatrix{LtType::kBf16, 7, 5, 7}));
  EXPECT_EQ(p->d, (LtMatrix{LtType::kBf16, 3, 5, 3}));
  EXPECT_TRUE(p->a_transposed && !p->b_transposed && p->has_bias && !p->accumulates);
  EXPECT_EQ(p->depth(), 7);
  EXPECT_EQ(shape_text(*p), "5 x 3 x 7 bf16 -> bf16, bias");
  EXPECT_DOUBLE_EQ(flops_of(*p), 2.0 * 5 * 3 * 7);
}

// dW [3, 7] += dy^T x of dy [5, 3], in rows of a larger buffer and from columns of a larger x.
TEST(Gemm, AWeightGradientKeepsLeadingDimensions) {
  const auto p = lt_problem_of({.out_MN = at::zeros({9, 7}).narrow(0, 4, 3),
                                .a_MK = bf16({5, 3}).t(),
                                .b_KN = bf16({5, 16}).narrow(1, 8, 7),
                                .accumulates = true});
  ASSERT_TRUE(p);
  EXPECT_EQ(p->a, (LtMatrix{LtType::kBf16, 7, 5, 16}));
  EXPECT_EQ(p->b, (LtMatrix{LtType::kBf16, 3, 5, 3}));
  EXPECT_EQ(p->d, (LtMatrix{LtType::kFp32, 7, 3, 7}));
  EXPECT_TRUE(!p->a_transposed && p->b_transposed && p->accumulates);
  EXPECT_EQ(shape_text(*p), "3 x 7 x 5 bf16 -> fp32, accumulated");
}

TEST(Gemm, AlignmentIsThatOfTheLeastAligned) {
  const Tensor many = at::zeros({64}, at::kBFloat16);
  for (const auto& [first, alignment] : {std::pair(0, 16), {8, 16}, {4, 8}, {2, 4}, {1, 2}})
    EXPECT_EQ(lt_problem_of({.out_MN = bf16({4, 4}),
                             .a_MK = many.narrow(0, first, 16).view({4, 4}),
                             .b_KN = bf16({4, 4})})
                  ->alignment,
              alignment);
}

TEST(Gemm, SinglesHaveTheirOwnLeadingDimension) {
  const Tensor wide = bf16({5, 40});
  const auto p = lt_problem_of({.out_MN = wide.narrow(0, 0, 1).narrow(1, 0, 3),
                                .a_MK = wide.narrow(0, 1, 1).narrow(1, 0, 7),
                                .b_KN = bf16({7, 3})});
  ASSERT_TRUE(p);
  EXPECT_EQ(p->d.leading, 3);
  EXPECT_EQ(p->b.leading, 7);
}

TEST(Gemm, OtherProductsAreNoCase) {
  const Tensor out = bf16({4, 4}), a = bf16({4, 4});
  const auto is_case = [](const Product& p) { return lt_problem_of(p).has_value(); };
  EXPECT_TRUE(is_case({.out_MN = out, .a_MK = a, .b_KN = a}));
  EXPECT_FALSE(
      is_case({.out_MN = out.to(at::kFloat), .a_MK = a.to(at::kFloat), .b_KN = a.to(at::kFloat)}));
  EXPECT_FALSE(is_case({.out_MN = out.to(at::kHalf), .a_MK = a, .b_KN = a}));
  EXPECT_FALSE(is_case({.out_MN = out, .a_MK = a, .b_KN = a.to(at::kHalf)}));
  EXPECT_FALSE(is_case({.out_MN = bf16({0, 4}), .a_MK = bf16({0, 4}), .b_KN = a}));
  EXPECT_FALSE(is_case({.out_MN = out.t(), .a_MK = a, .b_KN = a}));
  const Tensor gaps = bf16({4, 8}).slice(1, 0, 8, 2);
  EXPECT_FALSE(is_case({.out_MN = out, .a_MK = gaps, .b_KN = a}));
  EXPECT_FALSE(is_case({.out_MN = out, .a_MK = a.narrow(0, 0, 1).expand({4, 4}), .b_KN = a}));
}

TEST(Gemm, Fp8NeedsSidesOf16AndOneE4m3) {
  const auto problem = [](int64_t m, int64_t n, int64_t k, at::ScalarType a, at::ScalarType b,
                          at::ScalarType out) {
    const Tensor scale = at::ones({1});
    return lt_problem_of({.out_MN = at::zeros({m, n}, out),
                          .a_MK = fp8({m, k}, a),
                          .b_KN = fp8({n, k}, b).t(),
                          .a_scale = scale,
                          .b_scale = scale});
  };
  constexpr auto e4m3 = at::kFloat8_e4m3fn, e5m2 = at::kFloat8_e5m2;
  const auto p = problem(32, 16, 48, e5m2, e4m3, at::kFloat);
  ASSERT_TRUE(p);
  EXPECT_TRUE(p->a_transposed && !p->b_transposed);
  EXPECT_EQ(p->a.type, LtType::kE4m3);
  EXPECT_EQ(p->b.type, LtType::kE5m2);
  EXPECT_FALSE(has_libtorch_form(*p));
  EXPECT_EQ(shape_text(*p), "32 x 16 x 48 e5m2 e4m3 -> fp32");
  EXPECT_TRUE(has_libtorch_form(*problem(32, 16, 48, e5m2, e4m3, at::kBFloat16)));
  EXPECT_FALSE(problem(32, 16, 40, e4m3, e4m3, at::kFloat));
  EXPECT_FALSE(problem(24, 16, 48, e4m3, e4m3, at::kFloat));
  EXPECT_FALSE(problem(32, 8, 48, e4m3, e4m3, at::kFloat));
  EXPECT_FALSE(problem(32, 16, 48, e5m2, e5m2, at::kFloat));
  EXPECT_FALSE(problem(32, 16, 48, e4m3, e4m3, at::kHalf));
}

TEST(Gemm, ShapesThatDoNotFitAreOurBug) {
  const auto wrong = [] {
    multiply({.out_MN = bf16({4, 4}), .a_MK = bf16({4, 5}), .b_KN = bf16({4, 4})});
  };
  EXPECT_THROW(wrong(), InternalError);
}

std::vector<GemmChoice> two_choices() {
  const auto p = lt_problem_of({.out_MN = at::zeros({9, 7}).narrow(0, 4, 3),
                                .a_MK = bf16({5, 3}).t(),
                                .b_KN = bf16({5, 16}).narrow(1, 8, 7),
                                .accumulates = true});
  const auto q =
      lt_problem_of({.out_MN = bf16({4, 4}), .a_MK = bf16({4, 4}), .b_KN = bf16({4, 4})});
  const LtAlgorithm algorithm{{1, 0xffffffffffffffff, 3, 4, 5, 6, 7, 0xabc}, 4096};
  return {{*p, algorithm, 12.5, 13.25}, {*q, std::nullopt, 2, 1.5}};
}

TEST(GemmText, ComesBack) {
  const auto list = two_choices();
  const auto back = parse_choices(text_of(list, "GPU, 1"), "GPU, 1");
  ASSERT_EQ(back.size(), 2U);
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_EQ(back[i].problem, list[i].problem);
    EXPECT_EQ(back[i].algorithm, list[i].algorithm);
    EXPECT_EQ(back[i].us, list[i].us);
    EXPECT_EQ(back[i].libtorch_us, list[i].libtorch_us);
  }
}

TEST(GemmText, OfAnotherGpuIsNone) {
  EXPECT_TRUE(parse_choices(text_of(two_choices(), "GPU, 1"), "GPU, 2").empty());
}

TEST(GemmText, WhatIsBrokenIsRefused) {
  const std::string good = text_of(two_choices(), "GPU, 1");
  const auto problem_of = [](const std::string& text) -> std::string {
    try {
      (void)parse_choices(text, "GPU, 1");
    } catch (const ConfigError& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(problem_of(good), "");
  EXPECT_THAT(problem_of(""), ::testing::HasSubstr("measured anew"));
  EXPECT_THAT(problem_of("x" + good), ::testing::HasSubstr("'xcapstan products 1'"));
  const size_t line = good.find("GPU, 1\n") + 7;
  EXPECT_THAT(problem_of(good.substr(0, line) + "9" + good.substr(line)),
              ::testing::HasSubstr("a broken line 3"));
  EXPECT_THAT(problem_of(good.substr(0, good.find("abc"))),
              ::testing::HasSubstr("a broken line 3"));
  EXPECT_THAT(problem_of(good + "1 2\n"), ::testing::HasSubstr("a broken line 5"));
}

}  // namespace
}  // namespace capstan::ops
