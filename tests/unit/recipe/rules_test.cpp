// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Rules between keys.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "recipe_text.h"

namespace capstan::recipe {
namespace {

using testing::HasSubstr;

struct Case {
  const char* name;
  Overrides overrides;
  std::string key;
  std::vector<std::string> words;
};
void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

class BrokenRule : public testing::TestWithParam<Case> {};

TEST_P(BrokenRule, IsReportedOnceWithItsKey) {
  const auto problems = problems_of(kSmall, GetParam().overrides);
  ASSERT_EQ(problems.size(), 1U) << complaint_of(kSmall, GetParam().overrides);
  EXPECT_EQ(problems[0].key, GetParam().key);
  for (const std::string& word : GetParam().words) EXPECT_THAT(problems[0].text(), HasSubstr(word));
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, BrokenRule,
    testing::Values(
        Case{"hidden_heads",
             {"model.hidden_size=36", "model.num_attention_heads=8"},
             "model.num_attention_heads",
             {"got 8", "divisor of hidden_size 36", "Use 9"}},
        Case{"kv_heads",
             {"model.num_key_value_heads=3"},
             "model.num_key_value_heads",
             {"got 3", "divisor of num_attention_heads 4", "Use 2"}},
        Case{"more_kv_heads",
             {"model.num_key_value_heads=8"},
             "model.num_key_value_heads",
             {"Use 4"}},
        Case{"odd_head_dim", {"model.head_dim=7"}, "model.head_dim", {"got 7", "even"}},
        Case{"odd_derived",
             {"model.hidden_size=36"},
             "model.num_attention_heads",
             {"head_dim 9", "even"}},
        Case{"positions",
             {"model.max_position_embeddings=8"},
             "batch.sequence_length",
             {"got 16", "at most 8"}},
        Case{"no_vocabulary",
             {"model.vocab_size=auto"},
             "model.vocab_size",
             {"data.tokenizer is none"}},
        Case{"bf16_moments_of_fp64",
             {"precision.compute=fp64", "optimizer.moments=bf16"},
             "optimizer.moments",
             {"got bf16, need auto", "precision.compute is fp64"}},
        Case{"eps_of_lion",
             {"optimizer.name=lion", "optimizer.eps=1.0e-6"},
             "optimizer.eps",
             {"lion takes no root"}},
        Case{"rho_of_adamw",
             {"optimizer.sophia.rho=0.1"},
             "optimizer.sophia.rho",
             {"optimizer.name is adamw"}},
        Case{"eps_of_sophia",
             {"optimizer.name=sophia", "optimizer.eps=1.0e-6"},
             "optimizer.eps",
             {"sophia takes no root"}},
        Case{"limit_in_backward",
             {"optimizer.in_backward=true", "optimizer.nonfinite_limit=3"},
             "optimizer.nonfinite_limit",
             {"the first non-finite step ends the run"}},
        Case{"buckets_in_backward",
             {"optimizer.in_backward=true", "parallel.bucket_mib=8"},
             "parallel.bucket_mib",
             {"every buffer is summed by itself"}},
        Case{"master_fp64", {"precision.master=fp64"}, "precision.master", {"got fp64, need fp32"}},
        Case{"master_fp32",
             {"precision.compute=fp64", "precision.master=fp32"},
             "precision.master",
             {"got fp32, need fp64", "precision.compute is fp64"}},
        Case{"gradients_fp32",
             {"precision.compute=fp64", "precision.gradients=fp32"},
             "precision.gradients",
             {"need fp64"}},
        Case{"residual",
             {"precision.compute=fp64", "precision.residual=fp32"},
             "precision.residual",
             {"auto or fp64"}},
        Case{"residual_16",
             {"precision.compute=bf16", "precision.residual=fp16"},
             "precision.residual",
             {"auto, fp32 or bf16"}},
        Case{"loss_scale",
             {"precision.compute=bf16", "precision.loss_scale=1024"},
             "precision.loss_scale",
             {"only precision.compute fp16"}}));

INSTANTIATE_TEST_SUITE_P(
    Runs, BrokenRule,
    testing::Values(
        Case{"both_lengths", {"run.tokens=100"}, "run.tokens", {"both", "exactly one"}},
        Case{"no_length", {"run.steps=none"}, "run.steps", {"neither", "exactly one"}},
        Case{"micro",
             {"batch.global_samples=10", "batch.micro_samples=4"},
             "batch.global_samples",
             {"got 10", "multiple of batch.micro_samples 4", "Use 8 or 12"}},
        Case{"micro_larger", {"batch.micro_samples=8"}, "batch.global_samples", {"Use 8"}},
        Case{"huge_step",
             {"batch.global_samples=1000000000", "batch.sequence_length=67108864"},
             "batch.global_samples",
             {"2^50"}},
        Case{"warmup", {"lr_schedule.warmup=11"}, "lr_schedule.warmup", {"11 steps", "at most 10"}},
        Case{"warmup_tokens",
             {"lr_schedule.unit=tokens", "lr_schedule.warmup=641"},
             "lr_schedule.warmup",
             {"641 tokens", "at most 640"}},
        Case{"warmup_of_tokens",
             {"run.steps=none", "run.tokens=65", "lr_schedule.warmup=3"},
             "lr_schedule.warmup",
             {"at most 2"}},
        Case{"wsd", {"lr_schedule.kind=wsd"}, "lr_schedule.decay", {"wsd needs the length"}},
        Case{"wsd_long",
             {"lr_schedule.kind=wsd", "lr_schedule.warmup=4", "lr_schedule.decay=7"},
             "lr_schedule.decay",
             {"at most 6"}},
        Case{"constant_decay",
             {"lr_schedule.kind=constant", "lr_schedule.decay=3"},
             "lr_schedule.decay",
             {"constant has no phase of decay"}},
        Case{"constant_ratio",
             {"lr_schedule.kind=constant", "lr_schedule.min_ratio=0.2"},
             "lr_schedule.min_ratio",
             {"does not fall"}},
        Case{"spike_window",
             {"optimizer.spike_skip.window=64"},
             "optimizer.spike_skip.window",
             {"sigma is none"}},
        Case{"fp8_gradients",
             {"precision.fp8.gradients=e4m3"},
             "precision.fp8.gradients",
             {"got e4m3, need e5m2", "scaling is none"}},
        Case{"fp8_history",
             {"precision.fp8.scaling=tensor", "precision.fp8.history=8"},
             "precision.fp8.history",
             {"got 8, need 16", "only precision.fp8.scaling delayed"}},
        Case{"trace_steps",
             {"metrics.trace.steps=5"},
             "metrics.trace.steps",
             {"first_step is none"}},
        Case{"trace_late",
             {"metrics.trace.first_step=11"},
             "metrics.trace.first_step",
             {"at most run.steps 10"}},
        Case{"keep_without",
             {"checkpoint.keep_every_steps=4"},
             "checkpoint.keep_every_steps",
             {"interval_steps is none"}},
        Case{"keep_odd",
             {"checkpoint.interval_steps=3", "checkpoint.keep_every_steps=4"},
             "checkpoint.keep_every_steps",
             {"multiple of checkpoint.interval_steps 3"}},
        Case{"eval_nothing",
             {"data.validation=[]", "eval.interval_steps=5"},
             "eval.interval_steps",
             {"data.validation is empty"}},
        Case{"validation_twice",
             {"data.validation=[{name: a, path: b}, {name: a, path: c}]"},
             "data.validation[1].name",
             {"data.validation[0]"}},
        Case{"parts",
             {"parallel.recompute.parts=[mlp]"},
             "parallel.recompute.parts",
             {"need an empty list", "only mode selective has parts"}},
        Case{"no_parts",
             {"parallel.recompute.mode=selective"},
             "parallel.recompute.parts",
             {"an empty list", "at least one part"}},
        Case{"sequence",
             {"parallel.sequence=true"},
             "parallel.sequence",
             {"got true, need false"}}));

TEST(Rules, PlaceIsTheKeyOfTheRule) {
  const std::string text = replaced(kSmall, "num_attention_heads: 4", "num_attention_heads: 5");
  EXPECT_THAT(complaint_of(text),
              testing::StartsWith("8:24: error: model.num_attention_heads: got 5"));
}

TEST(Rules, RefusedValuesCauseNoSecondComplaint) {
  for (const Overrides& overrides :
       {Overrides{"model.num_attention_heads=0"}, Overrides{"batch.micro_samples=0"},
        Overrides{"run.steps=0"}, Overrides{"precision.compute=fp8"}, Overrides{"batch=3"},
        Overrides{"lr_schedule.kind=wsb"}}) {
    EXPECT_EQ(problems_of(kSmall, overrides).size(), 1U) << complaint_of(kSmall, overrides);
  }
}

TEST(Rules, Fp64_WidensMasterAndGradientsAndSaysSo) {
  const Resolved resolved = parse(kSmall, Overrides{"precision.compute=fp64"});
  EXPECT_EQ(resolved.recipe.precision.master, "fp64");
  EXPECT_EQ(resolved.recipe.precision.gradients, "fp64");
  EXPECT_EQ(resolved.origin_of("precision.master").text(), "auto");
  EXPECT_EQ(resolved.origin_of("precision.compute").text(), "--set:1:1");
  EXPECT_EQ(parse(kSmall).recipe.precision.master, "fp32");
}

TEST(Rules, LegalCombinationsPass) {
  for (const Overrides& overrides :
       {Overrides{"model.head_dim=6", "model.hidden_size=33"},
        Overrides{"model.num_key_value_heads=1"},
        Overrides{"lr_schedule.kind=wsd", "lr_schedule.warmup=4", "lr_schedule.decay=6"},
        Overrides{"precision.compute=fp16", "precision.loss_scale=1024"},
        Overrides{"precision.compute=bf16", "precision.residual=fp32"},
        Overrides{"optimizer.name=lion", "optimizer.moments=bf16"},
        Overrides{"optimizer.name=lion", "optimizer.moments=int8"},
        Overrides{"optimizer.name=sophia", "optimizer.moments=bf16"},
        Overrides{"optimizer.name=sophia", "optimizer.moments=int8"},
        Overrides{"optimizer.name=sophia", "precision.compute=fp16"},
        Overrides{"optimizer.name=sophia", "precision.fp8.scaling=tensor"},
        Overrides{"optimizer.name=sophia", "run.graphs=true"},
        Overrides{"optimizer.name=sophia", "optimizer.sophia.rho=0.05",
                  "optimizer.sophia.interval=5"},
        Overrides{"optimizer.moments=int8"},
        Overrides{"checkpoint.interval_steps=3", "checkpoint.keep_every_steps=6"},
        Overrides{"run.steps=none", "run.tokens=1"}, Overrides{"lr_schedule.warmup=10"},
        Overrides{"model.vocab_size=auto", "data.tokenizer=some/folder"}}) {
    EXPECT_EQ(complaint_of(kSmall, overrides), "");
  }
}

}  // namespace
}  // namespace capstan::recipe
