// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/ops/router.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "capstan/base/error.h"
#include "ops/router_internal.h"
#include "unit/ops/one_param.h"

namespace capstan::ops {
namespace {

using testing::near;
using testing::normal;
using testing::PlainStore;

constexpr int64_t kTokens = 11, kFeatures = 6, kExperts = 8;

struct Setting {
  RouterSpec spec;
  bool bias = false;
  double balance = 0, z = 0;
};
std::vector<Setting> settings() {
  return {
      {.spec = {.per_token = 2}},
      {.spec = {.per_token = 1}},
      {.spec = {.per_token = 1, .normalize = false}},
      {.spec = {.per_token = 3, .normalize = false, .scaling = 2.5}},
      {.spec = {.per_token = 8, .scaling = 0.5}},
      {.spec = {.per_token = 2}, .balance = 0.3, .z = 0.2},
      {.spec = {.per_token = 3, .groups = 4, .groups_per_token = 2}, .balance = 0.3},
      {.spec = {.per_token = 2, .sigmoid = true}, .bias = true, .balance = 0.3, .z = 0.2},
      {.spec = {.per_token = 4, .sigmoid = true, .groups = 2, .groups_per_token = 1}, .bias = true},
      {.spec = {.per_token = 2, .sigmoid = true, .normalize = false, .scaling = 3},
       .balance = 0.7}};
}

struct Case {
  PlainStore store{{param_spec("router", {kExperts, kFeatures})}, {}};
  Projection router{{store.find("router")}, {}};
  Tensor x = leaf(normal({kTokens, kFeatures}, 3)), grad;
  Tensor bias;
  RouterLoss loss;

  explicit Case(const Setting& s) : grad(normal({kTokens, s.spec.per_token}, 4)) {
    if (s.bias) bias = 0.3 * normal({kExperts}, 5);
    loss.row_N = at::arange(kTokens, at::kLong).remainder(3);
    if (s.balance > 0) loss.balance_SE = s.balance * normal({3, kExperts}, 6).abs();
    loss.z = s.z;
  }
  [[nodiscard]] Routing routing(const RouterSpec& spec) const {
    return route(x.detach(), store_value(), bias, spec);
  }
  [[nodiscard]] Tensor store_value() const { return router.weight(); }
};

// The choice by the definition: sort everything.
std::vector<int64_t> best(const std::vector<double>& scores, int64_t count,
                          const std::vector<bool>& allowed) {
  std::vector<int64_t> order;
  for (size_t i = 0; i < scores.size(); ++i)
    if (allowed[i]) order.push_back(static_cast<int64_t>(i));
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return scores[static_cast<size_t>(a)] > scores[static_cast<size_t>(b)];
  });
  order.resize(static_cast<size_t>(count));
  return order;
}
std::vector<int64_t> chosen_by_definition(const std::vector<double>& scores,
                                          const RouterSpec& spec) {
  const size_t size = scores.size() / static_cast<size_t>(spec.groups);
  std::vector<double> sums;
  for (size_t g = 0; g < static_cast<size_t>(spec.groups); ++g) {
    std::vector<double> group(scores.begin() + static_cast<int64_t>(g * size),
                              scores.begin() + static_cast<int64_t>((g + 1) * size));
    std::sort(group.rbegin(), group.rend());
    sums.push_back(group[0] + (size > 1 ? group[1] : 0));
  }
  std::vector<bool> allowed(scores.size(), false);
  for (const int64_t g : best(sums, spec.groups_per_token, std::vector<bool>(sums.size(), true)))
    for (size_t i = 0; i < size; ++i) allowed[static_cast<size_t>(g) * size + i] = true;
  return best(scores, spec.per_token, allowed);
}

