// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/parallel/expert_balance.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "capstan/base/error.h"

namespace capstan::parallel {
namespace {

plan::ModelShape shape_of(double rate, bool global) {
  plan::ModelShape s;
  s.family = "moe";
  s.num_hidden_layers = 3;
  s.experts.count = 4;
  s.experts.per_token = 2;
  s.experts.bias_update_rate = rate;
  if (global) {
    s.experts.auxiliary_loss = 0.1;
    s.experts.auxiliary_scope = "global";
  }
  return s;
}

at::Tensor counts(std::vector<int64_t> values) { return at::tensor(values, at::kLong); }
at::Tensor numbers(std::vector<double> values) { return at::tensor(values, at::kDouble); }

TEST(ExpertBalance, BiasRisesWhereTheLoadIsLow) {
  ExpertBalance balance(shape_of(0.25, false), {0, 2}, at::kDouble);
  balance.add("expert_tokens", 2, counts({5, 1, 2, 0}));  // two micro-batches, mean 4 in all
  balance.add("expert_tokens", 2, counts({3, 3, 2, 0}));
  (void)balance.finish_step({}, true);
  EXPECT_TRUE(balance.states()[2].bias_E.equal(numbers({-0.25, 0, 0, 0.25})));
  EXPECT_TRUE(balance.states()[0].bias_E.equal(numbers({0, 0, 0, 0})));  // nothing was routed
  EXPECT_FALSE(balance.states()[1].bias_E.defined());                    // of another rank
  balance.add("expert_tokens", 2, counts({0, 0, 0, 3}));  // the next step starts anew
  (void)balance.finish_step({}, true);
  EXPECT_TRUE(balance.states()[2].bias_E.equal(numbers({0, 0.25, 0.25, 0})));
}

TEST(ExpertBalance, FractionsAreThoseOfTheLastAppliedStep) {
  ExpertBalance balance(shape_of(0.5, true), {0}, at::kFloat);
  const auto fractions = [&] { return balance.states()[0].fractions_E.to(at::kDouble); };
  EXPECT_TRUE(fractions().equal(numbers({0.25, 0.25, 0.25, 0.25})));
  EXPECT_EQ(balance.states()[0].fractions_E.scalar_type(), at::kFloat);
  balance.add("expert_tokens", 0, counts({4, 2, 2, 0}));
  (void)balance.finish_step({}, true);
  EXPECT_TRUE(fractions().equal(numbers({0.5, 0.25, 0.25, 0})));
  const at::Tensor bias = balance.states()[0].bias_E.clone();
  balance.add("expert_tokens", 0, counts({0, 0, 0, 8}));
  const auto loads = balance.finish_step({}, false);  // skipped: reported, without effect
  EXPECT_EQ(loads.at(0).tokens, (std::vector<double>{0, 0, 0, 8}));
  EXPECT_TRUE(fractions().equal(numbers({0.5, 0.25, 0.25, 0})));
  EXPECT_TRUE(balance.states()[0].bias_E.equal(bias));
}

TEST(ExpertBalance, ReportsSumsOfTheStep) {
  ExpertBalance balance(shape_of(0, false), {0, 1, 2}, at::kDouble);
  EXPECT_FALSE(balance.states()[1].bias_E.defined());
  EXPECT_FALSE(balance.states()[1].fractions_E.defined());
  for (int i = 0; i < 2; ++i) {
    balance.add("expert_tokens", 1, counts({6, 1, 1, 0}));
    balance.add("expert_dropped", 1, at::scalar_tensor(3, at::kLong));
    balance.add("router_tokens", 1, at::scalar_tensor(4, at::kLong));
    balance.add("router_entropy", 1, at::scalar_tensor(2.0, at::kDouble));
    balance.add("router_auxiliary_loss", 1, at::scalar_tensor(0.125, at::kDouble));
    balance.add("router_z_loss", 1, at::scalar_tensor(0.5, at::kDouble));
    balance.add("chosen_experts", 1, counts({1, 2}));  // not for the sums
  }
  const auto loads = balance.finish_step({}, true);
  ASSERT_EQ(loads.size(), 3U);
  EXPECT_EQ(loads[1].layer, 1);
  EXPECT_EQ(loads[1].tokens, (std::vector<double>{12, 2, 2, 0}));
  EXPECT_EQ(loads[1].max_over_mean(), 3);
  EXPECT_EQ(loads[1].dropped, 6);
  EXPECT_EQ(loads[1].dropped_fraction(), 6.0 / 16);
  EXPECT_EQ(loads[1].routed_tokens, 8);
  EXPECT_EQ(loads[1].entropy, 0.5);
  EXPECT_EQ(loads[1].auxiliary_loss, 0.25);
  EXPECT_EQ(loads[1].z_loss, 1);
  EXPECT_EQ(loads[0].max_over_mean(), 1);
  EXPECT_EQ(loads[0].dropped_fraction(), 0);
  EXPECT_THROW(balance.add("expert_tokens", 7, counts({1, 1, 1, 1})), InternalError);
}

TEST(ExpertBalance, EntropyIsMadeOnlyWhenWanted) {
  ExpertBalance balance(shape_of(0, false), {0}, at::kDouble);
  EXPECT_FALSE(balance.wants("router_entropy"));
  EXPECT_TRUE(balance.wants("expert_tokens"));
  balance.want_entropy(true);
  EXPECT_TRUE(balance.wants("router_entropy"));
}

TEST(ExpertBalance, StatesAreLiveEntriesOfCheckpoints) {
  ExpertBalance balance(shape_of(0.5, true), {2}, at::kDouble);
  const auto entries = balance.state_entries("policy", true);
  ASSERT_EQ(entries.size(), 2U);
  EXPECT_EQ(entries[0].name, "model.layers.2.mlp.gate.e_score_correction_bias");
  EXPECT_EQ(entries[1].name, "model.layers.2.mlp.gate.previous_fractions");
  for (const mesh::StateEntry& entry : entries) {
    EXPECT_EQ(entry.kind, "router");
    EXPECT_EQ(entry.global_shape, plan::Shape{4});
    EXPECT_TRUE(entry.writes);
  }
  entries[0].tensor.fill_(7);  // as a load does
  EXPECT_TRUE(balance.states()[2].bias_E.eq(7).all().item<bool>());
}

}  // namespace
}  // namespace capstan::parallel
