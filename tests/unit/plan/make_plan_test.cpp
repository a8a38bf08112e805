// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>

#include "recipes.h"

namespace capstan::plan {
namespace {

using ::testing::HasSubstr;
using testing::machine;
using testing::plan_of;
using testing::problems_of;
using testing::resolved;

bool has_choice(const Plan& plan, const std::string& text) {
  return std::any_of(plan.choices.begin(), plan.choices.end(), [&](const std::string& choice) {
    return choice.find(text) != std::string::npos;
  });
}

std::string text_of(const std::vector<recipe::Problem>& problems) {
  std::string text;
  for (const recipe::Problem& problem : problems) text += problem.text() + "\n";
  return text;
}

TEST(MakePlan, ResolvesEveryAuto) {
  const Plan plan = plan_of(resolved(), machine(2));
  const recipe::Recipe& r = plan.resolved;
  EXPECT_EQ(r.run.device, "cpu");
  EXPECT_EQ(r.run.directory, "runs/tiny");
  EXPECT_EQ(r.run.threads, 1);
  EXPECT_EQ(r.model.vocab_size, 8192);
  EXPECT_EQ(r.model.head_dim, 64);
  EXPECT_EQ(r.model.max_position_embeddings, 256);
  EXPECT_EQ(r.precision.compute, "fp32");
  EXPECT_EQ(r.precision.residual, "fp32");
  EXPECT_EQ(r.parallel.data, 2);
  EXPECT_EQ(r.parallel.zero.reduce, "step");
  EXPECT_EQ(r.lr_schedule.decay, 90);
  EXPECT_TRUE(has_choice(plan, "precision.compute: auto -> fp32 (no fast bf16 here)"));
  EXPECT_TRUE(has_choice(plan, "parallel.data: auto -> 2"));
  EXPECT_EQ(plan.threads_per_rank, 1);
  EXPECT_EQ(plan.bucket_bytes, 25 << 20);
}

TEST(MakePlan, TheResolvedRecipePlansTheSame) {
  const Plan plan = plan_of(resolved(), machine(2));
  recipe::Resolved again = recipe::parse_recipe(recipe::dump_recipe(plan.resolved), "recipe.yaml");
  const Plan second = make_plan(again, machine(2), {});  // the tokenizer is no longer needed
  EXPECT_EQ(recipe::dump_recipe(second.resolved), recipe::dump_recipe(plan.resolved));
  EXPECT_EQ(plan_json(second).substr(plan_json(second).find("\"device\"")),
            plan_json(plan).substr(plan_json(plan).find("\"device\"")));
}

TEST(MakePlan, BatchIsDividedAmongRanks) {
  const Plan plan =
      plan_of(resolved({"batch.global_samples=24", "batch.micro_samples=2"}), machine(3));
  EXPECT_EQ(plan.batch.samples_per_rank, 8);
  EXPECT_EQ(plan.batch.micro_batches, 4);
  EXPECT_EQ(plan.batch.tokens_per_step, 24 * 256);
  EXPECT_EQ(plan.batch.total_steps, 100);
  EXPECT_EQ(plan.schedule.micro_batches, 4);
  EXPECT_EQ(plan.grid.data_parallel_size(), 3);
  EXPECT_TRUE(check_schedule(plan.schedule).empty());
}

TEST(MakePlan, TokensEndWithTheStepThatReachesThem) {
  const auto steps = [](const std::string& tokens) {
    return plan_of(resolved({"run.steps=none", "run.tokens=" + tokens}), machine(1))
        .batch.total_steps;
  };
  EXPECT_EQ(steps("204800"), 100);
  EXPECT_EQ(steps("204801"), 101);
  EXPECT_EQ(steps("20481"), 11);
  const Plan plan = plan_of(resolved({"run.steps=none", "run.tokens=204801",
                                      "lr_schedule.unit=tokens", "lr_schedule.warmup=2048"}),
                            machine(1));
  EXPECT_EQ(plan.resolved.lr_schedule.decay,
            100 * 2048);  // 101 steps less one of warm-up, in tokens
}

TEST(MakePlan, DecayStaysAutoWhereThereIsNone) {
  EXPECT_FALSE(
      plan_of(resolved({"lr_schedule.kind=constant"}), machine(1)).resolved.lr_schedule.decay);
  EXPECT_FALSE(
      plan_of(resolved({"lr_schedule.kind=inverse_sqrt"}), machine(1)).resolved.lr_schedule.decay);
  EXPECT_EQ(plan_of(resolved({"lr_schedule.kind=wsd", "lr_schedule.decay=20"}), machine(1))
                .resolved.lr_schedule.decay,
            20);
  const Plan late = plan_of(resolved({"lr_schedule.decay=200"}), machine(1));
  EXPECT_TRUE(has_choice(late, "warning: lr_schedule.decay 200 steps ends after the run"));
}

TEST(MakePlan, PrecisionFollowsMachineAndCompute) {
  Topology fast = machine(1);
  fast.fast_bf16 = true;
  const Plan bf16 = plan_of(resolved(), fast);
  EXPECT_EQ(bf16.precision.compute, DType::kBf16);
  EXPECT_EQ(bf16.precision.residual, DType::kFp32);
  EXPECT_EQ(bf16.precision.master, DType::kFp32);
  EXPECT_FALSE(bf16.precision.dynamic_loss_scale);
  const Plan fp64 = plan_of(resolved({"precision.compute=fp64"}), fast);
  EXPECT_EQ(fp64.precision.residual, DType::kFp64);
  EXPECT_EQ(fp64.precision.master, DType::kFp64);
  EXPECT_EQ(fp64.precision.gradients, DType::kFp64);
  const Plan fp16 = plan_of(resolved({"precision.compute=fp16"}), fast);
  EXPECT_TRUE(fp16.precision.dynamic_loss_scale);
  const Plan fixed =
      plan_of(resolved({"precision.compute=fp16", "precision.loss_scale=128.0"}), fast);
  EXPECT_FALSE(fixed.precision.dynamic_loss_scale);
  EXPECT_EQ(fixed.precision.loss_scale, 128);
}

TEST(MakePlan, WarnsWhenRanksShareCores) {
  EXPECT_TRUE(has_choice(plan_of(resolved({"batch.micro_samples=2"}), machine(4, 2)),
                         "warning: 4 ranks x 1 threads on 2 physical cores"));
  EXPECT_TRUE(has_choice(plan_of(resolved({"run.threads=2"}), machine(2, 2)),
                         "warning: 2 ranks x 2 threads"));
  EXPECT_FALSE(has_choice(plan_of(resolved(), machine(2, 2)), "warning"));
}

// One refused plan: which key, and words the message must have.
struct Refused {
  const char* name;
  std::function<void(recipe::Recipe&)> change;
  int ranks;
  const char* key;
  std::vector<const char*> words;
};

class Refusal : public ::testing::TestWithParam<Refused> {};

TEST_P(Refusal, NamesKeyAndRemedy) {
  const Refused& test = GetParam();
  recipe::Resolved recipe = resolved();
  test.change(recipe.recipe);
  const auto problems = problems_of(recipe, machine(test.ranks, 64));
  ASSERT_EQ(problems.size(), 1u) << text_of(problems);
  EXPECT_EQ(problems[0].key, test.key);
  for (const char* word : test.words) EXPECT_THAT(problems[0].text(), HasSubstr(word));
}

using R = recipe::Recipe;
INSTANTIATE_TEST_SUITE_P(
    Plan, Refusal,
    ::testing::
        Values(Refused{"world",
                       [](R& r) { r.parallel.tensor = 2, r.parallel.pipeline.size = 2; },
                       6,
                       "parallel.data",
                       {"world size 6", "tensor 2 x pipeline 2 x context 1 = 4",
                        "Start 4 or 8 ranks"}},
               Refused{"world_small",
                       [](R& r) { r.parallel.tensor = 2; },
                       1,
                       "parallel.data",
                       {"world size 1", "Start 2 ranks"}},
               Refused{"data",
                       [](R& r) { r.parallel.data = 4; },
                       2,
                       "parallel.data",
                       {"data 4 x tensor 1 x pipeline 1 x context 1 = 4",
                        "Start 4 ranks, or set parallel.data: 2"}},
               Refused{"batch",
                       [](R& r) { r.batch.global_samples = 32, r.batch.micro_samples = 4; },
                       3,
                       "batch.global_samples",
                       {"tiny.yaml:17:19", "micro_samples 4 x data-parallel ranks 3 = 12",
                        "Nearest: 24 or 36"}},
               Refused{"batch_small", [](R&) {}, 4, "batch.global_samples", {"Nearest: 16"}},
               Refused{"micro_batches",
                       [](R& r) { r.batch.global_samples = 65537, r.batch.micro_samples = 1; },
                       1,
                       "batch.micro_samples",
                       {"at most 65536 micro-batches", "65537"}},
               Refused{"positions",
                       [](R& r) { r.model.max_position_embeddings = 128; },
                       1,
                       "batch.sequence_length",
                       {"got 256", "max_position_embeddings 128"}},
               Refused{"vocabulary",
                       [](R& r) { r.model.vocab_size = 8000; },
                       1,
                       "model.vocab_size",
                       {"8000", "at least 8192", "data.tokenizer"}},
               Refused{"heads",
                       [](R& r) { r.parallel.tensor = 8, r.model.num_key_value_heads = 4; },
                       8,
                       "model.num_attention_heads",
                       {"multiple of parallel.tensor 8", "Nearest: parallel.tensor 4"}},
               Refused{"kv_heads",
                       [](R& r) {
                         r.parallel.tensor = 4, r.model.num_attention_heads = 12,
                         r.model.num_key_value_heads = 3;
                         r.model.head_dim = 64;
                       },
                       4,
                       "model.num_key_value_heads",
                       {"multiple or a divisor of parallel.tensor 4"}},
               Refused{"kv_divides",
                       [](R& r) { r.model.num_key_value_heads = 3; },
                       1,
                       "model.num_key_value_heads",
                       {"a divisor of num_attention_heads 4"}},
               Refused{"head_dim_odd",
                       [](R& r) { r.model.head_dim = 63; },
                       1,
                       "model.head_dim",
                       {"even"}},
               Refused{"head_dim_auto",
                       [](R& r) { r.model.hidden_size = 250; },
                       1,
                       "model.hidden_size",
                       {"multiple of num_attention_heads 4", "248 or 252"}},
               Refused{"sequence",
                       [](R& r) { r.parallel.sequence = true; },
                       1,
                       "parallel.sequence",
                       {"tensor above 1"}},
               Refused{"sequence_overlap",
                       [](R& r) {
                         r.parallel.tensor = 2;
                         r.parallel.sequence_overlap = true;
                       },
                       2,
                       "parallel.sequence_overlap",
                       {"need parallel.sequence true"}},
               Refused{"frozen_nothing",
                       [](R& r) { r.model.frozen = {"model.layers.9.*"}; },
                       1,
                       "model.frozen",
                       {"'model.layers.9.*'", "need a pattern that matches a parameter",
                        "model.embed_tokens.weight"}},
               Refused{"frozen_tied_head",
                       [](R& r) { r.model.frozen = {"!lm_head.*"}; },
                       1,
                       "model.frozen",
                       {"'!lm_head.*'", "a tied head is model.embed_tokens.weight"}},
               Refused{"frozen_everything",
                       [](R& r) { r.model.frozen = {"model.*"}; },
                       1,
                       "model.frozen",
                       {"every parameter", "need at least one that is trained"}},
               Refused{"frozen_apart",
                       [](R& r) { r.model.frozen = {"*.0.self_attn.q_proj.*"}; },
                       1,
                       "model.frozen",
                       {"q_proj.weight frozen without", "one product reads both"}},
               Refused{"kept_nothing",
                       [](R& r) { r.precision.keep_fp32 = {"*.mlp.gate.weight"}; },
                       1,
                       "precision.keep_fp32",
                       {"'*.mlp.gate.weight'", "need a pattern that matches a parameter"}},
               Refused{"kept_apart",
                       [](R& r) { r.precision.keep_fp32 = {"*.0.mlp.up_proj.*"}; },
                       1,
                       "precision.keep_fp32",
                       {"up_proj.weight kept without", "both kept or neither",
                        "one product reads both"}},
               Refused{"reduction_wider",
                       [](R& r) { r.precision.reduction = "fp64"; },
                       1,
                       "precision.reduction",
                       {"fp64", "precision.gradients fp32 or a narrower type"}},
               Refused{"reduction_fp16",
                       [](R& r) { r.precision.reduction = "fp16"; },
                       1,
                       "precision.reduction",
                       {"need bf16", "loss scale"}},
               Refused{"context",
                       [](R& r) { r.parallel.context.size = 3; },
                       3,
                       "batch.sequence_length",
                       {"a multiple of", "= 6", "252 or 258"}},
               Refused{"schedule",
                       [](R& r) {
                         r.parallel.pipeline.schedule = "interleaved";
                         r.parallel.pipeline.size = 2;
                       },
                       2,
                       "parallel.pipeline.chunks",
                       {"got 1, need 2 or more", "interleaved", "chunks: 2"}},
               Refused{"rounds",
                       [](R& r) {
                         r.parallel.pipeline = {.size = 2, .schedule = "interleaved", .chunks = 2};
                         r.batch.global_samples = 12;
                       },
                       2,
                       "batch.global_samples",
                       {"3 micro-batches", "the 8 samples of a round", "Nearest: 8 or 16"}},
               Refused{"micro_batch_reduce",
                       [](R& r) {
                         r.parallel.zero.stage = 1;
                         r.parallel.zero.reduce = "micro_batch";
                       },
                       1,
                       "parallel.zero.reduce",
                       {"stage 2 or 3"}},
               Refused{"reshard",
                       [](R& r) { r.parallel.zero.reshard_after_forward = false; },
                       1,
                       "parallel.zero.reshard_after_forward",
                       {"stage 3"}},
               Refused{"offload",
                       [](R& r) {
                         r.parallel.zero.stage = 2;
                         r.parallel.zero.offload = "all";
                       },
                       1,
                       "parallel.zero.offload",
                       {"stage 3", "optimizer"}},
               Refused{"stages",
                       [](R& r) { r.parallel.pipeline.size = 7; },
                       7,
                       "parallel.pipeline.size",
                       {"6 stages", "4 layers"}},
               Refused{"split",
                       [](R& r) {
                         r.parallel.pipeline.size = 2, r.parallel.pipeline.split = {{1, 2}};
                       },
                       2,
                       "parallel.pipeline.split",
                       {"2 stages with 3 layers", "4 layers in all"}},
               Refused{"shard_size",
                       [](R& r) { r.parallel.zero.stage = 1, r.parallel.zero.shard_size = 3; },
                       2,
                       "parallel.zero.shard_size",
                       {"divisor of the 2"}},
               Refused{"shard_size_stage_0",
                       [](R& r) { r.parallel.zero.shard_size = 2; },
                       2,
                       "parallel.zero.shard_size",
                       {"stage 0"}},
               Refused{"expert",
                       [](R& r) { r.parallel.expert = 2; },
                       2,
                       "parallel.expert",
                       {"no experts"}},
               Refused{"device",
                       [](R& r) { r.run.device = "cuda"; },
                       1,
                       "run.device",
                       {"cuda", "need cpu"}},
               Refused{"family",
                       [](R& r) { r.model.family = "gpt9"; },
                       1,
                       "model.family",
                       {"'gpt9'", "llama"}},
               Refused{"residual",
                       [](R& r) { r.precision.compute = "bf16", r.precision.residual = "fp16"; },
                       1,
                       "precision.residual",
                       {"precision.compute bf16 or a wider type"}},
               Refused{"loss_scale",
                       [](R& r) { r.precision.loss_scale = 8.0; },
                       1,
                       "precision.loss_scale",
                       {"only fp16 gradients need a scale"}},
               Refused{"dtype",
                       [](R& r) { r.precision.compute = "fp8"; },
                       1,
                       "precision.compute",
                       {"'fp8'"}},
               Refused{
                   "wsd", [](R& r) { r.lr_schedule.kind = "wsd"; }, 1, "lr_schedule.decay", {"up to 90 steps"}},
               Refused{
                   "wsd_long",
                   [](R& r) { r.lr_schedule.kind = "wsd", r.lr_schedule.decay = 91; },
                   1,
                   "lr_schedule.decay",
                   {"at most 90 steps"}},
               Refused{
                   "warmup",
                   [](R& r) { r.lr_schedule.warmup = 101; },
                   1,
                   "lr_schedule.warmup",
                   {"100 steps"}},
               Refused{"length", [](R& r) { r.run.tokens = 5; }, 1, "run.tokens", {"exactly one"}},
               Refused{
                   "size",
                   [](R& r) {
                     r.model.hidden_size = r.model.intermediate_size = 1 << 20;
                     r.model.num_hidden_layers = 4096;
                   },
                   1,
                   "model.num_hidden_layers",
                   {"parameters", "1e+15"}}),
    [](const auto& test) { return std::string(test.param.name); });

TEST(MakePlan, MissingVocabularyNamesBothWays) {
  const auto problems = problems_of(resolved(), machine(1), {});
  ASSERT_EQ(problems.size(), 1u);
  EXPECT_EQ(problems[0].key, "model.vocab_size");
  EXPECT_THAT(problems[0].text(), HasSubstr("Write model.vocab_size"));
  EXPECT_THAT(problems[0].text(), HasSubstr("capstan data tokenizer train"));
  EXPECT_NO_THROW((void)make_plan(resolved({"model.vocab_size=500"}), machine(1), {}));
}

TEST(MakePlan, ReportsAllProblemsAtOnceWithTheirPlaces) {
  recipe::Resolved recipe = resolved();
  recipe.recipe.model.max_position_embeddings = 100;
  recipe.recipe.parallel.zero.shard_size = 2;
  const auto problems = problems_of(recipe, machine(4, 8), {});
  EXPECT_EQ(problems.size(), 4u) << text_of(problems);  // vocabulary, positions, shard size, batch
  for (const recipe::Problem& problem : problems)
    EXPECT_TRUE(problem.key != "batch.sequence_length" || problem.origin.line == 19)
        << problem.text();
}

TEST(MakePlan, FixedTypesUnderFp64MustAgree) {
  recipe::Resolved recipe = resolved({"precision.gradients=fp32"});
  recipe.recipe.precision.compute = "fp64";
  const auto problems = problems_of(recipe, machine(1));
  ASSERT_EQ(problems.size(), 1u) << text_of(problems);
  EXPECT_EQ(problems[0].key, "precision.gradients");
  EXPECT_EQ(problems[0].origin.file, "--set");
}

TEST(MakePlan, MemoryAboveTheHostIsRefusedWithTheReport) {
  Topology small = machine(2);
  small.memory_bytes = 200 << 20;
  const auto problems = problems_of(resolved(), small);
  ASSERT_EQ(problems.size(), 1u);
  for (const char* word : {"2 ranks here", "parameters", "optimizer", "activations", "at most 200"})
    EXPECT_THAT(problems[0].text(), HasSubstr(word));
  small.memory_bytes = 0;  // unknown: not refused
  EXPECT_NO_THROW((void)plan_of(resolved(), small));
}

TEST(MakePlan, SizesBeyondAnyMachineDoNotWrapAround) {
  recipe::Resolved recipe = resolved();
  recipe.recipe.batch.global_samples = recipe.recipe.batch.micro_samples = 1'000'000'000;
  recipe.recipe.batch.sequence_length = 1 << 26;
  recipe.recipe.model.max_position_embeddings = 1 << 26;
  recipe.recipe.run.steps = 1'000'000'000'000;
  const auto problems = problems_of(recipe, machine(1));
  EXPECT_THAT(text_of(problems), HasSubstr("this host"));
}

TEST(MakePlan, ShardGroupsFormTheGrid) {
  recipe::Resolved recipe = resolved();
  recipe.recipe.parallel.zero.stage = 2;
  recipe.recipe.parallel.zero.shard_size = 2;
  recipe.recipe.batch.micro_samples = 1;
  const Plan plan = plan_of(recipe, machine(8, 8));
  EXPECT_EQ(plan.grid.sizes().dp_shard, 2);
  EXPECT_EQ(plan.grid.sizes().dp_replicate, 4);
  EXPECT_EQ(plan.resolved.parallel.zero.reduce, "micro_batch");
}

}  // namespace
}  // namespace capstan::plan
