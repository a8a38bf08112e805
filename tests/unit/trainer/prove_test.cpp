// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// prove() on layouts that are right, and on one that a fault was put into.
#include "capstan/trainer/prove.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>

#include "trainer/prove_internal.h"

namespace capstan::trainer {
namespace {

using testing::HasSubstr;

constexpr const char* kRecipe = R"(version: 1
run: {name: proof, steps: 100}
model:
  hidden_size: 256
  intermediate_size: 704
  num_hidden_layers: 8
  num_attention_heads: 8
  num_key_value_heads: 4
data:
  tokenizer: data/nowhere
  train: [{path: data/nowhere}]
batch: {global_samples: 16, micro_samples: 2, sequence_length: 256}
optimizer: {lr: 3.0e-4}
precision: {compute: fp32}
)";

ProveOptions options_of(const std::vector<std::string>& overrides) {
  ProveOptions options;
  options.recipe = recipe::parse_recipe(kRecipe, "proof.yaml", overrides);
  options.timeout_s = 60;
  return options;
}

TEST(Prove, Layouts_ComputeTheRunOfOneRank) {
  const std::vector<std::vector<std::string>> layouts = {
      {"parallel.data=2", "parallel.zero.stage=3", "data.documents=separate"},
      {"parallel.data=1", "parallel.tensor=2", "parallel.sequence=true"},
      {"parallel.data=1", "parallel.pipeline.size=4", "parallel.pipeline.schedule=zero_bubble"},
      {"parallel.data=2", "parallel.context.size=2", "data.documents=separate",
       "model.sliding_window=64", "parallel.recompute.mode=block"}};
  for (const auto& overrides : layouts) {
    const ProveReport report = prove(options_of(overrides));
    SCOPED_TRACE(report.layout);
    EXPECT_TRUE(report.is_proven()) << describe(*report.first, report.bar);
    EXPECT_LT(report.error, 1e-10);
    EXPECT_GT(report.error, 0);  // something was computed in another order
    int64_t loss_values = 0;
    for (const ErrorRow& row : report.rows)
      if (row.kind == "loss") loss_values = row.values;
    EXPECT_EQ(loss_values, 4 * report.reduced.ranks);
  }
}

// Its key biases get gradients that are rounding alone.
TEST(Prove, Gpt2WithEitherOptimizer) {
  for (const char* optimizer : {"adamw", "lion"}) {
    const ProveReport report =
        prove(options_of({"model.family=gpt2", "model.num_key_value_heads=auto", "parallel.data=1",
                          "parallel.tensor=2", "parallel.sequence=true",
                          std::string("optimizer.name=") + optimizer}));
    SCOPED_TRACE(optimizer);
    EXPECT_TRUE(report.is_proven()) << describe(*report.first, report.bar);
  }
}

TEST(Prove, AnOpenDataAxis_GetsTwoGroups) {
  EXPECT_EQ(plan_whole_run(options_of({})).grid.size(), 2);
  EXPECT_EQ(plan_whole_run(options_of({"parallel.zero.stage=3", "parallel.zero.shard_size=2"}))
                .grid.size(),
            4);
  EXPECT_EQ(
      plan_whole_run(options_of({"batch.global_samples=1", "batch.micro_samples=1"})).grid.size(),
      1);
}

// From step `first` on, what rank 1 holds of the gradients after their sum is a little off.
ProveOptions faulty(int first) {
  ProveOptions options = options_of({"parallel.data=2", "parallel.zero.stage=1"});
  options.hooks = [first](int rank) {
    engine::EngineHooks hooks;
    auto sums = std::make_shared<std::atomic<int>>(0);
    hooks.after_reduce = [=](int bucket, const at::Tensor& gradients) {
      if (bucket == 0) ++*sums;
      if (rank == 1 && *sums >= first) gradients.mul_(1.0 + 1e-6);
    };
    return hooks;
  };
  return options;
}

TEST(Prove, AFault_IsFoundWhereItBegins) {
  for (const int step : {1, 3}) {
    const ProveReport report = prove(faulty(step));
    ASSERT_FALSE(report.is_proven());
    EXPECT_EQ(report.first->step, step);
    EXPECT_GT(report.error, 1e-9);
    EXPECT_FALSE(report.first->shape.empty());
    const std::string text = describe(*report.first, report.bar);
    EXPECT_THAT(text, HasSubstr("step " + std::to_string(step)));
    EXPECT_THAT(text, HasSubstr(" of model."));
    EXPECT_THAT(text, HasSubstr("rank "));
  }
}

TEST(Prove, ARecipeThatCannotBePlanned_IsRefusedAsItStands) {
  try {
    (void)prove(options_of({"parallel.data=3"}));
    FAIL() << "a batch of 16 over 3 ranks";
  } catch (const recipe::RecipeError& e) {
    EXPECT_THAT(e.what(), HasSubstr("batch.global_samples"));
  }
}

TEST(Prove, DrawnRows_DependOnTheirNumberAlone) {
  const DrawnRows rows{.first = 3,
                       .samples = 5,
                       .length = 32,
                       .vocab = 61,
                       .documents = data::Documents::kSeparate,
                       .seed = 7};
  const data::SampleBatch batch = draw_rows(rows);
  DrawnRows later = rows;
  later.first = 5;
  later.samples = 1;
  const data::SampleBatch one = draw_rows(later);
  const auto part = [&](const std::vector<int64_t>& values) {
    return std::vector<int64_t>(values.begin() + 64, values.begin() + 96);
  };
  EXPECT_EQ(part(batch.tokens), one.tokens);
  EXPECT_EQ(part(batch.positions), one.positions);
  EXPECT_THAT(one.targets, testing::Each(data::kIgnoreTarget));  // sample 5
  EXPECT_GT(batch.document_ids[31], 0);
  EXPECT_EQ(batch.positions[0], 0);
}

}  // namespace
}  // namespace capstan::trainer
