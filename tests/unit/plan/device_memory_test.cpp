// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What a GPU holds beside tensors, by hand.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "capstan/base/bytes.h"
#include "capstan/recipe/load.h"
#include "recipes.h"

namespace capstan::plan {
namespace {

using ::testing::HasSubstr;
using testing::machine;
using ::testing::Not;
using testing::plan_of;
using testing::resolved;

// Of LibTorch's two threads and one of cuBLASLt's algorithms.
constexpr int64_t kContext = 512 * kMiB, kCublas = 3 * 32 * kMiB,
                  kCommunicator = 16 * (4 * kMiB + 4800 * kKiB + 512 * kKiB);

Topology gpus(int ranks) {
  Topology topology = machine(ranks, 16);
  topology.device = "cuda";
  topology.fast_bf16 = true;
  topology.memory_bytes = ranks * 80 * kGiB;
  return topology;
}

int64_t device_of(const std::vector<std::string>& overrides, int ranks, int rank = 0) {
  return report_memory(plan_of(resolved(overrides), gpus(ranks)), rank).device;
}

TEST(DeviceMemory, NoneOnTheCpu) {
  const MemoryReport m = plan_of(resolved(), machine(2)).memory;
  EXPECT_EQ(m.device, 0);
  EXPECT_EQ(m.host, 0);
  EXPECT_EQ(m.needed(), m.peak());
}

TEST(DeviceMemory, OneGpu_HasAContextAndWorkspaces) {
  const MemoryReport m = plan_of(resolved(), gpus(1)).memory;
  EXPECT_EQ(m.device, kContext + kCublas);
  EXPECT_EQ(m.needed(), m.peak() + m.device);
}

TEST(DeviceMemory, LibTorchAlone_HasNoWorkspaceOfCublasLt) {
  EXPECT_EQ(device_of({"run.gemm=libtorch"}, 1), kContext + kCublas - 32 * kMiB);
}

// Steps before the recording leave it theirs; evaluation takes its own beside it.
TEST(DeviceMemory, Graphs_HaveTheActivationsOfSteps) {
  const MemoryReport m = plan_of(resolved({"run.graphs=true"}), gpus(1)).memory;
  EXPECT_EQ(m.device, kContext + 2 * kCublas + m.workspace);
}

TEST(DeviceMemory, EveryCommunicatorHasBuffers) {
  const int64_t alone = kContext + kCublas;
  const auto communicators = [&](const std::vector<std::string>& overrides, int ranks,
                                 int rank = 0) {
    return (device_of(overrides, ranks, rank) - alone) / kCommunicator;
  };
  EXPECT_EQ(communicators({}, 2), 1 + 1);                     // all ranks, replicas
  EXPECT_EQ(communicators({"parallel.tensor=2"}, 2), 1 + 2);  // tp, and edp_shard, which folds it
  // A stage talks both ways with each neighbour; the middle one has two.
  const std::vector<std::string> stages = {"parallel.pipeline.size=4"};
  EXPECT_EQ(communicators(stages, 4, 0), 1 + 1 + 2);
  EXPECT_EQ(communicators(stages, 4, 1), 1 + 1 + 4);
  EXPECT_EQ(communicators(stages, 4, 3), 1 + 1 + 2);
  const std::vector<std::string> ring = {"parallel.context.size=2"};
  EXPECT_EQ(communicators({"parallel.context.size=2", "parallel.context.method=all_to_all"}, 2) + 2,
            communicators(ring, 2));
}

TEST(DeviceMemory, WhatIsOffloadedLiesOnTheHost) {
  const auto memory = [](const std::string& offload) {
    return plan_of(resolved({"parallel.zero.stage=3", "parallel.zero.offload=" + offload}), gpus(2))
        .memory;
  };
  const MemoryReport optimizer = memory("optimizer"), all = memory("all");
  EXPECT_EQ(memory("none").host, 0);
  const int64_t states = optimizer.master + optimizer.optimizer + optimizer.master / 2;
  EXPECT_GE(optimizer.host, states);
  EXPECT_LT(optimizer.host, states + optimizer.gradients);
  // The values lie there, or pass through: bf16 beside fp32.
  EXPECT_EQ(all.host, optimizer.host);
  EXPECT_EQ(optimizer.needed() - all.needed(), optimizer.parameters - all.parameters);
  EXPECT_EQ(all.needed(), all.peak() + all.device - all.host);
}

// The tensors alone would fit.
TEST(DeviceMemory, AGpuThatIsTooSmall_IsRefused) {
  Topology topology = gpus(1);
  const MemoryReport m = plan_of(resolved(), topology).memory;
  topology.memory_bytes = m.needed();
  EXPECT_NO_THROW((void)plan_of(resolved(), topology));
  topology.memory_bytes = m.needed() - 1;
  ASSERT_GT(topology.memory_bytes, m.peak());
  try {
    (void)plan_of(resolved(), topology);
    FAIL() << "a plan beyond the GPU";
  } catch (const recipe::RecipeError& error) {
    for (const std::string& words : {std::string("on the GPUs of this host"),
                                     "device " + format_bytes(m.device), std::string("out of")})
      EXPECT_THAT(error.what(), HasSubstr(words));
  }
}

TEST(DeviceMemory, ThePageShowsIt) {
  EXPECT_THAT(describe_plan(plan_of(resolved(), machine(1))), Not(HasSubstr("CUDA context")));
  const Plan plan = plan_of(resolved(), gpus(1));
  const std::string page = describe_plan(plan);
  for (const std::string& words :
       {format_bytes(plan.memory.needed()) + " predicted on the GPU of rank 0",
        std::string("assumed, not measured")})
    EXPECT_THAT(page, HasSubstr(words));
  EXPECT_THAT(plan_json(plan), HasSubstr("\"device\""));
}

}  // namespace
}  // namespace capstan::plan
