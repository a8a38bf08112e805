// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/plan/frozen.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>

#include "recipes.h"
#include "shapes.h"

namespace capstan::plan {
namespace {

using testing::machine;
using testing::plan_of;
using testing::resolved;
using testing::table_of;

std::set<std::string> frozen_names(const std::vector<std::string>& patterns) {
  std::set<std::string> names;
  for (const ParamSpec& spec : freeze(table_of(testing::tiny_shape()), patterns))
    if (!spec.trainable) names.insert(spec.name);
  return names;
}

TEST(Frozen, PatternsMatchNames_TheLastOneDecides) {
  EXPECT_TRUE(frozen_names({}).empty());
  EXPECT_EQ(frozen_names({"model.norm.weight"}), (std::set<std::string>{"model.norm.weight"}));
  EXPECT_EQ(frozen_names({"model.layers.0.*", "!*norm*", "!*_proj.weight"}).size(), 0u);
  const auto all_but_one = frozen_names({"*", "!model.norm.weight"});
  EXPECT_EQ(all_but_one.size() + 1, table_of(testing::tiny_shape()).size());
  EXPECT_FALSE(all_but_one.contains("model.norm.weight"));
  EXPECT_EQ(frozen_names({"!model.norm.weight", "*"}).size(),
            table_of(testing::tiny_shape()).size());
  EXPECT_TRUE(frozen_names({"norm"}).empty()) << "a pattern is a whole name";
}

TEST(Frozen, PartOfABlock_HasABufferOfItsOwn) {
  const ModelShape shape = testing::tiny_shape();
  const Layout layout(shape, freeze(table_of(shape), {"model.layers.0.self_attn.*"}),
                      {.grid = Grid(Grid::Sizes{})});
  int frozen = 0, trained = 0;
  for (const FlatBuffer& buffer : layout.rank(0).buffers) {
    if (buffer.block != 1) {
      EXPECT_TRUE(buffer.trainable);
      continue;
    }
    (buffer.trainable ? trained : frozen) += 1;
    for (const LocalParam& param : buffer.params) {
      const std::string& name = layout.table()[static_cast<size_t>(param.spec)].name;
      EXPECT_EQ(buffer.trainable, name.find("self_attn") == std::string::npos) << name;
    }
  }
  EXPECT_EQ(frozen, 1);
  EXPECT_EQ(trained, 1);
}

TEST(Frozen, WhatOneProductReads_IsFrozenTogether) {
  const auto apart = [](const std::vector<std::string>& patterns) {
    return frozen_apart(freeze(table_of(testing::tiny_shape()), patterns)).size();
  };
  EXPECT_EQ(apart({"*.self_attn.*"}), 0u);
  EXPECT_EQ(apart({"*.mlp.down_proj.weight"}), 0u);
  EXPECT_EQ(apart({"model.layers.0.self_attn.q_proj.weight"}), 1u);
  EXPECT_EQ(apart({"*.mlp.up_proj.weight"}),
            static_cast<size_t>(testing::tiny_shape().num_hidden_layers));
}

TEST(Frozen, ThePlanSaysHowManyAreTrained) {
  const Plan plan = plan_of(resolved({"model.frozen=['*', '!model.norm.weight']"}), machine(1));
  EXPECT_THAT(describe_plan(plan), ::testing::HasSubstr("256 of them trained"));
  EXPECT_THAT(plan_json(plan), ::testing::HasSubstr("\"trainable\": 256"));
  EXPECT_THAT(describe_plan(plan_of(resolved(), machine(1))),
              ::testing::Not(::testing::HasSubstr("of them trained")));
}

// Weights stay, gradients and optimizer states go.
TEST(Frozen, MemoryOfThePlanFalls) {
  for (const std::string stage : {"0", "1", "2", "3"}) {
    const auto memory = [&](const std::string& patterns) {
      return plan_of(resolved({"parallel.zero.stage=" + stage, "model.frozen=" + patterns}),
                     machine(2))
          .memory;
    };
    const MemoryReport whole = memory("[]"), part = memory("['*.mlp.*']"),
                       most = memory("['*', '!model.norm.weight']");
    EXPECT_EQ(part.master, whole.master);
    EXPECT_LT(part.optimizer, whole.optimizer / 2 + whole.optimizer / 4);
    EXPECT_LT(part.gradients, whole.gradients);
    EXPECT_LT(most.optimizer, whole.optimizer / 1000);
    EXPECT_LT(most.gradients, whole.gradients / 100);
    EXPECT_LT(most.activations, whole.activations) << "layers without a backward keep nothing";
  }
  const auto saved = [](const char* patterns) {
    return plan_of(resolved({std::string("model.frozen=") + patterns}), machine(1))
        .checkpoint_bytes;
  };
  EXPECT_EQ(saved("[]") - saved("['*.down_proj.*']"), 4 * 256 * 704 * 2 * 4) << "two moments";
}

}  // namespace
}  // namespace capstan::plan
