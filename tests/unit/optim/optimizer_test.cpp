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

TEST(Optimizer, States_AreThoseOfThePlan) {
  parallel::Shard in_blocks = make_shard();
  in_blocks.update = plan::UpdateKind::kRowBlock;
  const auto kinds = [](const recipe::Optimizer& recipe, const parallel::Shard& shard) {
    std::string text;
    for (const auto& state : make_optimizer(recipe, {shard})->states()) {
      EXPECT_EQ(state.values.numel() * state.block, shard.master.numel());
      text += state.kind + " " + c10::toString(state.values.scalar_type()) + ", ";
    }
    return text;
  };
  auto recipe = recipe_of();
  recipe.name = "lion";
  EXPECT_EQ(kinds(recipe, make_shard()), "exp_avg Float, ");
  recipe.moments = "bf16";
  EXPECT_EQ(kinds(recipe, make_shard()), "exp_avg BFloat16, ");
  recipe.name = "adamw";
  EXPECT_EQ(kinds(recipe, make_shard()), "exp_avg BFloat16, exp_avg_sq BFloat16, ");
  recipe.moments = "int8";
  EXPECT_EQ(kinds(recipe, make_shard()), "exp_avg Float, exp_avg_sq Float, ");
  EXPECT_EQ(kinds(recipe, in_blocks),
            "exp_avg Byte, exp_avg_scale Float, exp_avg_sq Byte, exp_avg_sq_scale Float, ");
}

// What lies between the ranges is neither updated nor rounded.
TEST(Optimizer, EveryForm_LeavesPaddingZero) {
  for (const auto& [name, moments] :
       {std::pair{"lion", "auto"}, {"lion", "bf16"}, {"adamw", "bf16"}, {"adamw", "int8"}}) {
    auto recipe = recipe_of();
    recipe.name = name;
    recipe.moments = moments;
    parallel::Shard shard = make_shard();
    const bool blocks = recipe.moments == "int8";
    const int64_t end = blocks ? 256 : 300;
    if (blocks) shard.update = plan::UpdateKind::kRowBlock;
    shard.ranges = {{0, end, true, true}};
    shard.master.narrow(0, end, 512 - end).zero_();
    shard.gradient.narrow(0, end, 512 - end).zero_();
    auto optimizer = make_optimizer(recipe, {shard});
    for (int t = 1; t <= 3; ++t) optimizer->step({.lr = 0.1, .gradient_scale = 1, .count = t});
    EXPECT_NE(shard.master[50].item<double>(), 1);
    EXPECT_EQ(shard.master.narrow(0, end, 512 - end).ne(0).sum().item<int64_t>(), 0);
    for (const auto& state : optimizer->states()) {
      EXPECT_NE(state.values[0].item<double>(), 0) << name << " " << moments << state.kind;
      const int64_t from = (end + state.block - 1) / state.block;
      EXPECT_EQ(
          state.values.narrow(0, from, state.values.numel() - from).ne(0).sum().item<int64_t>(), 0)
          << name << " " << moments << state.kind;
    }
  }
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
