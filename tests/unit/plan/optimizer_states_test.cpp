// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What optimizers keep, and which parameters hold 8-bit states.
#include "capstan/plan/optimizer_states.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "recipes.h"

namespace capstan::plan {
namespace {

using ::testing::HasSubstr;
using testing::plan_of;
using testing::resolved;

std::string list(const std::string& name, const std::string& moments, DType master,
                 UpdateKind update = UpdateKind::kElementwise) {
  recipe::Optimizer optimizer;
  optimizer.name = name;
  optimizer.moments = moments;
  std::string text;
  for (const StateSpec& state : optimizer_states(optimizer, master, update))
    text += state.kind + " " + std::string(name_of(state.dtype)) + " " +
            std::to_string(state.block) + "; ";
  return text;
}

TEST(OptimizerStates, AreOneTable) {
  EXPECT_EQ(list("adamw", "auto", DType::kFp32), "exp_avg fp32 1; exp_avg_sq fp32 1; ");
  EXPECT_EQ(list("adamw", "auto", DType::kFp64), "exp_avg fp64 1; exp_avg_sq fp64 1; ");
  EXPECT_EQ(list("lion", "auto", DType::kFp32), "exp_avg fp32 1; ");
  EXPECT_EQ(list("lion", "bf16", DType::kFp32), "exp_avg bf16 1; ");
  EXPECT_EQ(list("sophia", "auto", DType::kFp32), "exp_avg fp32 1; hessian fp32 1; ");
  EXPECT_EQ(list("sophia", "bf16", DType::kFp32), "exp_avg bf16 1; hessian bf16 1; ");
  EXPECT_EQ(list("lion", "int8", DType::kFp32, UpdateKind::kRowBlock),
            "exp_avg uint8 1; exp_avg_scale fp32 256; ");
  EXPECT_EQ(list("sophia", "int8", DType::kFp32, UpdateKind::kRowBlock),
            "exp_avg uint8 1; exp_avg_scale fp32 256; hessian uint8 1; hessian_scale fp32 256; ");
  EXPECT_EQ(list("adamw", "int8", DType::kFp32), list("adamw", "auto", DType::kFp32));
  EXPECT_EQ(list("adamw", "int8", DType::kFp32, UpdateKind::kRowBlock),
            "exp_avg uint8 1; exp_avg_scale fp32 256; "
            "exp_avg_sq uint8 1; exp_avg_sq_scale fp32 256; ");
}

TEST(OptimizerStates, WhatIsRoundedByRandomBits) {
  const auto rounds = [](const char* name, const char* moments) {
    recipe::Optimizer optimizer;
    optimizer.name = name;
    optimizer.moments = moments;
    return rounds_by_index(optimizer);
  };
  EXPECT_TRUE(rounds("adamw", "bf16"));
  EXPECT_TRUE(rounds("sophia", "int8"));
  EXPECT_FALSE(rounds("sophia", "auto"));
  EXPECT_FALSE(rounds("lion", "int8"));
}

std::vector<std::string> in_blocks(const Plan& plan) {
  std::vector<std::string> names;
  for (const ParamSpec& spec : plan.model().table())
    if (spec.update == UpdateKind::kRowBlock && spec.name.find("layers.0") != std::string::npos)
      names.push_back(spec.name.substr(spec.name.find("layers.0") + 9));
  return names;
}

TEST(OptimizerStates, EightBits_AreForMatricesWithRowsOfBlocks) {
  const Plan plan = plan_of(resolved({"optimizer.moments=int8"}), testing::machine(1));
  EXPECT_THAT(in_blocks(plan),
              ::testing::UnorderedElementsAre("self_attn.q_proj.weight", "self_attn.k_proj.weight",
                                              "self_attn.v_proj.weight", "self_attn.o_proj.weight",
                                              "mlp.gate_proj.weight", "mlp.up_proj.weight"))
      << "rows of 704 elements are no whole blocks";
  EXPECT_EQ(plan.model().table().front().update, UpdateKind::kElementwise) << "the embedding";
  EXPECT_THAT(
      describe_plan(plan),
      HasSubstr("exp_avg uint8, exp_avg_sq uint8 of 44.1 % of the parameters, exp_avg fp32, "
                "exp_avg_sq fp32 of the others"));
}

TEST(OptimizerStates, Units_AreTreatedAlike) {
  recipe::Optimizer optimizer;
  optimizer.moments = "int8";
  std::vector<ParamSpec> table(3);
  for (size_t i = 0; i < 3; ++i) {
    table[i].name = std::string(1, static_cast<char>('a' + i));
    table[i].shape = {i == 1 ? 2 : 64, 256};  // the second is too small
    table[i].block = 1;
    table[i].fuse_group = i < 2 ? 0 : -1;
  }
  table = mark_row_blocks(table, optimizer);
  EXPECT_EQ(table[0].update, UpdateKind::kElementwise) << "one product reads it with a small one";
  EXPECT_EQ(table[1].update, UpdateKind::kElementwise);
  EXPECT_EQ(table[2].update, UpdateKind::kRowBlock);
  table[2].update = UpdateKind::kElementwise;
  table[2].trainable = false;
  EXPECT_EQ(mark_row_blocks(table, optimizer)[2].update, UpdateKind::kElementwise);
}

TEST(OptimizerStates, ShardsEndWithBlocks) {
  const Plan plan = plan_of(
      resolved({"optimizer.moments=int8", "parallel.zero.stage=2", "batch.global_samples=32"}),
      testing::machine(8));
  for (const FlatBuffer& buffer : plan.model().layout.rank(3).buffers) {
    if (buffer.update != UpdateKind::kRowBlock) continue;
    EXPECT_EQ(buffer.shards, 8);
    EXPECT_EQ(buffer.shard_numel() % kStateBlock, 0);
    for (const LocalParam& param : buffer.params) {
      EXPECT_EQ(param.flat_begin % kStateBlock, 0);
      EXPECT_EQ(param.local_shape.back() % kStateBlock, 0);
    }
  }
}

int64_t optimizer_bytes(const std::vector<std::string>& overrides) {
  return plan_of(resolved(overrides), testing::machine(1)).memory.optimizer;
}

TEST(OptimizerStates, MemoryFollowsTheTable) {
  const double two = static_cast<double>(optimizer_bytes({}));
  EXPECT_NEAR(static_cast<double>(optimizer_bytes({"optimizer.name=lion"})) / two, 0.5, 1e-3);
  EXPECT_NEAR(static_cast<double>(optimizer_bytes({"optimizer.moments=bf16"})) / two, 0.5, 1e-2);
  // 44.1 % of the parameters at a quarter and 1/256 of their bytes.
  EXPECT_NEAR(static_cast<double>(optimizer_bytes({"optimizer.moments=int8"})) / two,
              1 - 0.441 * (1 - 0.25 - 1.0 / 256), 2e-2);
  for (const char* moments :
       {"optimizer.moments=auto", "optimizer.moments=bf16", "optimizer.moments=int8"}) {
    const int64_t adamw = optimizer_bytes({moments});
    EXPECT_EQ(optimizer_bytes({moments, "optimizer.name=sophia"}), adamw) << moments;
    EXPECT_EQ(2 * optimizer_bytes({moments, "optimizer.name=lion"}), adamw) << moments;
  }
}

TEST(OptimizerStates, CheckpointsFollowTheTable) {
  const auto saved = [](const std::vector<std::string>& overrides) {
    return plan_of(resolved(overrides), testing::machine(1)).checkpoint_bytes;
  };
  const int64_t parameters = plan_of(resolved(), testing::machine(1)).model().parameters;
  EXPECT_EQ(saved({}) - saved({"optimizer.name=lion"}), 4 * parameters);
  EXPECT_EQ(saved({}) - saved({"optimizer.moments=bf16"}), 4 * parameters);
}

std::string refusal(const std::vector<std::string>& overrides, int ranks) {
  try {
    (void)plan_of(resolved(overrides), testing::machine(ranks, ranks));
  } catch (const recipe::RecipeError& error) {
    return error.what();
  }
  return "";
}

TEST(OptimizerStates, TensorRanksThatTearBlocks_AreRefused) {
  const std::string text = refusal({"optimizer.moments=int8", "parallel.tensor=2"}, 2);
  EXPECT_THAT(text, HasSubstr("parallel.tensor"));
  EXPECT_THAT(text, HasSubstr("self_attn.o_proj.weight"));
  EXPECT_THAT(text, HasSubstr("optimizer.moments: bf16"));
  EXPECT_EQ(refusal({"optimizer.moments=int8", "parallel.tensor=2", "model.hidden_size=512",
                     "model.num_attention_heads=8"},
                    2),
            "");
}

TEST(OptimizerStates, ModelWithoutBlocks_IsRefused) {
  EXPECT_THAT(refusal({"optimizer.moments=int8", "model.hidden_size=192"}, 1),
              HasSubstr("no trained parameter outside of the embedding"));
}

}  // namespace
}  // namespace capstan::plan
