// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What a recipe is before and after it was made small for a proof.
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "capstan/trainer/prove.h"

namespace capstan::trainer {
namespace {

using testing::Contains;
using testing::Field;

constexpr const char* kRecipe = R"(version: 1
run: {name: large, steps: 1000}
model:
  vocab_size: 128256
  hidden_size: 4096
  intermediate_size: 14336
  num_hidden_layers: 32
  num_attention_heads: 32
  num_key_value_heads: 8
  tie_word_embeddings: false
data:
  tokenizer: data/tokenizer
  train: [{path: data/train}]
batch: {global_samples: 1024, micro_samples: 1, sequence_length: 8192}
optimizer: {lr: 3.0e-4}
lr_schedule: {warmup: 100}
precision: {compute: bf16}
)";

plan::Plan plan_of(const recipe::Resolved& recipe, int world) {
  plan::Topology topology;
  topology.world_size = topology.local_size = world;
  topology.physical_cores = 1;
  return plan::make_plan(recipe, topology, {.tokenizer_vocab_size = 128256});
}

plan::Plan plan_of(const std::vector<std::string>& overrides, int world) {
  return plan_of(recipe::parse_recipe(kRecipe, "large.yaml", overrides), world);
}

plan::Plan plan_of(const ReducedRun& run) {
  recipe::Resolved resolved;
  resolved.recipe = run.recipe;
  plan::Topology topology;
  topology.world_size = topology.local_size = run.ranks;
  topology.physical_cores = 1;
  return plan::make_plan(resolved, topology, {});
}

int order(int64_t a, int64_t b) { return a < b ? -1 : a > b ? 1 : 0; }

// What a layout does with a model, in numbers that do not depend on sizes.
std::vector<int64_t> traits(const plan::Plan& plan) {
  const plan::ModelShape& s = plan.model().shape;
  const plan::Grid::Sizes& g = plan.grid.sizes();
  const recipe::Parallel& p = plan.resolved.parallel;
  const int64_t stages = p.pipeline.size * p.pipeline.chunks,
                here = std::max<int64_t>(1, s.num_key_value_heads / g.tp);
  return {p.pipeline.chunks,
          s.num_attention_heads / s.num_key_value_heads,
          order(s.num_key_value_heads, g.tp),
          order(here, g.cp),
          order(s.num_hidden_layers, stages),
          s.num_hidden_layers % stages == 0,
          order(plan.batch.micro_batches, g.pp),
          plan.batch.micro_batches % g.pp == 0,
          std::min<int64_t>(2, plan.batch.micro_samples),
          s.tie_word_embeddings,
          s.sliding_window.has_value(),
          p.zero.stage,
          p.sequence};
}

TEST(ProveReduce, Llama8BOn8_KeepsTheLayout) {
  const plan::Plan whole = plan_of({"parallel.tensor=2", "parallel.sequence=true",
                                    "parallel.zero.stage=3", "parallel.context.size=2"},
                                   8);
  const ReducedRun run = reduce_run(whole);
  EXPECT_EQ(run.ranks, 8);
  const plan::Plan small = plan_of(run);
  EXPECT_EQ(small.grid.sizes(), whole.grid.sizes());
  EXPECT_EQ(traits(small), traits(whole));
  // The whole model has more key/value heads per tensor rank than context ranks, so three of each.
  EXPECT_EQ(small.model().shape.num_key_value_heads, 6);
  EXPECT_EQ(small.model().shape.num_attention_heads, 24);
  EXPECT_EQ(small.batch.sequence_length, 16);
  EXPECT_EQ(small.precision.compute, DType::kFp64);
  EXPECT_LT(small.model().parameters, 100'000);
  EXPECT_THAT(run.notes, Contains(Field(&ReductionNote::key, "model.hidden_size")));
}

TEST(ProveReduce, TooManyRanks_DataAxesShrinkFirstAndAreNoted) {
  const plan::Plan whole =
      plan_of({"parallel.tensor=4", "parallel.pipeline.size=4", "parallel.zero.stage=1",
               "parallel.pipeline.schedule=1f1b", "parallel.zero.shard_size=8"},
              256);
  const ReducedRun run = reduce_run(whole);
  EXPECT_EQ(run.ranks, 64);
  const plan::Grid::Sizes g = plan_of(run).grid.sizes();
  EXPECT_EQ(g.tp, 4);
  EXPECT_EQ(g.pp, 4);
  EXPECT_EQ(g.dp_replicate * g.dp_shard, 4);
  EXPECT_EQ(g.dp_replicate, 2);
  EXPECT_THAT(run.notes,
              Contains(testing::AllOf(
                  Field(&ReductionNote::key, "parallel.data (replicas x shards)"),
                  Field(&ReductionNote::before, "2 x 8"), Field(&ReductionNote::after, "2 x 2"))));
}

TEST(ProveReduce, ModelAxesAboveTheLimit_AreShortenedByDivisors) {
  const plan::Plan whole = plan_of({"parallel.tensor=8", "parallel.pipeline.size=16",
                                    "parallel.pipeline.schedule=1f1b", "parallel.zero.stage=1"},
                                   512);
  const ReducedRun run = reduce_run(whole);
  const plan::Grid::Sizes g = plan_of(run).grid.sizes();
  EXPECT_EQ(run.ranks, 64);
  EXPECT_EQ(g.dp_shard, 2);
  EXPECT_EQ(g.tp, 8);
  EXPECT_EQ(g.pp, 4);
  EXPECT_THAT(run.notes,
              Contains(testing::AllOf(Field(&ReductionNote::key, "parallel.pipeline.size"),
                                      Field(&ReductionNote::before, "16"),
                                      Field(&ReductionNote::after, "4"))));
  EXPECT_EQ(traits(plan_of(run)), traits(whole));
}

TEST(ProveReduce, ASplitByHand_StaysUneven) {
  const plan::Plan whole =
      plan_of({"parallel.pipeline.size=4", "parallel.pipeline.split=[7, 9, 9, 7]"}, 4);
  const ReducedRun run = reduce_run(whole);
  EXPECT_EQ(run.recipe.parallel.pipeline.split, (std::vector<int64_t>{2, 3, 3, 2}));
  EXPECT_EQ(plan_of(run).model().shape.num_hidden_layers, 10);
}

TEST(ProveReduce, Experts_StayWholeNumbersOfTheirAxis) {
  const plan::Plan whole =
      plan_of({"model.family=moe", "model.experts.count=64", "model.experts.per_token=6",
               "model.experts.groups=8", "model.experts.groups_per_token=4", "parallel.expert=8",
               "model.experts.shared_intermediate_size=4096", "parallel.zero.stage=1"},
              8);
  const plan::Plan small = plan_of(reduce_run(whole));
  const plan::ExpertShape& e = small.model().shape.experts;
  EXPECT_EQ(e.count, 16);
  EXPECT_EQ(e.per_token, 6);
  EXPECT_EQ(e.groups, 8);
  EXPECT_EQ(small.grid.sizes().ep, 8);
}

TEST(ProveReduce, NarrowMoments_AreWideInAProof) {
  const plan::Plan plan = plan_of({"optimizer.moments=int8"}, 8);
  const ReducedRun run = reduce_run(plan);
  EXPECT_EQ(run.recipe.optimizer.moments, "auto");
  EXPECT_THAT(run.notes, Contains(Field(&ReductionNote::key, "optimizer.moments")));
  const ReducedRun lion = reduce_run(plan_of({"optimizer.name=lion"}, 8));
  EXPECT_EQ(lion.recipe.optimizer.name, "lion");
  EXPECT_EQ(lion.recipe.optimizer.eps, recipe::Optimizer{}.eps);
}

TEST(ProveReduce, OneRank_RunsTheSameSamples) {
  const ReducedRun run = reduce_run(plan_of({"parallel.tensor=2"}, 4));
  const recipe::Recipe one = on_one_rank(run.recipe);
  EXPECT_EQ(one.batch.global_samples, run.recipe.batch.global_samples);
  EXPECT_EQ(one.model.num_hidden_layers, run.recipe.model.num_hidden_layers);
  const plan::Plan plan = plan_of(ReducedRun{.recipe = one});
  EXPECT_EQ(plan.batch.micro_batches, 1);
  EXPECT_EQ(plan.grid.size(), 1);
}

TEST(ProveReduce, APlanTwice_GivesTheSameRecipe) {
  const plan::Plan whole = plan_of({"parallel.tensor=2"}, 4);
  EXPECT_EQ(recipe::dump_recipe(reduce_run(whole).recipe),
            recipe::dump_recipe(reduce_run(whole).recipe));
}

struct Draws {
  std::mt19937_64 random{3};
  template <class... T>
  std::string of(const std::string& key, T... values) {
    const std::vector<std::string> list{values...};
    return key + "=" + list[random() % list.size()];
  }
};

std::vector<std::string> draw_overrides(Draws& d) {
  return {d.of("parallel.tensor", "1", "2", "4", "8"),
          d.of("parallel.sequence", "true", "false"),
          d.of("parallel.sequence_overlap", "false", "false", "true"),
          d.of("parallel.pipeline.size", "1", "2", "3", "4", "8"),
          d.of("parallel.pipeline.schedule", "gpipe", "1f1b", "interleaved", "zero_bubble"),
          d.of("parallel.pipeline.chunks", "1", "2", "4"),
          d.of("parallel.context.size", "1", "2", "3", "4"),
          d.of("parallel.context.method", "ring", "all_to_all"),
          d.of("parallel.data", "1", "2", "3", "8"),
          d.of("parallel.zero.stage", "0", "1", "2", "3"),
          d.of("parallel.zero.prefetch", "0", "1", "3"),
          d.of("model.num_key_value_heads", "1", "2", "8", "32", "24"),
          d.of("model.num_attention_heads", "32", "24", "96"),
          d.of("model.head_dim", "auto", "128"),
          d.of("model.frozen", "[]", "['model.embed_tokens.*', '*.0.self_attn.*']", "['*.5.*']"),
          d.of("model.num_hidden_layers", "1", "6", "7", "32", "80"),
          d.of("model.vocab_size", "128256", "32768", "50257"),
          d.of("model.sliding_window", "none", "4096"),
          d.of("batch.global_samples", "24", "48", "960"),
          d.of("batch.micro_samples", "1", "2"),
          d.of("batch.sequence_length", "8192", "6144", "96")};
}

// Whatever can be planned can be made small, and the small run has the traits of the whole one.
TEST(ProveReduce, RandomRecipes_KeepTheirTraits) {
  Draws draws;
  int planned = 0, whole_axes = 0;
  for (int i = 0; i < 12000 && planned < 400; ++i) {
    const std::vector<std::string> overrides = draw_overrides(draws);
    std::optional<plan::Plan> whole;
    try {
      const auto recipe = recipe::parse_recipe(kRecipe, "large.yaml", overrides);
      const recipe::Parallel& p = recipe.recipe.parallel;
      whole =
          plan_of(recipe, static_cast<int>(*p.data * p.tensor * p.pipeline.size * p.context.size));
    } catch (const recipe::RecipeError&) {
      continue;
    }
    ++planned;
    SCOPED_TRACE(fmt::format("--set {}", fmt::join(overrides, " --set ")));
    const ReducedRun run = reduce_run(*whole);
    ASSERT_LE(run.ranks, 64);
    const plan::Plan small = plan_of(run);
    ASSERT_LT(small.model().parameters, 3'000'000);
    const auto freezes_front = [](const plan::Plan& plan) {
      return !plan.model().table().front().trainable;
    };
    ASSERT_EQ(freezes_front(small), freezes_front(*whole));
    if (small.grid.sizes() != whole->grid.sizes()) continue;
    ++whole_axes;
    ASSERT_EQ(traits(small), traits(*whole));
  }
  EXPECT_GE(planned, 400);
  EXPECT_GE(whole_axes, 200);
}

}  // namespace
}  // namespace capstan::trainer