TEST(Router, ChoicesScoresAndWeightsFollowTheDefinition) {
  for (const Setting& s : settings()) {
    const Case c(s);
    const Routing r = c.routing(s.spec);
    const Tensor logits = at::matmul(c.x.detach(), c.store_value().t());
    const Tensor scores = s.spec.sigmoid ? 1 / (1 + at::exp(-logits))
                                         : at::exp(logits) / at::exp(logits).sum(-1, true);
    EXPECT_TRUE(near(r.scores_NE, scores));
    const Tensor biased = c.bias.defined() ? scores + c.bias : scores;
    for (int64_t n = 0; n < kTokens; ++n) {
      const auto* const row = biased.const_data_ptr<double>() + n * kExperts;
      const auto want = chosen_by_definition({row, row + kExperts}, s.spec);
      for (int64_t j = 0; j < s.spec.per_token; ++j)
        EXPECT_EQ(r.experts_Nk[n][j].item<int64_t>(), want[static_cast<size_t>(j)]) << n;
    }
    Tensor weights = scores.gather(1, r.experts_Nk);
    if (s.spec.normalize) weights = weights / weights.sum(-1, true);
    EXPECT_TRUE(near(r.weights_Nk, weights * s.spec.scaling));
  }
}

double loss_by_definition(const Case& c, const Setting& s) {
  const Routing r = c.routing(s.spec);
  const auto values = router_loss_values(r, s.spec, c.loss);
  return weighted_sum(r.weights_Nk, c.grad) + values.balance.item<double>() +
         values.z.item<double>();
}

TEST(Router, GradientsMatchDifferences) {
  for (const Setting& s : settings()) {
    Case c(s);
    const Routing r = c.routing(s.spec);
    ASSERT_GT(choice_margin(r.scores_NE, c.bias, s.spec), 1e-4);
    run_backward(router_weights(c.x, c.router, r, s.spec, c.loss), c.grad);
    const auto loss = [&] { return loss_by_definition(c, s); };
    EXPECT_TRUE(testing::is_gradient(loss, c.x.detach(), c.x.grad()));
    EXPECT_TRUE(
        testing::is_gradient(loss, c.store.value_of("router"), c.store.gradient_of("router")));
  }
}

TEST(Router, LossValuesFollowTheDefinition) {
  for (const Setting& s : settings()) {
    const Case c(s);
    const Routing r = c.routing(s.spec);
    double balance = 0, z = 0;
    for (int64_t n = 0; n < kTokens; ++n) {
      const double total = s.spec.sigmoid ? r.scores_NE[n].sum().item<double>() : 1;
      for (int64_t e = 0; e < kExperts && s.balance > 0; ++e)
        balance +=
            c.loss.balance_SE[n % 3][e].item<double>() * r.scores_NE[n][e].item<double>() / total;
      z += s.z * std::pow(std::log(at::exp(r.logits_NE[n]).sum().item<double>()), 2);
    }
    const auto values = router_loss_values(r, s.spec, c.loss);
    EXPECT_NEAR(values.balance.item<double>(), balance, 1e-12);
    EXPECT_NEAR(values.z.item<double>(), z, 1e-12);
  }
}

TEST(Router, TiesGoToTheLowerNumber) {
  const Tensor x = at::ones({2, 1}, at::kDouble);
  const Tensor weight = at::tensor({1.0, 2.0, 2.0, 1.0, 2.0, 0.0}, at::kDouble).view({6, 1});
  const auto chosen = [&](const RouterSpec& spec) {
    return route(x, weight, {}, spec).experts_Nk[1];
  };
  const auto want = [](std::vector<int64_t> list) { return at::tensor(list, at::kLong); };
  EXPECT_TRUE(chosen({.per_token = 2}).equal(want({1, 2})));
  EXPECT_TRUE(chosen({.per_token = 4}).equal(want({1, 2, 4, 0})));
  EXPECT_TRUE(chosen({.per_token = 2, .sigmoid = true}).equal(want({1, 2})));
  EXPECT_TRUE(chosen({.per_token = 6}).equal(want({1, 2, 4, 0, 3, 5})));
  // Pairs (1, 2), (2, 1), (2, 0): the first two groups tie.
  EXPECT_TRUE(chosen({.per_token = 2, .groups = 3, .groups_per_token = 1}).equal(want({1, 0})));
  EXPECT_TRUE(chosen({.per_token = 3, .groups = 3, .groups_per_token = 2}).equal(want({1, 2, 0})));
  // All equal.
  const Tensor flat = at::zeros({6, 1}, at::kDouble);
  EXPECT_TRUE(route(x, flat, {}, {.per_token = 3}).experts_Nk[0].equal(want({0, 1, 2})));
  EXPECT_EQ(choice_margin(route(x, flat, {}, {.per_token = 3}).scores_NE, {}, {.per_token = 3}), 0);
}

