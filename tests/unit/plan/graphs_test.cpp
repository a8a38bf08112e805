// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// run.graphs: what it goes with.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "recipes.h"

namespace capstan::plan {
namespace {

using ::testing::HasSubstr;
using testing::machine;
using testing::plan_of;
using testing::problems_of;
using testing::resolved;

TEST(PlanGraphs, AreRefusedByName) {
  recipe::Resolved recipe = resolved({"run.graphs=true"});
  Topology gpu = machine(1);
  gpu.device = "cuda";
  Topology two = machine(2);
  two.device = "cuda";
  EXPECT_TRUE(plan_of(recipe, gpu).resolved.run.graphs);
  for (const char* rule :
       {"data.documents=separate", "optimizer.spike_skip.sigma=6", "precision.compute=fp16"})
    EXPECT_TRUE(plan_of(resolved({"run.graphs=true", rule}), gpu).resolved.run.graphs);
  for (const char* method : {"ring", "all_to_all"})
    EXPECT_TRUE(
        plan_of(resolved({"run.graphs=true", "data.documents=separate", "parallel.context.size=2",
                          std::string("parallel.context.method=") + method}),
                two)
            .resolved.run.graphs);
  const auto why = [&](std::vector<std::string> more, Topology topology) {
    more.push_back("run.graphs=true");
    const auto problems = problems_of(resolved(more), topology);
    EXPECT_EQ(problems.size(), 1U);
    EXPECT_EQ(problems.at(0).key, "run.graphs");
    return problems.at(0).text();
  };
  for (const char* layout : {"parallel.zero.stage=3", "parallel.tensor=2",
                             "parallel.context.size=2", "parallel.pipeline.size=2"})
    EXPECT_TRUE(plan_of(resolved({"run.graphs=true", layout}), two).resolved.run.graphs);
  EXPECT_THAT(why({}, machine(1)), HasSubstr("run.device"));
  EXPECT_THAT(why({"optimizer.name=sophia", "precision.compute=fp16"}, gpu),
              HasSubstr("precision.loss_scale"));
  EXPECT_THAT(why({"parallel.offload_activations=true"}, gpu), HasSubstr("offload_activations"));
}

}  // namespace
}  // namespace capstan::plan
