// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/plan/fp8.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "capstan/base/error.h"
#include "capstan/plan/keep_wide.h"
#include "recipes.h"

namespace capstan::plan {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using testing::machine;
using testing::plan_of;
using testing::resolved;

Plan plan_fp8(std::vector<std::string> overrides, const std::string& scaling = "tensor",
              int ranks = 2) {
  overrides.push_back("precision.fp8.scaling=" + scaling);
  return plan_of(resolved(overrides), machine(ranks));
}

std::string complaint_of(const std::vector<std::string>& overrides, int ranks = 2) {
  try {
    (void)plan_fp8(overrides, "tensor", ranks);
  } catch (const recipe::RecipeError& error) {
    return error.what();
  }
  return "";
}

TEST(Fp8Plan, ComputeAuto_IsBf16_AndTheChoiceIsSaid) {
  for (const bool fast : {false, true}) {
    Topology topology = machine(1);
    topology.fast_bf16 = fast;
    const Plan plan = plan_of(resolved({"precision.fp8.scaling=row"}), topology);
    EXPECT_EQ(plan.precision.compute, DType::kBf16);
    EXPECT_EQ(plan.precision.residual, DType::kFp32);
    EXPECT_THAT(plan.choices,
                ::testing::Contains(AllOf(HasSubstr("gradients e5m2"), HasSubstr("scaling row"),
                                          HasSubstr("on cpu the rounding is emulated"))));
  }
}

TEST(Fp8Plan, WhatCannotBeHonouredIsRefused) {
  for (const char* compute : {"fp32", "fp16", "fp64"})
    EXPECT_THAT(complaint_of({std::string("precision.compute=") + compute}),
                AllOf(HasSubstr("precision.compute: got " + std::string(compute) + ", need bf16"),
                      HasSubstr("precision.fp8.scaling")));
  EXPECT_THAT(complaint_of({"model.family=moe", "model.experts.count=4"}),
              AllOf(HasSubstr("precision.fp8.scaling: got tensor, need none"),
                    HasSubstr("any number of tokens")));
  EXPECT_EQ(complaint_of({}), "");
}

TEST(Fp8Plan, AnyScalingGoesWithGraphs) {
  Topology gpu = machine(1);
  gpu.device = "cuda";
  for (const char* scaling : {"tensor", "row", "delayed"})
    EXPECT_TRUE(
        plan_of(resolved({"run.graphs=true", std::string("precision.fp8.scaling=") + scaling}), gpu)
            .resolved.run.graphs);
}

TEST(Fp8Plan, SidesOfProducts_AreMultiplesOf16) {
  EXPECT_THAT(complaint_of({"model.intermediate_size=700"}),
              AllOf(HasSubstr("model.intermediate_size: got intermediate_size = 700"),
                    HasSubstr("a multiple of 16"), HasSubstr("688 or 704")));
}

TEST(Fp8Plan, SidesOfProducts_CountWhatARankHolds) {
  // 704 / 2 = 352 = 22 x 16; 720 / 2 = 360 is none.
  EXPECT_EQ(complaint_of({"parallel.tensor=2"}), "");
  EXPECT_THAT(complaint_of({"parallel.tensor=2", "model.intermediate_size=720"}),
              AllOf(HasSubstr("model.intermediate_size"), HasSubstr("on each of 2 ranks"),
                    HasSubstr("704 or 736")));
  EXPECT_EQ(complaint_of({"model.intermediate_size=720"}), "");
  EXPECT_THAT(complaint_of({"model.num_attention_heads=2", "model.num_key_value_heads=1",
                            "model.head_dim=20"}),
              AllOf(HasSubstr("model.num_attention_heads: got num_attention_heads x head_dim = 40"),
                    HasSubstr("num_key_value_heads x head_dim = 20")));
  EXPECT_THAT(complaint_of({"batch.micro_samples=1", "batch.sequence_length=24"}),
              HasSubstr("batch.micro_samples: got micro_samples x sequence_length = 24"));
  EXPECT_THAT(complaint_of(
                  {"parallel.context.size=2", "batch.micro_samples=1", "batch.sequence_length=16"}),
              AllOf(HasSubstr("micro_samples x sequence_length = 16"), HasSubstr("Nearest")));
  EXPECT_THAT(complaint_of({"model.hidden_size=200"}),
              HasSubstr("model.hidden_size: got hidden_size = 200"));
}

TEST(Fp8Plan, KeptCastsAndFactors_AreCounted) {
  const std::vector<std::string> bf16{"precision.compute=bf16"};
  const Plan plain = plan_of(resolved(bf16), machine(2));
  const Plan fp8 = plan_fp8(bf16);
  // q, k, v; o; gate, up; down: a byte per element, as it is and transposed.
  const int64_t layer = 256 * 512 + 256 * 256 + 2 * 256 * 704 + 256 * 704;
  EXPECT_EQ(fp8_kept_bytes(fp8, fp8.model().layout.rank(0)), 4 * 2 * layer);
  EXPECT_EQ(fp8.memory.parameters - plain.memory.parameters, 4 * 2 * layer);
  EXPECT_EQ(fp8_work_bytes(plain), 0);
  EXPECT_GT(fp8_work_bytes(fp8), 1024 * (2 * 704 + 256));  // at least the largest two factors
  EXPECT_EQ(fp8.memory.activations, plain.memory.activations);
  // Weights that are gathered for a pass are cast in it.
  const std::vector<std::string> gathered{"precision.compute=bf16", "parallel.zero.stage=3"};
  const Plan zero = plan_fp8(gathered);
  EXPECT_EQ(fp8_kept_bytes(zero, zero.model().layout.rank(0)), 0);
  // Kept wide, not cast.
  const Plan wide = plan_fp8({"precision.keep_fp32=['*mlp*']"});
  EXPECT_EQ(fp8_kept_bytes(wide, wide.model().layout.rank(0)), 4 * 2 * (256 * 512 + 256 * 256));
}

TEST(Fp8Plan, Weights_AreTheMatricesOfLayers) {
  const Plan plan = plan_fp8({});
  const auto weights = fp8_weights(plan.model().shape, plan.model().table());
  ASSERT_EQ(weights.size(), 4U * 7);
  for (const ParamSpec* spec : weights) EXPECT_THAT(spec->name, HasSubstr("_proj.weight"));
}

TEST(Fp8Plan, OldGpus_AreRefusedByName) {
  Plan plan = plan_fp8({});
  const std::vector<Gpu> gpus{{.name = "NVIDIA H100 80GB HBM3", .major = 9, .minor = 0},
                              {.name = "NVIDIA A100-SXM4-80GB", .major = 8, .minor = 0}};
  EXPECT_NO_THROW(check_fp8_gpus(plan.resolved, gpus)) << "a run on the CPU";
  plan.resolved.run.device = "cuda";
  EXPECT_NO_THROW(check_fp8_gpus(plan.resolved, std::span(gpus).first(1)));
  try {
    check_fp8_gpus(plan.resolved, gpus);
    FAIL();
  } catch (const ConfigError& error) {
    EXPECT_THAT(error.what(),
                AllOf(HasSubstr("NVIDIA A100-SXM4-80GB of compute capability 8.0"),
                      HasSubstr("9.0 or higher"), HasSubstr("Set precision.fp8.scaling: none")));
  }
  plan.resolved.precision.fp8.scaling = "none";
  EXPECT_NO_THROW(check_fp8_gpus(plan.resolved, gpus));
}

}  // namespace
}  // namespace capstan::plan