TEST(Router, BiasActsOnTheChoiceAlone) {
  const Case c({.spec = {.per_token = 2, .sigmoid = true}});
  const RouterSpec spec{.per_token = 2, .sigmoid = true};
  Tensor bias = at::zeros({kExperts}, at::kDouble);
  bias[5] = 10;
  const Routing plain = c.routing(spec), biased = route(c.x.detach(), c.store_value(), bias, spec);
  EXPECT_TRUE(biased.scores_NE.equal(plain.scores_NE));
  EXPECT_TRUE(biased.experts_Nk.select(1, 0).eq(5).all().item<bool>());
  Tensor weights = plain.scores_NE.gather(1, biased.experts_Nk);
  EXPECT_TRUE(near(biased.weights_Nk, weights / weights.sum(-1, true)));
}

TEST(Router, ScoresThatAreNoNumbersStillGiveDistinctExperts) {
  const Tensor x = at::full({1, 1}, std::nan(""), at::kDouble);
  const Tensor weight = normal({6, 1}, 2);
  const Tensor chosen =
      route(x, weight, {}, {.per_token = 3, .groups = 2, .groups_per_token = 1}).experts_Nk[0];
  EXPECT_TRUE(chosen.equal(at::tensor({0, 1, 2}, at::kLong)));
}

TEST(Router, NarrowInputsAreRoutedInFp32) {
  for (const auto dtype : {at::kBFloat16, at::kHalf}) {
    PlainStore store({param_spec("router", {kExperts, kFeatures})},
                     {.values = dtype, .gradients = at::kFloat});
    const Projection router{{store.find("router")}, {}};
    const Tensor x = leaf(normal({kTokens, kFeatures}, 3, dtype));
    const RouterSpec spec{.per_token = 2};
    const Routing r = route(x.detach(), router.weight(), {}, spec);
    EXPECT_EQ(r.logits_NE.scalar_type(), at::kFloat);
    EXPECT_TRUE(near(r.logits_NE,
                     at::matmul(x.detach().to(at::kFloat), router.weight().to(at::kFloat).t())));
    run_backward(router_weights(x, router, r, spec), normal({kTokens, 2}, 4, at::kFloat));
    EXPECT_EQ(x.grad().scalar_type(), dtype);
    EXPECT_EQ(store.gradient_of("router").scalar_type(), at::kFloat);
  }
}

TEST(Router, ImpossibleChoicesAreRefused) {
  const Tensor x = at::ones({2, 1}, at::kDouble), weight = at::ones({6, 1}, at::kDouble);
  for (const RouterSpec& spec :
       {RouterSpec{.per_token = 7}, RouterSpec{.per_token = 0}, RouterSpec{.groups = 4},
        RouterSpec{.per_token = 3, .groups = 3, .groups_per_token = 1},
        RouterSpec{.groups = 3, .groups_per_token = 4}})
    EXPECT_THROW((void)route(x, weight, {}, spec), InternalError);
}

