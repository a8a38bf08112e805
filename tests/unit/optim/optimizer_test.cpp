// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/optim/optimizer.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "capstan/base/error.h"

namespace capstan::optim {
namespace {

parallel::Shard make_shard() {
  parallel::Shard shard;
  shard.master = at::zeros({512}, at::kFloat);
  shard.master.narrow(0, 0, 300).fill_(1);
  shard.copy = shard.master.to(at::kBFloat16);
  shard.gradient = at::zeros({512}, at::kFloat);
  shard.gradient.narrow(0, 0, 300).fill_(0.5);
  shard.ranges = {{0, 100, true, true}, {100, 300, false, true}};
  return shard;
}

recipe::Optimizer recipe_of() {
  recipe::Optimizer r;
  r.lr = 0.1;
  r.weight_decay = 0.5;
  return r;
}

TEST(Optimizer, AdamW_DecaysByRangeAndLeavesPaddingZero) {
  const auto shard = make_shard();
  auto optimizer = make_optimizer(recipe_of(), {shard});
  for (int t = 1; t <= 3; ++t) optimizer->step({.lr = 0.1, .gradient_scale = 1, .count = t});
  EXPECT_NEAR(shard.master[150].item<double>(), 0.7, 1e-6);  // constant gradient: lr per step
  double decayed = 1;
  for (int t = 0; t < 3; ++t) decayed = decayed * 0.95 - 0.1;
  EXPECT_NEAR(shard.master[50].item<double>(), decayed, 1e-6);
  EXPECT_EQ(shard.master.narrow(0, 300, 212).abs().sum().item<double>(), 0);
  EXPECT_TRUE(shard.copy.equal(shard.master.to(at::kBFloat16)));
  for (const auto& state : optimizer->states())
    EXPECT_EQ(state.values.narrow(0, 300, 212).abs().sum().item<double>(), 0) << state.kind;
}

TEST(Optimizer, States_NameTheMomentsOfEachShard) {
  const auto states = make_optimizer(recipe_of(), {make_shard(), make_shard()})->states();
  ASSERT_EQ(states.size(), 4U);
  EXPECT_EQ(states[0].kind, "exp_avg");
  EXPECT_EQ(states[1].kind, "exp_avg_sq");
  EXPECT_EQ(states[3].shard, 1U);
}

TEST(Optimizer, UnknownName_ListsWhatExists) {
  auto recipe = recipe_of();
  recipe.name = "muon";
  try {
    (void)make_optimizer(recipe, {});
    FAIL();
  } catch (const ConfigError& e) {
    EXPECT_NE(std::string(e.what()).find("adamw"), std::string::npos) << e.what();
  }
}

TEST(Optimizer, BetaOfOne_IsRefused) {
  auto recipe = recipe_of();
  recipe.betas = {0.9, 1.0};
  EXPECT_THROW((void)make_optimizer(recipe, {}), ConfigError);
}

TEST(Optimizer, RegisteredByTheUser_IsFoundByName) {
  struct Idle final : Optimizer {
    void step(const UpdateStep&) override {}
    std::vector<OptimizerState> states() override { return {}; }
  };
  register_optimizer("idle", [](const auto&, const auto&) { return std::make_unique<Idle>(); });
  auto recipe = recipe_of();
  recipe.name = "idle";
  EXPECT_TRUE(make_optimizer(recipe, {})->states().empty());
}

}  // namespace
}  // namespace capstan::optim
