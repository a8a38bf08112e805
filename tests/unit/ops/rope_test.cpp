// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/ops/rope.h"

#include <gtest/gtest.h>

#include <cmath>

#include "capstan/base/error.h"
#include "capstan/ops/path.h"
#include "unit/ops/one_param.h"

namespace capstan::ops {
namespace {

using testing::normal;

// Complex multiplication by e^{i t theta^(-2d/H)}, one element at a time.
Tensor by_hand(const Tensor& x, const Tensor& positions, const RopeSpec& s) {
  const Tensor out = x.to(at::kDouble).clone();
  const int64_t half = s.head_size / 2;
  auto a = out.accessor<double, 3>();
  for (int64_t b = 0; b < x.size(0); ++b)
    for (int64_t t = 0; t < x.size(1); ++t) {
      const double p =
          positions.defined() ? positions[b][t].item<double>() : static_cast<double>(t);
      for (int64_t h = 0; h < s.heads; ++h)
        for (int64_t d = 0; d < half; ++d) {
          const double angle = p * std::pow(s.theta, -2.0 * d / static_cast<double>(s.head_size));
          double& u = a[b][t][h * s.head_size + d];
          double& v = a[b][t][h * s.head_size + half + d];
          const double u0 = u, v0 = v;
          u = u0 * std::cos(angle) - v0 * std::sin(angle);
          v = v0 * std::cos(angle) + u0 * std::sin(angle);
        }
    }
  return out;
}

TEST(Rope, BothFormsMatchTheFormula) {
  const Tensor restart = at::tensor({0, 1, 2, 0, 1, 5, 6, 7, 0, 900}, at::kLong).view({2, 5});
  for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf})
    for (const int64_t head : {2, 6, 8, 16, 64, 80})
      for (const bool with_positions : {false, true})
        for (const Path form : {Path::kFused, Path::kReference}) {
          const PathGuard guard(form);
          const RopeSpec spec{.theta = 500.0, .head_size = head, .heads = 3};
          const Tensor x = normal({2, 5, 4 * head}, 1, dtype);
          const Tensor positions = with_positions ? restart : Tensor();
          const Tensor want = by_hand(x, positions, spec);
          const Tensor got = rope(x.clone(), positions, spec);
          ASSERT_TRUE(testing::near(got, want)) << at::toString(dtype) << " head " << head;
          EXPECT_TRUE(at::equal(got.narrow(2, 3 * head, head), x.narrow(2, 3 * head, head)));
        }
}

TEST(Rope, WorksInPlaceAndGradientTurnsBack) {
  for (const Path form : {Path::kFused, Path::kReference}) {
    const PathGuard guard(form);
    const RopeSpec spec{.theta = 100.0, .head_size = 6, .heads = 2};
    const Tensor x = leaf(normal({1, 4, 18}, 1)), w = normal({1, 4, 18}, 2), kept = w.clone();
    const Tensor copy = x * 1;
    const Tensor y = rope(copy, {}, spec);
    EXPECT_EQ(y.data_ptr(), copy.data_ptr());
    torch::autograd::backward({y}, {w});
    EXPECT_TRUE(at::equal(w, kept));
    const auto loss = [&] {
      at::NoGradGuard no_grad;
      return weighted_sum(rope(x.detach().clone(), {}, spec), w);
    };
    EXPECT_TRUE(testing::is_gradient(loss, x.detach(), x.grad()));
  }
}

TEST(Rope, TableIsSharedAndGrows) {
  const RopeTable a = rope_table(123.0, 8, 10, at::kFloat),
                  b = rope_table(123.0, 8, 10, at::kFloat);
  EXPECT_EQ(a.cos.data_ptr(), b.cos.data_ptr());
  const RopeTable c = rope_table(123.0, 8, 11, at::kFloat);
  EXPECT_EQ(c.cos.size(0), 16);
  EXPECT_TRUE(at::equal(c.sin.narrow(0, 0, 10), a.sin));
  EXPECT_EQ(rope_table(123.0, 8, 4, at::kDouble).cos.scalar_type(), at::kDouble);
}

TEST(Rope, WrongInputIsRefused) {
  EXPECT_THROW((void)rope(normal({1, 2, 9}, 1), {}, {.head_size = 3, .heads = 1}), InternalError);
  EXPECT_THROW((void)rope(normal({1, 2, 8}, 1), {}, {.head_size = 4, .heads = 3}), InternalError);
  EXPECT_THROW((void)rope(normal({1, 2, 8}, 1), at::tensor({0, -1}, at::kLong),
                          {.head_size = 4, .heads = 1}),
               InternalError);
  EXPECT_THROW((void)rope(normal({8, 2, 1}, 1).t(), {}, {.head_size = 4, .heads = 1}),
               std::exception);
}

}  // namespace
}  // namespace capstan::ops
