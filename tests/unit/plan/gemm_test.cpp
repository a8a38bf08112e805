// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// run.gemm: what auto becomes, and where cuBLASLt is no case.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "recipes.h"

namespace capstan::plan {
namespace {

using ::testing::HasSubstr;
using testing::machine;
using testing::plan_of;
using testing::resolved;

Topology gpu() {
  Topology topology = machine(1);
  topology.device = "cuda";
  topology.fast_bf16 = true;
  topology.memory_bytes = int64_t{80} << 30;
  return topology;
}

const std::vector<std::string> kExperts = {"model.family=moe", "model.experts.count=4"};

TEST(PlanGemm, AutoIsChosenWhereThereIsAChoice) {
  const auto chosen = [](const std::vector<std::string>& overrides) {
    return plan_of(resolved(overrides), gpu()).resolved.run.gemm;
  };
  EXPECT_EQ(chosen({}), "auto");
  EXPECT_EQ(chosen({"run.gemm=cublaslt"}), "cublaslt");
  EXPECT_EQ(chosen({"run.gemm=cublaslt", "run.deterministic=true"}), "cublaslt");
  EXPECT_EQ(chosen({"precision.compute=fp32"}), "libtorch");
  EXPECT_EQ(chosen(kExperts), "libtorch");
  EXPECT_EQ(chosen({"run.deterministic=true", "precision.fp8.scaling=tensor"}), "cublaslt");
  const Plan same_bits = plan_of(resolved({"run.deterministic=true"}), gpu());
  EXPECT_EQ(same_bits.resolved.run.gemm, "libtorch");
  EXPECT_THAT(same_bits.choices, ::testing::Contains(HasSubstr("depends on the clock")));
  const Plan on_cpu = plan_of(resolved(), machine(1));
  EXPECT_EQ(on_cpu.resolved.run.gemm, "auto");
  EXPECT_THAT(on_cpu.choices, ::testing::Not(::testing::Contains(HasSubstr("run.gemm"))));
}

TEST(PlanGemm, AWishIsRefusedByName) {
  const auto why = [](std::vector<std::string> overrides, const Topology& topology) {
    overrides.emplace_back("run.gemm=cublaslt");
    try {
      (void)plan_of(resolved(overrides), topology);
    } catch (const recipe::RecipeError& error) {
      EXPECT_EQ(error.problems().size(), 1U) << error.what();
      EXPECT_EQ(error.problems().at(0).key, "run.gemm");
      return error.problems().at(0).text();
    }
    return std::string();
  };
  EXPECT_THAT(why({}, machine(1)), HasSubstr("cuBLASLt is a GPU's"));
  EXPECT_THAT(why(kExperts, gpu()), HasSubstr("expert"));
  EXPECT_THAT(why({"precision.compute=fp64"}, gpu()), HasSubstr("products of fp64"));
}

}  // namespace
}  // namespace capstan::plan
