// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Rules of model.experts.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "recipe_text.h"

namespace capstan::recipe {
namespace {

using ::testing::HasSubstr;

const Overrides kMoe = {"model.family=moe", "model.experts.count=8"};

Overrides with(Overrides base, const Overrides& more) {
  base.insert(base.end(), more.begin(), more.end());
  return base;
}

void expect_problem(const Overrides& overrides, const std::string& key,
                    const std::vector<std::string>& words) {
  const auto problems = problems_of(kSmall, overrides);
  ASSERT_EQ(problems.size(), 1U) << complaint_of(kSmall, overrides);
  EXPECT_EQ(problems[0].key, key);
  for (const std::string& word : words) EXPECT_THAT(problems[0].text(), HasSubstr(word));
}

TEST(ExpertRules, EveryOptionOfMoeIsRead) {
  const Resolved r = parse(
      kSmall,
      with(kMoe, {"model.experts.per_token=3", "model.experts.intermediate_size=24",
                  "model.experts.shared_intermediate_size=48", "model.experts.shared_gate=true",
                  "model.experts.router=sigmoid", "model.experts.normalize_weights=false",
                  "model.experts.groups=4", "model.experts.groups_per_token=2",
                  "model.experts.scaling=2.5", "model.experts.auxiliary_loss=0.01",
                  "model.experts.auxiliary_scope=global", "model.experts.z_loss=0.001",
                  "model.experts.bias_update_rate=0.002", "model.experts.capacity_factor=1.25"}));
  const Experts& e = r.recipe.model.experts;
  EXPECT_EQ(e.count, 8);
  EXPECT_EQ(e.per_token, 3);
  EXPECT_EQ(e.intermediate_size, 24);
  EXPECT_EQ(e.shared_intermediate_size, 48);
  EXPECT_TRUE(e.shared_gate);
  EXPECT_EQ(e.router, "sigmoid");
  EXPECT_FALSE(e.normalize_weights);
  EXPECT_EQ(e.groups, 4);
  EXPECT_EQ(e.groups_per_token, 2);
  EXPECT_EQ(e.scaling, 2.5);
  EXPECT_EQ(e.auxiliary_loss, 0.01);
  EXPECT_EQ(e.auxiliary_scope, "global");
  EXPECT_EQ(e.z_loss, 0.001);
  EXPECT_EQ(e.bias_update_rate, 0.002);
  EXPECT_EQ(e.capacity_factor, 1.25);
  EXPECT_EQ(parse(kSmall, with(kMoe, {"model.experts.capacity_factor=none"}))
                .recipe.model.experts.capacity_factor,
            std::nullopt);
  EXPECT_NO_THROW((void)parse(
      kSmall, {"model.family=mixtral", "model.experts.count=8", "model.experts.auxiliary_loss=0.02",
               "model.experts.capacity_factor=2"}));
}

TEST(ExpertRules, FamilyAndCountGoTogether) {
  expect_problem({"model.family=moe"}, "model.experts.count", {"got 0", "at least 1"});
  expect_problem({"model.family=mixtral"}, "model.experts.count", {"got 0", "at least 1"});
  expect_problem({"model.experts.count=8"}, "model.experts.count",
                 {"got 8", "need 0", "llama has no experts"});
  expect_problem({"model.experts.z_loss=0.1"}, "model.experts.z_loss", {"need 0", "count is 0"});
}

TEST(ExpertRules, MixtralHasNoOtherRouter) {
  const Overrides mixtral = {"model.family=mixtral", "model.experts.count=8"};
  const auto refused = [&](const std::string& key, const std::string& value) {
    expect_problem(with(mixtral, {"model.experts." + key + "=" + value}), "model.experts." + key,
                   {"model.family is mixtral", "Use family moe"});
  };
  refused("router", "sigmoid");
  refused("normalize_weights", "false");
  refused("scaling", "2.0");
  refused("groups", "2");
  refused("bias_update_rate", "0.001");
  refused("shared_intermediate_size", "64");
}

TEST(ExpertRules, ChoicesMustBePossible) {
  expect_problem(with(kMoe, {"model.experts.per_token=9"}), "model.experts.per_token",
                 {"got 9", "at most model.experts.count 8"});
  expect_problem(with(kMoe, {"model.experts.groups=3"}), "model.experts.groups",
                 {"got 3", "divisor of model.experts.count 8"});
  expect_problem(with(kMoe, {"model.experts.groups=4", "model.experts.groups_per_token=5"}),
                 "model.experts.groups_per_token", {"got 5", "at most model.experts.groups 4"});
  expect_problem(with(kMoe, {"model.experts.groups=4", "model.experts.per_token=5",
                             "model.experts.groups_per_token=2"}),
                 "model.experts.groups_per_token", {"got 2", "at least 3"});
}

TEST(ExpertRules, KeysThatDoNothingKeepTheirDefault) {
  expect_problem(with(kMoe, {"model.experts.auxiliary_scope=global"}),
                 "model.experts.auxiliary_scope", {"auxiliary_loss is 0"});
  expect_problem(with(kMoe, {"model.experts.shared_gate=true"}), "model.experts.shared_gate",
                 {"no shared expert"});
  expect_problem(with(kMoe, {"model.experts.groups_per_token=2"}), "model.experts.groups_per_token",
                 {"there is one group"});
}

TEST(ExpertRules, RangesAreChecked) {
  expect_problem(with(kMoe, {"model.experts.capacity_factor=0"}), "model.experts.capacity_factor",
                 {"above 0"});
  expect_problem(with(kMoe, {"model.experts.auxiliary_loss=-1"}), "model.experts.auxiliary_loss",
                 {"at least 0"});
  expect_problem(with(kMoe, {"model.experts.router=tanh"}), "model.experts.router", {"softmax"});
}

}  // namespace
}  // namespace capstan::recipe
