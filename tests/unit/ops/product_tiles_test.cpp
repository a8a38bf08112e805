// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include "capstan/device/isa.h"
#include "capstan/ops/grouped_choice.h"
#include "capstan/ops/grouped_linear.h"
#include "capstan/ops/linear.h"
#include "capstan/ops/path.h"
#include "ops/gemm_internal.h"
#include "unit/ops/one_param.h"

namespace capstan::ops {
namespace {

using testing::normal;

class ProductTiles : public ::testing::Test {
 protected:
  void SetUp() override {
    if (device::isa_level() < device::Isa::kAmx) GTEST_SKIP() << "no AMX here";
  }
};

struct Shape {
  int64_t rows, columns, depth;
};

// [rows, columns] with adjacent rows or columns, `gap` numbers between its lines.
Tensor matrix(int64_t rows, int64_t columns, bool transposed, int64_t gap, uint64_t seed) {
  const int64_t lines = transposed ? columns : rows, length = transposed ? rows : columns;
  const Tensor x = normal({lines, length + gap}, seed, at::kBFloat16).narrow(1, 0, length);
  return transposed ? x.t() : x;
}

// The bound of a sum in fp32 whose products are exact.
void expect_within_rounding(const Tensor& out, const Tensor& before, const Product& p) {
  const Tensor a = p.a_MK.to(at::kDouble), b = p.b_KN.to(at::kDouble);
  const Tensor exact = at::mm(a, b) + before;
  const Tensor bound =
      (at::mm(a.abs(), b.abs()) + before.abs()) * (static_cast<double>(a.size(1) + 1) * 0x1p-23);
  EXPECT_LE(((out.to(at::kDouble) - exact).abs() - bound).max().item<double>(), 0);
}

void check(const Shape& s, bool a_transposed, bool b_transposed, bool adds, int64_t gap) {
  SCOPED_TRACE(::testing::Message()
               << s.rows << " x " << s.columns << " x " << s.depth
               << (a_transposed ? ", a transposed" : "") << (b_transposed ? ", b transposed" : "")
               << (adds ? ", added" : "") << ", gap " << gap);
  const Tensor wide = normal({s.rows, s.columns + gap}, 3, at::kFloat);
  const Tensor behind = wide.narrow(1, s.columns, gap).clone();
  const Product p{.out_MN = wide.narrow(1, 0, s.columns),
                  .a_MK = matrix(s.rows, s.depth, a_transposed, gap, 1),
                  .b_KN = matrix(s.depth, s.columns, b_transposed, gap, 2),
                  .accumulates = adds};
  const Tensor before = adds ? p.out_MN.to(at::kDouble) : at::zeros(p.out_MN.sizes(), at::kDouble);
  ASSERT_TRUE(is_for_tiles(p));
  multiply(p);
  expect_within_rounding(p.out_MN, before, p);
  EXPECT_TRUE(at::equal(wide.narrow(1, s.columns, gap), behind)) << "wrote behind its columns";
}

// The last one is packed in parts, and so is the one before: 16 panels of rows or columns fit.
constexpr Shape kShapes[] = {{1, 1, 1},     {32, 32, 32},   {33, 31, 70},    {5, 200, 64},
                             {64, 96, 512}, {257, 130, 95}, {40, 600, 8192}, {600, 40, 8192}};

TEST_F(ProductTiles, AreWithinTheRoundingOfFp32Sums) {
  for (const Shape& s : kShapes)
    for (const bool a_transposed : {false, true})
      for (const bool b_transposed : {false, true})
        for (const int64_t gap : {0, 3}) check(s, a_transposed, b_transposed, gap == 3, gap);
}

TEST_F(ProductTiles, GiveTheSameBitsWithAnyThreads) {
  const Product p{.out_MN = at::empty({300, 500}, at::kFloat),
                  .a_MK = matrix(300, 700, true, 0, 1),
                  .b_KN = matrix(700, 500, false, 0, 2)};
  const int threads = at::get_num_threads();
  multiply(p);
  const Tensor first = p.out_MN.clone();
  at::set_num_threads(threads == 1 ? 3 : 1);
  multiply(p);
  at::set_num_threads(threads);
  EXPECT_TRUE(at::equal(p.out_MN, first));
}

TEST_F(ProductTiles, KeepNumbersThatAreNotFinite) {
  const Tensor a = matrix(40, 40, false, 0, 1);
  a[7][9] = std::numeric_limits<float>::infinity();
  const Product p{.out_MN = at::empty({40, 40}, at::kFloat),
                  .a_MK = a,
                  .b_KN = at::ones({40, 40}, at::kBFloat16)};
  multiply(p);
  EXPECT_TRUE(at::equal(p.out_MN.isinf().any(1).nonzero().view({-1}), at::full({1}, 7, at::kLong)));
}

// LibTorch alone would round each micro-batch's gradient to bf16.
TEST_F(ProductTiles, SumWeightGradientsInFp32) {
  const Tensor grad = normal({90, 48}, 1, at::kBFloat16), x = normal({90, 80}, 2, at::kBFloat16);
  param::GradSlot slot{.buffer = at::zeros({48, 80}, at::kFloat), .overwrite = true};
  add_outer_product(slot, grad, x);
  add_outer_product(slot, grad, x);
  const Tensor exact = 2 * at::mm(grad.to(at::kDouble).t(), x.to(at::kDouble));
  EXPECT_LT((slot.buffer.to(at::kDouble) - exact).abs().max().item<double>(), 1e-4);
  const PathGuard reference(Path::kReference);
  slot.overwrite = true;
  add_outer_product(slot, grad, x);
  add_outer_product(slot, grad, x);
  EXPECT_GT((slot.buffer.to(at::kDouble) - exact).abs().max().item<double>(), 1e-2);
}

// Of three experts, the second one without rows.
TEST_F(ProductTiles, SumWeightGradientsOfExpertsInFp32) {
  const std::vector<int64_t> counts{90, 0, 37};
  std::vector<plan::ParamSpec> table;
  for (const char* name : {"a", "b", "c"}) table.push_back(param_spec(name, {48, 80}));
  testing::PlainStore store(table, {.values = at::kBFloat16, .gradients = at::kFloat});
  std::vector<Projection> list;
  for (const char* name : {"a", "b", "c"}) list.push_back({{store.find(name)}, {}});
  const Tensor x = normal({127, 80}, 1, at::kBFloat16), grad = normal({127, 48}, 2, at::kBFloat16);
  for (int pass = 0; pass < 3; ++pass)
    run_backward(grouped_linear(leaf(x), list, {counts, {}}), grad);
  const auto expect = [&](const char* name, int64_t first, int64_t count) {
    const Tensor exact = 3 * at::mm(grad.narrow(0, first, count).to(at::kDouble).t(),
                                    x.narrow(0, first, count).to(at::kDouble));
    const Tensor got = store.gradient_of(name).to(at::kDouble);
    EXPECT_LT((got - exact).abs().max().item<double>(), 1e-4) << name;
  };
  expect("a", 0, 90);
  expect("b", 90, 0);
  expect("c", 90, 37);
  EXPECT_TRUE(choose_grouped(grouped_case(at::kCPU, at::kBFloat16, 3)).rounding.empty());
}

}  // namespace
}  // namespace capstan::ops
