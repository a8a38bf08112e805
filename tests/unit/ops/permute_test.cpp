// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/ops/permute.h"

#include <gtest/gtest.h>

#include "capstan/base/error.h"
#include "capstan/ops/grouped_linear.h"
#include "capstan/ops/linear.h"
#include "capstan/ops/path.h"
#include "unit/ops/one_param.h"

namespace capstan::ops {
namespace {

using testing::near;
using testing::normal;
using testing::PlainStore;

Tensor longs(std::vector<int64_t> values) { return at::tensor(values, at::kLong); }

// Five tokens with two of four experts each; expert 2 gets none.
Tensor choices() { return longs({3, 0, 0, 1, 1, 3, 3, 1, 0, 3}).view({5, 2}); }
Tensor kept() {
  return at::tensor({1, 1, 0, 1, 1, 1, 0, 0, 1, 1}, at::kInt).to(at::kBool).view({5, 2});
}

TEST(Permute, SortsByExpertThenToken) {
  const ExpertOrder all = order_by_expert(choices(), {}, 4);
  EXPECT_EQ(all.counts_E, (std::vector<int64_t>{3, 3, 0, 4}));
  EXPECT_TRUE(all.slot_R.equal(longs({1, 2, 8, 3, 4, 7, 0, 5, 6, 9})));
  EXPECT_TRUE(all.place_Nk.flatten().equal(longs({6, 0, 1, 3, 4, 7, 8, 5, 2, 9})));
  const ExpertOrder some = order_by_expert(choices(), kept(), 4);
  EXPECT_EQ(some.counts_E, (std::vector<int64_t>{2, 2, 0, 3}));
  EXPECT_TRUE(some.slot_R.equal(longs({1, 8, 3, 4, 0, 5, 9})));
  EXPECT_TRUE(some.place_Nk.flatten().equal(longs({4, 0, -1, 2, 3, 5, -1, -1, 1, 6})));
  EXPECT_THROW((void)order_by_expert(choices(), {}, 3), InternalError);
}

class Forms : public ::testing::TestWithParam<Path> {
 protected:
  PathGuard guard_{GetParam()};
};

TEST_P(Forms, RowsAndTheirGradients) {
  for (const bool drops : {false, true}) {
    const ExpertOrder order = order_by_expert(choices(), drops ? kept() : Tensor(), 4);
    const int64_t count = order.slot_R.numel();
    const Tensor x = leaf(normal({5, 7}, 1)), w = normal({count, 7}, 2);
    const Tensor rows = permute_tokens(x, order);
    for (int64_t r = 0; r < count; ++r)
      EXPECT_TRUE(rows[r].detach().equal(x.detach()[order.slot_R[r].item<int64_t>() / 2]));
    run_backward(rows, w);
    const auto loss = [&] {
      at::NoGradGuard no_grad;
      return weighted_sum(permute_tokens(x, order), w);
    };
    EXPECT_TRUE(testing::is_gradient(loss, x.detach(), x.grad()));
  }
}

TEST_P(Forms, CombinedRowsAndTheirGradients) {
  for (const bool drops : {false, true}) {
    const ExpertOrder order = order_by_expert(choices(), drops ? kept() : Tensor(), 4);
    const Tensor y = leaf(normal({order.slot_R.numel(), 7}, 1)), weights = leaf(normal({5, 2}, 3));
    const Tensor w = normal({5, 7}, 2);
    const Tensor sum = combine_rows(y, weights, order);
    for (int64_t n = 0; n < 5; ++n) {
      Tensor want = at::zeros({7}, at::kDouble);
      for (int64_t j = 0; j < 2; ++j) {
        const auto place = order.place_Nk[n][j].item<int64_t>();
        if (place >= 0) want += weights.detach()[n][j] * y.detach()[place];
      }
      EXPECT_TRUE(near(sum[n].detach(), want));
    }
    run_backward(sum, w);
    const auto loss = [&] {
      at::NoGradGuard no_grad;
      return weighted_sum(combine_rows(y, weights, order), w);
    };
    EXPECT_TRUE(testing::is_gradient(loss, y.detach(), y.grad()));
    EXPECT_TRUE(testing::is_gradient(loss, weights.detach(), weights.grad()));
  }
}

TEST_P(Forms, EverythingDropped) {
  const ExpertOrder order = order_by_expert(choices(), at::zeros({5, 2}, at::kBool), 4);
  const Tensor x = leaf(normal({5, 7}, 1)), weights = leaf(normal({5, 2}, 3));
  const Tensor sum = combine_rows(permute_tokens(x, order), weights, order);
  EXPECT_EQ(sum.abs().max().item<double>(), 0);
  run_backward(sum, normal({5, 7}, 2));
  EXPECT_EQ(x.grad().abs().max().item<double>(), 0);
  EXPECT_EQ(weights.grad().abs().max().item<double>(), 0);
}

TEST_P(Forms, NarrowRowsAreSummedInFp32) {
  for (const auto dtype : {at::kBFloat16, at::kHalf}) {
    const ExpertOrder order = order_by_expert(choices(), kept(), 4);
    const Tensor y = leaf(normal({7, 64}, 1, dtype));
    const Tensor weights = leaf(normal({5, 2}, 3, at::kFloat));
    const Tensor sum = combine_rows(y, weights, order);
    const Tensor wide = combine_rows(y.detach().to(at::kFloat), weights.detach(), order);
    EXPECT_TRUE(sum.detach().equal(wide.to(dtype)));
    run_backward(sum, normal({5, 64}, 2, dtype));
    EXPECT_EQ(y.grad().scalar_type(), dtype);
    EXPECT_EQ(weights.grad().scalar_type(), at::kFloat);
  }
}

INSTANTIATE_TEST_SUITE_P(Permute, Forms, ::testing::Values(Path::kFused, Path::kReference),
                         [](const auto& instance) {
                           return std::string(instance.param == Path::kFused ? "Fused"
                                                                             : "Reference");
                         });

std::vector<plan::ParamSpec> expert_table() {
  std::vector<plan::ParamSpec> table;
  for (int e = 0; e < 3; ++e) {
    table.push_back(param_spec("gate" + std::to_string(e), {4, 5}, e));
    table.push_back(param_spec("up" + std::to_string(e), {4, 5}, e));
  }
  return table;
}
std::vector<Projection> projections_of(PlainStore& store) {
  std::vector<Projection> list;
  for (int e = 0; e < 3; ++e)
    list.push_back(
        {{store.find("gate" + std::to_string(e)), store.find("up" + std::to_string(e))}, {}});
  return list;
}

TEST(GroupedLinear, EqualsOneLinearPerGroup) {
  for (const bool deferred : {false, true}) {
    PlainStore grouped(expert_table(), {.deferred = deferred}), single(expert_table(), {});
    const auto list = projections_of(grouped), alone = projections_of(single);
    const std::vector<int64_t> rows{4, 0, 3};
    const Tensor x = leaf(normal({7, 5}, 1)), w = normal({7, 8}, 2);
    const Tensor y = grouped_linear(x, list, {rows, {}});
    run_backward(y, w);
    grouped.run_deferred();
    const Tensor x0 = leaf(x.narrow(0, 0, 4)), x2 = leaf(x.narrow(0, 4, 3));
    const Tensor y0 = linear(x0, alone[0]), y2 = linear(x2, alone[2]);
    EXPECT_TRUE(near(y.detach(), at::cat({y0, y2}).detach()));
    run_backward(y0, w.narrow(0, 0, 4));
    run_backward(y2, w.narrow(0, 4, 3));
    EXPECT_TRUE(near(x.grad(), at::cat({x0.grad(), x2.grad()})));
    for (const char* name : {"gate0", "up0", "gate2", "up2"})
      EXPECT_TRUE(near(grouped.gradient_of(name), single.gradient_of(name))) << name;
    // No rows still write a gradient: of zeros.
    ASSERT_TRUE(grouped.has_gradient("gate1") && grouped.has_gradient("up1"));
    EXPECT_EQ(grouped.gradient_of("gate1").abs().max().item<double>(), 0);
  }
}

TEST(GroupedLinear, NoRowsAtAllStillReachEveryWeight) {
  for (const auto dtype : {at::kDouble, at::kBFloat16}) {
    PlainStore store(expert_table(),
                     {.values = dtype, .gradients = dtype == at::kDouble ? dtype : at::kFloat});
    const auto list = projections_of(store);
    const Tensor x = leaf(at::empty({0, 5}, dtype));
    const Tensor y = grouped_linear(x, list, {{0, 0, 0}, {}});
    EXPECT_EQ(y.sizes(), (std::vector<int64_t>{0, 8}));
    run_backward(y, at::empty({0, 8}, dtype));
    for (const auto& spec : store.table()) {
      ASSERT_TRUE(store.has_gradient(spec.name)) << spec.name;
      EXPECT_EQ(store.gradient_of(spec.name).abs().max().item<double>(), 0) << spec.name;
    }
  }
}

TEST(GroupedLinear, GroupsMustMatch) {
  PlainStore store(expert_table(), {});
  const auto list = projections_of(store);
  EXPECT_THROW((void)grouped_linear(normal({7, 5}, 1), list, {{4, 0, 2}, {}}), InternalError);
  EXPECT_THROW((void)grouped_linear(normal({7, 5}, 1), list, {{4, 3}, {}}), InternalError);
}

}  // namespace
}  // namespace capstan::ops
