// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What cuBLASLt would be asked for, and choices as text.
#include "capstan/ops/gemm.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "capstan/base/error.h"
#include "support/gradient_check.h"

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
  EXPECT_TRUE(p->a_transposed && !p->b_transposed && p->epilogue == LtEpilogue::kBias &&
              !p->accumulates);
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
                          at::ScalarType out, bool has_bias = false) {
    const Tensor scale = at::ones({1});
    return lt_problem_of({.out_MN = at::zeros({m, n}, out),
                          .a_MK = fp8({m, k}, a),
                          .b_KN = fp8({n, k}, b).t(),
                          .bias_N = has_bias ? at::zeros({n}, out) : Tensor(),
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
  const auto with_bias = problem(32, 16, 48, e4m3, e4m3, at::kBFloat16, true);
  ASSERT_TRUE(with_bias);
  EXPECT_EQ(with_bias->epilogue, LtEpilogue::kBias);
  EXPECT_FALSE(problem(32, 16, 48, e4m3, e4m3, at::kFloat, true)) << "fp32 has another bias";
  EXPECT_FALSE(problem(32, 16, 40, e4m3, e4m3, at::kFloat));
  EXPECT_FALSE(problem(24, 16, 48, e4m3, e4m3, at::kFloat));
  EXPECT_FALSE(problem(32, 8, 48, e4m3, e4m3, at::kFloat));
  EXPECT_FALSE(problem(32, 16, 48, e5m2, e5m2, at::kFloat));
  EXPECT_FALSE(problem(32, 16, 48, e4m3, e4m3, at::kHalf));
}

// y [5, 8] = gelu(x W^T + b) of W [8, 7]; what epilogues need beside the product.
Product activated(at::ScalarType type = at::kBFloat16) {
  return {.out_MN = at::zeros({5, 8}, type),
          .a_MK = at::zeros({5, 7}, type),
          .b_KN = at::zeros({8, 7}, type).t(),
          .bias_N = at::zeros({8}, type),
          .sum_MN = at::zeros({5, 8}, type)};
}
// dW [3, 7] += dy^T x, and the sums of dy.
Product with_sums() {
  return {.out_MN = at::zeros({3, 7}),
          .a_MK = bf16({5, 3}).t(),
          .b_KN = bf16({5, 7}),
          .accumulates = true,
          .row_sums_M = at::zeros({3})};
}

TEST(Gemm, FusedProductsNameTheirEpilogue) {
  const auto p = lt_problem_of(activated());
  ASSERT_TRUE(p);
  EXPECT_EQ(p->epilogue, LtEpilogue::kGeluBias);
  EXPECT_TRUE(is_fused(*p) && !has_libtorch_form(*p));
  EXPECT_EQ(shape_text(*p), "5 x 8 x 7 bf16 -> bf16, bias, GELU");
  EXPECT_EQ(plain_of(*p), lt_problem_of(plain_of(activated())));
  EXPECT_EQ(plain_of(*p).epilogue, LtEpilogue::kBias);
  const auto q = lt_problem_of(with_sums());
  ASSERT_TRUE(q);
  EXPECT_EQ(shape_text(*q), "3 x 7 x 5 bf16 -> fp32, accumulated, bias gradient");
  EXPECT_EQ(plain_of(*q), lt_problem_of(plain_of(with_sums())));
  EXPECT_FALSE(is_fused(plain_of(*q)));
}

TEST(Gemm, EpiloguesThatCublasltHasNotAreNoCase) {
  const auto is_case = [](Product p, const auto& change) {
    change(p);
    return lt_problem_of(p).has_value();
  };
  const auto as_derivative = [](Product& p) {
    std::swap(p.gelu_at_MN, p.sum_MN);
    p.bias_N = Tensor();
  };
  EXPECT_TRUE(is_case(activated(), [](Product&) {}));
  EXPECT_TRUE(is_case(activated(at::kHalf), as_derivative));
  EXPECT_FALSE(is_case(activated(), [](Product& p) { p.bias_N = Tensor(); }));
  EXPECT_FALSE(is_case(activated(), [](Product& p) {
    p.out_MN = p.sum_MN = bf16({5, 12});
    p.b_KN = bf16({12, 7}).t(), p.bias_N = bf16({12});
  })) << "12 features";
  EXPECT_FALSE(is_case(activated(), [](Product& p) {
    p.sum_MN = bf16({48}).narrow(0, 4, 40).view({5, 8});
  })) << "8 bytes off";
  EXPECT_FALSE(is_case(activated(), [](Product& p) {
    p.out_MN = at::zeros({5, 8}), p.sum_MN = at::zeros({5, 8}), p.bias_N = at::zeros({8});
  })) << "an fp32 result";
  EXPECT_TRUE(is_case(with_sums(), [](Product&) {}));
  EXPECT_FALSE(is_case(with_sums(), [](Product& p) { p.row_sums_M = bf16({3}); }));
  EXPECT_FALSE(is_case(with_sums(), [](Product& p) { p.out_MN = bf16({3, 7}); }));
}

TEST(Gemm, InPartsTheyAreTheirDefinition) {
  const Tensor x = testing::normal({5, 7}, 1), w = testing::normal({8, 7}, 2),
               b = testing::normal({8}, 3), dy = testing::normal({5, 3}, 4);
  const Tensor sum = at::addmm(b, x, w.t());
  Product p = activated(at::kDouble);
  p.a_MK = x, p.b_KN = w.t(), p.bias_N = b;
  multiply(p);
  EXPECT_TRUE(testing::near(p.sum_MN, sum));
  EXPECT_TRUE(testing::near(p.out_MN, at::gelu(sum, "tanh")));
  const Tensor du = at::empty({5, 8}, at::kDouble), w2 = testing::normal({3, 8}, 5);
  multiply({.out_MN = du, .a_MK = dy, .b_KN = w2, .gelu_at_MN = sum});
  EXPECT_TRUE(testing::near(du, at::gelu_backward(at::mm(dy, w2), sum, "tanh")));
  const Tensor dw = at::ones({3, 7}, at::kDouble), sums = at::empty({3}, at::kDouble);
  multiply({.out_MN = dw, .a_MK = dy.t(), .b_KN = x, .accumulates = true, .row_sums_M = sums});
  EXPECT_TRUE(testing::near(dw, 1 + at::mm(dy.t(), x)));
  EXPECT_TRUE(testing::near(sums, dy.sum(0)));
}

TEST(Gemm, ContradictionsAreOurBug) {
  const auto refuses = [](const auto& change) {
    Product p = activated();
    change(p);
    try {
      multiply(p);
    } catch (const InternalError&) {
      return true;
    }
    return false;
  };
  EXPECT_FALSE(refuses([](Product&) {}));
  EXPECT_TRUE(refuses([](Product& p) { p.gelu_at_MN = p.sum_MN; }));
  EXPECT_TRUE(refuses([](Product& p) { p.sum_MN = bf16({5, 7}); }));
  EXPECT_TRUE(refuses([](Product& p) { p.sum_MN = bf16({8, 5}).t(); }));
  EXPECT_TRUE(refuses([](Product& p) { p.sum_MN = at::zeros({5, 8}); }));
  EXPECT_TRUE(refuses([](Product& p) { p.bias_N = Tensor(), p.accumulates = true; }));
  EXPECT_THROW(multiply_by_libtorch(activated()), InternalError);
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
    EXPECT_EQ(back[i].rival_us, list[i].rival_us);
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
  EXPECT_THAT(problem_of("x" + good), ::testing::HasSubstr("'xcapstan products 2'"));
  const size_t line = good.find("GPU, 1\n") + 7;
  EXPECT_THAT(problem_of(good.substr(0, line) + "9" + good.substr(line)),
              ::testing::HasSubstr("a broken line 3"));
  EXPECT_THAT(problem_of(good.substr(0, good.find("abc"))),
              ::testing::HasSubstr("a broken line 3"));
  EXPECT_THAT(problem_of(good + "1 2\n"), ::testing::HasSubstr("a broken line 5"));
}

}  // namespace
}  // namespace capstan::ops
