// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Products by cuBLASLt against plain ones in fp64: on a GPU by the library, on the fake device by
// the definition behind strict checks.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "capstan/device/accelerator.h"
#include "capstan/ops/fp8.h"
#include "capstan/ops/gemm.h"
#include "capstan/ops/linear.h"
#include "ops/gemm_internal.h"
#include "unit/ops/one_param.h"

namespace capstan::ops {
namespace {

using testing::normal;

Tensor on_device(const Tensor& x) { return x.to(device::run_device()); }
Tensor wide(const Tensor& x) { return x.to(at::kCPU, at::kDouble); }

Tensor real_of(const Fp8Matrix& q) {
  return wide(q.values_MK.to(at::kFloat)) * wide(q.inverse_scale);
}

constexpr testing::Tolerance kFp32{2e-5, 2e-5};
testing::Tolerance tolerance_of(at::ScalarType out) {
  return out == at::kFloat ? kFp32 : testing::tolerance_of(out);
}

// Rows with a gap behind them, or as they are; or the transposed of such.
Tensor laid_out(const Tensor& x, bool transposed, int64_t gap) {
  const Tensor rows = transposed ? x.t().contiguous() : x;
  const Tensor padded =
      on_device(at::constant_pad_nd(rows.to(at::kFloat), {0, gap}, NAN)).to(x.scalar_type());
  const Tensor cut = padded.narrow(1, 0, rows.size(1));
  return transposed ? cut.t() : cut;
}

struct Shape {
  int64_t m, n, k;
};
constexpr Shape kShapes[] = {{64, 32, 48}, {40, 24, 16}, {8, 8, 8}};

void expect_product(const Product& p, const Tensor& before) {
  Tensor want = at::mm(wide(p.a_MK), wide(p.b_KN));
  if (p.accumulates) want = want + wide(before);
  if (p.bias_N.defined()) want = want + wide(p.bias_N);
  EXPECT_TRUE(testing::near(wide(p.out_MN), want, tolerance_of(p.out_MN.scalar_type())))
      << shape_text(*lt_problem_of(p));
}

TEST(GpuGemm, EveryLayoutAndTypeIsThePlainProduct) {
  const auto gemm = Gemm::share(GemmLibrary::kCublaslt);
  for (const auto dtype : {at::kBFloat16, at::kHalf})
    for (const auto out_type : {dtype, at::kFloat})
      for (const Shape& s : kShapes)
        for (int layout = 0; layout < 16; ++layout) {
          const int64_t gap = layout & 4 ? 8 : 0;
          const Tensor before = normal({s.m, s.n}, 3, out_type);
          Product p{.out_MN = laid_out(before, false, gap),
                    .a_MK = laid_out(normal({s.m, s.k}, 1, dtype), layout & 1, gap),
                    .b_KN = laid_out(normal({s.k, s.n}, 2, dtype), layout & 2, gap),
                    .accumulates = (layout & 8) != 0};
          ASSERT_TRUE(gemm->multiply(p)) << shape_text(*lt_problem_of(p));
          expect_product(p, before);
        }
}

TEST(GpuGemm, ABiasIsAddedBeforeTheRounding) {
  const auto gemm = Gemm::share(GemmLibrary::kCublaslt);
  for (const auto dtype : {at::kBFloat16, at::kHalf}) {
    Product p{.out_MN = on_device(at::full({40, 24}, NAN, dtype)),
              .a_MK = on_device(normal({40, 16}, 1, dtype)),
              .b_KN = on_device(normal({24, 16}, 2, dtype)).t(),
              .bias_N = on_device(normal({24}, 4, dtype))};
    ASSERT_TRUE(gemm->multiply(p));
    expect_product(p, {});
  }
}

// What lies beside the result stays: rows of a larger buffer.
TEST(GpuGemm, WritesNothingBesideTheResult) {
  const auto gemm = Gemm::share(GemmLibrary::kCublaslt);
  const Tensor all = on_device(at::full({20, 24}, 7, at::kFloat));
  const Tensor a = on_device(normal({12, 40}, 1, at::kBFloat16)),
               b = on_device(normal({40, 8}, 2, at::kBFloat16));
  ASSERT_TRUE(gemm->multiply(
      {.out_MN = all.narrow(0, 4, 12).narrow(1, 8, 8), .a_MK = a, .b_KN = b, .accumulates = true}));
  const Tensor want = at::full({20, 24}, 7, at::kDouble);
  want.narrow(0, 4, 12).narrow(1, 8, 8).add_(at::mm(wide(a), wide(b)));
  EXPECT_TRUE(testing::near(wide(all), want, kFp32));
}

// Every candidate, not the first alone: each is timed on memory of the problem's layout, and the
// chosen one then gives the product.
TEST(GpuGemm, AMeasuredChoiceGivesTheProduct) {
  const auto gemm = Gemm::share(GemmLibrary::kCublaslt);
  const Tensor before = normal({64, 32}, 3, at::kFloat);
  Product p{.out_MN = on_device(before),
            .a_MK = on_device(normal({48, 64}, 1, at::kBFloat16)).t(),
            .b_KN = on_device(normal({48, 32}, 2, at::kBFloat16)),
            .accumulates = true};
  const GemmChoice choice = gemm->measure(*lt_problem_of(p));
  ASSERT_TRUE(choice.algorithm);
  EXPECT_GT(choice.us, 0);
  EXPECT_EQ(gemm->adopt(parse_choices(text_of({choice}, "here"), "here")), 1);
  ASSERT_TRUE(gemm->multiply(p));
  expect_product(p, before);
}

TEST(GpuGemm, ScratchIsTheProblemAgain) {
  const Tensor many = on_device(at::zeros({4096}, at::kBFloat16));
  for (const int64_t ahead : {0, 4, 2, 1})
    for (int layout = 0; layout < 4; ++layout) {
      const Tensor a = many.narrow(0, ahead, 64 * 8).view({64, 8}),
                   b = many.narrow(0, 0, 64).view({8, 8});
      const auto problem =
          lt_problem_of({.out_MN = on_device(at::zeros({64, 8})),
                         .a_MK = layout & 1 ? many.narrow(0, ahead, 512).view({8, 64}).t() : a,
                         .b_KN = layout & 2 ? b.t() : b,
                         .accumulates = true});
      ASSERT_TRUE(problem);
      EXPECT_EQ(lt_problem_of(scratch_product(*problem)), problem) << shape_text(*problem);
    }
}

// A bias of the result's type is added in the product of either library, another one behind it.
TEST(GpuGemm, ABiasInFp8IsAddedBeforeTheRounding) {
  for (const bool by_lt : {false, true}) {
    const auto gemm = by_lt ? Gemm::share(GemmLibrary::kCublaslt) : nullptr;
    for (const auto bias_type : {at::kBFloat16, at::kFloat})
      for (const bool by_row : {false, true}) {
        const auto cast = [by_row](const Tensor& x) {
          const Tensor there = on_device(x);
          return by_row ? quantise_rows(there, Fp8Format::kE4m3)
                        : quantise(there, Fp8Format::kE4m3, largest_size(there));
        };
        const Fp8Matrix a = cast(normal({64, 48}, 1, at::kBFloat16)),
                        b = cast(normal({32, 48}, 2, at::kBFloat16));
        const Tensor bias = 4 * normal({32}, 3, bias_type);
        const Tensor out = on_device(at::full({64, 32}, NAN, at::kBFloat16));
        multiply_into(out, a, b, on_device(bias));
        const Tensor product = at::mm(real_of(a), real_of(b).t());
        const Tensor want = product + wide(bias);
        const Tensor twice = bias_type == at::kFloat ? product.abs() : at::zeros_like(product);
        const Tensor bound = (want.abs() + twice) * 0x1p-8 + 2e-3;
        EXPECT_TRUE((wide(out) - want).abs().le(bound).all().item<bool>());
      }
  }
}

// Weight gradients in fp8 reach the fp32 buffer without a rounding to 16 bits.
TEST(GpuGemm, Fp8IsSummedInFp32) {
  const auto gemm = Gemm::share(GemmLibrary::kAuto);
  for (const auto format : {Fp8Format::kE5m2, Fp8Format::kE4m3})
    for (const bool by_row : {false, true}) {
      const Tensor a = on_device(normal({64, 48}, 1, at::kBFloat16)),
                   b = on_device(normal({32, 48}, 2, at::kBFloat16));
      const auto cast = [by_row](const Tensor& x, Fp8Format f) {
        return by_row ? quantise_rows(x, f) : quantise(x, f, largest_size(x));
      };
      const Fp8Matrix qa = cast(a, format), qb = cast(b, Fp8Format::kE4m3);
      const Tensor product = at::mm(real_of(qa), real_of(qb).t());
      const Tensor out = on_device(at::full({64, 32}, NAN, at::kFloat));
      // Tensor cores sum fp8 with fewer bits than fp32: far below a rounding to bf16 all the same.
      const testing::Tolerance close{1e-3, 1e-3};
      ASSERT_TRUE(multiply_wide(out, qa, qb, false));
      EXPECT_TRUE(testing::near(wide(out), product, close));
      ASSERT_TRUE(multiply_wide(out, qa, qb, true));
      ASSERT_TRUE(multiply_wide(out, qa, qb, true));
      EXPECT_TRUE(testing::near(wide(out), 3 * product, close));
    }
}

}  // namespace
}  // namespace capstan::ops
