// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "capstan/base/bytes.h"
#include "recipes.h"
#include "shapes.h"

namespace capstan::plan {
namespace {

using ::testing::HasSubstr;
using Json = nlohmann::json;

TEST(PlanJson, HasTheDocumentedKeys) {
  const Plan plan =
      testing::plan_of(testing::resolved({"batch.global_samples=16"}), testing::machine(2));
  const Json json = Json::parse(plan_json(plan));
  std::vector<std::string> keys;
  for (const auto& [key, value] : json.items()) keys.push_back(key);
  EXPECT_THAT(
      keys, ::testing::UnorderedElementsAre(
                "schema", "choices", "device", "world_size", "threads_per_rank", "grid",
                "zero_stage", "model", "parameters", "precision", "batch", "run", "flops", "memory",
                "traffic", "ranks", "buckets", "schedule", "layout", "checkpoint_bytes"));
  EXPECT_EQ(json["schema"], 1);
  EXPECT_EQ(json["world_size"], 2);
  EXPECT_EQ(json["grid"]["dp_replicate"], 2);
  EXPECT_EQ(json["model"]["family"], "llama");
  EXPECT_EQ(json["model"]["hidden_size"], 256);
  EXPECT_EQ(json["parameters"]["total"], 5'048'576);
  EXPECT_EQ(json["parameters"]["trainable"], 5'048'576);
  EXPECT_EQ(json["precision"]["loss_scale"], nullptr);
  EXPECT_EQ(json["batch"]["micro_batches"], 2);
  EXPECT_EQ(json["run"]["total_tokens"], 100 * 16 * 256);
  EXPECT_EQ(json["flops"]["convention"], "causal");
  EXPECT_EQ(json["flops"]["six_n"], 6 * 5'048'576);
  EXPECT_EQ(json["memory"]["peak"], plan.memory.peak());
  EXPECT_EQ(json["memory"]["saving"], plan.memory.saving);
  EXPECT_EQ(json["memory"]["run_peak"], plan.memory.run_peak());
  EXPECT_EQ(json["traffic"]["dp_replicate+dp_shard+cp/all_reduce"]["calls"], 1);
  EXPECT_EQ(json["buckets"][0]["blocks"], Json({5, 4, 3, 2, 1, 0}));
  EXPECT_EQ(json["schedule"]["ranks"][0].size(), 6u);
  EXPECT_EQ(json["schedule"]["ranks"][0][1]["op"], "backward");
  EXPECT_EQ(json["layout"]["buffers"][1]["params"][1]["name"],
            "model.layers.0.self_attn.q_proj.weight");
  EXPECT_EQ(json["checkpoint_bytes"], plan.checkpoint_bytes);
  int64_t sum = 0;
  for (const auto& [name, count] : json["parameters"]["groups"].items())
    sum += count.get<int64_t>();
  EXPECT_EQ(sum, 5'048'576);
}

TEST(PlanJson, ReportsFixedAndDynamicScales) {
  const auto scale = [](const std::vector<std::string>& overrides) {
    return Json::parse(plan_json(testing::plan_of(testing::resolved(overrides),
                                                  testing::machine(1))))["precision"]["loss_scale"];
  };
  EXPECT_EQ(scale({"precision.compute=fp16"}), "dynamic");
  EXPECT_EQ(scale({"precision.compute=fp16", "precision.loss_scale=512.0"}), 512.0);
}

TEST(DescribePlan, IsAPageWithEveryPart) {
  const Plan plan = testing::plan_of(testing::resolved(), testing::machine(2));
  const std::string page = describe_plan(plan);
  for (const char* part :
       {"llama, 4 layers, hidden 256", "5,048,576", "embedding", "attention", "feed-forward",
        "norms", "tied head", "2 ranks on cpu: data 2 x tensor 1 x pipeline 1 x context 1",
        "8 samples x 256 tokens = 2,048 tokens per step", "100 steps, 204,800 tokens",
        "convention: causal", "6N", "predicted peak of rank 0", "activations",
        "dp_replicate+dp_shard+cp/all_reduce: 1 call", "gpipe, 1 stage",
        "rank 0 | F0 B0 reduce step", "precision.compute: auto -> fp32"})
    EXPECT_THAT(page, HasSubstr(part));
  EXPECT_THAT(page, HasSubstr(format_bytes(plan.memory.run_peak()) + " predicted peak of rank 0"));
  EXPECT_THAT(page, HasSubstr(format_bytes(plan.memory.peak()) + " in a step"));
  EXPECT_THAT(describe_plan(testing::plan_of(testing::resolved(), testing::machine(1))),
              HasSubstr("traffic     none: one rank"));
}

TEST(ParameterGroups, ComeInOrderOfTheTable) {
  ModelShape shape = testing::llama3_8b_shape();
  std::vector<ParamSpec> table = testing::table_of(shape);
  table[1].name = "model.layers.0.router.weight";
  table.resize(3);
  const auto groups = parameter_groups(table);
  ASSERT_EQ(groups.size(), 3u);
  EXPECT_EQ(groups[0], (std::pair<std::string, int64_t>{"embedding", 128256LL * 4096}));
  EXPECT_EQ(groups[1].first, "other");
  EXPECT_EQ(groups[2].first, "attention");
}

}  // namespace
}  // namespace capstan::plan
