// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// --set on the command line.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "recipe_text.h"

namespace capstan::recipe {
namespace {

using testing::HasSubstr;
using testing::StartsWith;

TEST(Override, ReplacesAValueAndIsItsOrigin) {
  const Resolved resolved =
      parse(kSmall, Overrides{"run.steps=7", "optimizer.lr=0.5", "run.steps=9"});
  EXPECT_EQ(resolved.recipe.run.steps, 9);
  EXPECT_EQ(resolved.recipe.optimizer.lr, 0.5);
  EXPECT_EQ(resolved.origin_of("run.steps").text(), "--set:3:1");
  EXPECT_EQ(resolved.origin_of("optimizer.lr").text(), "--set:2:1");
  EXPECT_EQ(resolved.origin_of("run.name").text(), kFile + ":2:13");
}

TEST(Override, MakesSectionsThatTheFileLacks) {
  EXPECT_EQ(parse(kSmall, Overrides{"metrics.trace.first_step=3"}).recipe.metrics.trace.first_step,
            3);
}

TEST(Override, ReachesItemsOfLists) {
  const Resolved resolved = parse(
      kSmall,
      Overrides{"data.train[0].weight=2", "optimizer.betas=[0.5, 0.6]", "optimizer.betas[1]=0.7"});
  EXPECT_EQ(resolved.recipe.data.train[0].weight, 2.0);
  EXPECT_EQ(resolved.recipe.data.train[0].path, "corpus/train");
  EXPECT_THAT(resolved.recipe.optimizer.betas, testing::ElementsAre(0.5, 0.7));
  EXPECT_EQ(resolved.origin_of("data.train[0].weight").text(), "--set:1:1");
}

TEST(Override, TakesFlowMapsAndLists_MapsMergeAndListsReplace) {
  const Resolved resolved =
      parse(kSmall, Overrides{"optimizer={eps: 0.5, spike_skip: {sigma: 6}}",
                              "data.train=[{path: a}, {path: b, weight: 3}]"});
  EXPECT_EQ(resolved.recipe.optimizer.lr, 0.001);
  EXPECT_EQ(resolved.recipe.optimizer.eps, 0.5);
  EXPECT_EQ(resolved.recipe.optimizer.spike_skip.sigma, 6.0);
  ASSERT_EQ(resolved.recipe.data.train.size(), 2U);
  EXPECT_EQ(resolved.recipe.data.train[1].weight, 3.0);
}

TEST(Override, ValueMayHoldEqualsSignsAndSpaces) {
  EXPECT_EQ(parse(kSmall, Overrides{"data.tokenizer=my data/a=b"}).recipe.data.tokenizer,
            "my data/a=b");
}

struct Case {
  const char* override_text;
  std::string start;
  std::string words;
};
void PrintTo(const Case& c, std::ostream* out) { *out << c.override_text; }

class BadOverride : public testing::TestWithParam<Case> {};

TEST_P(BadOverride, IsReportedByNumber) {
  const auto problems = problems_of(kSmall, Overrides{"run.seed=1", GetParam().override_text});
  ASSERT_EQ(problems.size(), 1U) << complaint_of(kSmall,
                                                 Overrides{"run.seed=1", GetParam().override_text});
  EXPECT_THAT(problems[0].text(), StartsWith("--set:2:1: error: " + GetParam().start));
  EXPECT_THAT(problems[0].text(), HasSubstr(GetParam().words));
}

INSTANTIATE_TEST_SUITE_P(
    Table, BadOverride,
    testing::Values(
        Case{"run.steps", "got 'run.steps', need KEY=VALUE", ""},
        Case{"=3", "got '=3', need KEY=VALUE", ""}, Case{"", "got '', need KEY=VALUE", ""},
        Case{"a..b=3", "got 'a..b=3', need KEY=VALUE", ""},
        Case{"data.train[x].weight=3", "got 'data.train[x].weight=3', need", ""},
        Case{"data.train[99999999999999999999].weight=3", "got ", "need KEY=VALUE"},
        Case{"[0]=3", "got '[0]=3', need", ""}, Case{"run .steps=3", "got ", "need KEY=VALUE"},
        Case{"run.step=3", "run.step: unknown key", "'run.steps'"},
        Case{"rum.steps=3", "rum.steps: unknown key", "'run.steps'"},
        Case{"data.train[0].pat=3", "data.train[0].pat: unknown key", "'data.train[0].path'"},
        Case{"optimizer[0]=3", "optimizer[0]: unknown key", ""},
        Case{"optimizer.lr.peak=3", "optimizer.lr.peak: unknown key", ""},
        Case{"data.train[1].weight=3", "data.train[1].weight: got index 1", "which has 1"},
        Case{"parallel.recompute.parts[0]=mlp", "parallel.recompute.parts[0]: got index 0",
             "which has 0"},
        Case{"include=[a.yaml]", "include: got an override", "files are read before"},
        Case{"run.steps=", "run.steps: got nothing", "empty"},
        Case{"run.steps=~", "run.steps: got nothing", "null"},
        Case{"run.steps=010", "run.steps: got 010", "octal"},
        Case{"run.steps=[1", "run.steps: got a map or list as key", ""},
        Case{"run.steps=&a 3", "run.steps: got an anchor", ""},
        Case{"run.steps=1\n---\n2", "got a second document", ""},
        Case{"run.steps=\t1", "got a tab", ""},
        Case{"eval=samples: 3", "eval: got a map or list in block form", "single line"},
        Case{"eval=3", "eval: got 3, need a map of keys", ""},
        Case{"eval={samples: 1, samples: 2}", "eval.samples: got the key twice", ""},
        Case{"optimizer.name=muon",
             "optimizer.name: 'muon' is not in this build (has: adamw, lion, sophia)", ""},
        Case{"optimizer.name=adam", "optimizer.name: got 'adam', need one of adamw, lion, sophia",
             "'adamw'"},
        Case{"parallel.tensor=0", "parallel.tensor: got 0, need", ""}));

TEST(Override, AcrossABadSection_LeavesTheComplaintAboutTheFile) {
  const std::string text = kSmall + "eval: 3\n";
  EXPECT_THAT(complaint_of(text, Overrides{"eval.samples=4"}),
              StartsWith("17:7: error: eval: got 3"));
}

}  // namespace
}  // namespace capstan::recipe