TEST(Router, MarginIsTheSmallestStep) {
  const Tensor scores = at::tensor({0.5, 0.1, 0.38, 0.02}, at::kDouble).view({1, 4});
  EXPECT_NEAR(choice_margin(scores, {}, {.per_token = 1}), 0.12, 1e-15);
  EXPECT_NEAR(choice_margin(scores, {}, {.per_token = 3}), 0.08, 1e-15);
  EXPECT_TRUE(std::isinf(choice_margin(scores, {}, {.per_token = 4}) == 0
                             ? 0.0
                             : choice_margin(scores.narrow(1, 0, 1), {}, {.per_token = 1})));
  // Groups 0.6 and 0.4, experts 0.5 and 0.1 among them.
  EXPECT_NEAR(choice_margin(scores, {}, {.per_token = 1, .groups = 2, .groups_per_token = 1}), 0.2,
              1e-15);
}

TEST(Capacity, FirstComeFirstServedByPlaceInTheRow) {
  // Two rows of four tokens, given out of order and with padding; two choices of three experts.
  const Tensor experts =
      at::tensor({0, 1, 0, 2, 1, 0, 0, 1, 2, 1, 0, 2, 0, 1, 0, 2, 0, 0}, at::kLong).view({9, 2});
  const Tensor row = at::tensor({0, 1, 0, 1, 0, 1, 0, 1, -1}, at::kLong);
  const Tensor place = at::tensor({3, 0, 1, 2, 0, 3, 2, 1, -1}, at::kLong);
  const Tensor keep = keep_within_capacity(
      experts, row, place, {.rows = 2, .row_length = 4, .experts = 3, .capacity = 2});
  // Row 0 in order: tokens 4 (2 1), 2 (1 0), 6 (0 1), 0 (0 1): expert 0 from 2, 6; expert 1 from
  // 4, 2. Row 1: tokens 1 (0 2), 7 (0 2), 3 (0 1), 5 (0 2).
  const Tensor want =
      at::tensor({0, 0, 1, 1, 1, 1, 0, 1, 1, 1, 0, 0, 1, 0, 1, 1, 0, 0}, at::kInt).to(at::kBool);
  EXPECT_TRUE(keep.flatten().equal(want));
  EXPECT_TRUE(
      keep_by_sort(experts, row, place, {.rows = 2, .row_length = 4, .experts = 3, .capacity = 2})
          .equal(keep));
  EXPECT_TRUE(count_choices(experts.narrow(0, 0, 8), row.narrow(0, 0, 8), 2, 3)
                  .equal(at::tensor({3, 4, 1, 4, 1, 3}, at::kLong).view({2, 3})));
}

TEST(Capacity, SortedChoicesKeepWhatTheLoopKeeps) {
  for (int64_t capacity = 1; capacity < 9; ++capacity) {
    const CapacitySpec spec{.rows = 3, .row_length = 16, .experts = 5, .capacity = capacity};
    const Tensor shuffled = normal({48}, static_cast<uint64_t>(capacity)).argsort();
    const Tensor experts =
        normal({48, 5}, static_cast<uint64_t>(20 + capacity)).argsort(1, false).narrow(1, 0, 3);
    const Tensor row = shuffled.floor_divide(16), place = shuffled.remainder(16);
    EXPECT_TRUE(keep_by_sort(experts, row, place, spec)
                    .equal(keep_within_capacity(experts, row, place, spec)));
  }
}

TEST(Capacity, RowsThatAreNotWholeAreRefused) {
  const Tensor experts = at::zeros({3, 1}, at::kLong), row = at::zeros({3}, at::kLong);
  const CapacitySpec spec{.rows = 1, .row_length = 3, .experts = 2, .capacity = 2};
  const auto keep = [&](std::vector<int64_t> place) {
    return keep_within_capacity(experts, row, at::tensor(place, at::kLong), spec);
  };
  EXPECT_NO_THROW((void)keep({2, 0, 1}));
  EXPECT_THROW((void)keep({2, 0, 2}), InternalError);
  EXPECT_THROW((void)keep({2, 0, 3}), InternalError);
  EXPECT_THROW((void)keep_within_capacity(experts.narrow(0, 0, 2), row.narrow(0, 0, 2),
                                          at::tensor({0, 1}, at::kLong), spec),
               InternalError);
}

}  // namespace
}  // namespace capstan::ops
