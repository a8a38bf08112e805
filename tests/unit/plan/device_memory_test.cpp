// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What a GPU holds beside tensors, by hand.
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

#include "capstan/base/bytes.h"
#include "capstan/plan/host_slabs.h"
#include "capstan/recipe/load.h"
#include "plan/memory_internal.h"
#include "plan/resolve_internal.h"
#include "recipes.h"

namespace capstan::plan {
namespace {

using ::testing::HasSubstr;
using testing::machine;
using ::testing::Not;
using testing::plan_of;
using testing::problems_of;
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
  EXPECT_EQ(m.needed(), m.run_peak());
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
    for (const std::string& words : {std::string("on the GPU of a rank"),
                                     "device " + format_bytes(m.device), std::string("out of")})
      EXPECT_THAT(error.what(), HasSubstr(words));
  }
}

// Stages of a pipeline need different amounts: what one leaves free on its GPU is no use to
// another.
TEST(DeviceMemory, EachRankHasItsOwnGpu) {
  const auto recipe = resolved({"parallel.pipeline.size=2", "parallel.pipeline.schedule=1f1b",
                                "model.tie_word_embeddings=false", "batch.micro_samples=1"});
  Topology topology = gpus(2);
  const Plan plan = plan_of(recipe, topology);
  const int64_t first = plan.memory.needed(), last = report_memory(plan, 1).needed();
  ASSERT_NE(first, last);
  const int64_t largest = std::max(first, last);
  topology.memory_bytes = 2 * largest;
  EXPECT_NO_THROW((void)plan_of(recipe, topology));
  topology.memory_bytes = 2 * largest - 2;
  ASSERT_GT(topology.memory_bytes, first + last);
  const auto problems = problems_of(recipe, topology);
  ASSERT_EQ(problems.size(), 1U);
  for (const std::string& words :
       {fmt::format("{} on rank {}", format_bytes(largest), first > last ? 0 : 1),
        std::string("on the GPU of a rank")})
    EXPECT_THAT(problems[0].text(), HasSubstr(words));
  EXPECT_THAT(problems[0].text(), Not(HasSubstr("fewer ranks")));
}

// The ways that are named are open: what is done already, or not with this recipe, is none.
TEST(DeviceMemory, WaysToFitAreOpen) {
  const auto fix = [](std::vector<std::string> overrides, int ranks) {
    Topology topology = gpus(ranks);
    topology.memory_bytes = ranks * 600 * kMiB;  // hardly more than what is no tensor
    overrides.emplace_back("model.hidden_size=4096");
    const auto problems = problems_of(resolved(overrides), topology);
    EXPECT_EQ(problems.size(), 1U);
    return problems.empty() ? "" : problems[0].fix;
  };
  EXPECT_EQ(fix({}, 1),
            "Make the model smaller, or set optimizer.moments: bf16 or int8, or set "
            "parallel.zero.offload: optimizer");
  EXPECT_EQ(fix({"run.graphs=true", "optimizer.moments=bf16"}, 1), "Make the model smaller");
  EXPECT_EQ(fix({"optimizer.moments=bf16"}, 2),
            "Make the model smaller, or raise parallel.zero.stage, or set "
            "parallel.zero.offload: optimizer");
  EXPECT_EQ(fix({"batch.micro_samples=512", "batch.global_samples=512"}, 1),
            "Lower batch.micro_samples or batch.sequence_length, or set "
            "parallel.recompute.mode: block");
}

// By hand: 1 MiB, which is full; as much again; 2 MiB; and what is larger than all before.
TEST(HostSlabs, DoubleAndAreRoundedToPowersOfTwo) {
  const auto slabs = [](const std::vector<int64_t>& requests) { return host_slab_bytes(requests); };
  EXPECT_EQ(slabs({}), 0);
  EXPECT_EQ(slabs({1}), kMiB);
  EXPECT_EQ(slabs({kMiB / 2, kMiB / 2}), kMiB);
  EXPECT_EQ(slabs({kMiB / 2, kMiB / 2, 1}), 2 * kMiB);
  EXPECT_EQ(slabs({kMiB, kMiB, 1}), 4 * kMiB);
  EXPECT_EQ(slabs({700 * kKiB, 700 * kKiB, 300 * kKiB}),
            2 * kMiB);                            // the third in the first's hole
  EXPECT_EQ(slabs({kMiB - 511, 512}), 2 * kMiB);  // multiples of 512
  EXPECT_EQ(slabs({5 * kGiB}), 8 * kGiB);
  EXPECT_EQ(slabs({8 * kGiB, 1}), 9 * kGiB);  // no more than 1 GiB unless it is asked for
}

std::vector<std::string> offloading(const std::string& offload) {
  return {"parallel.zero.stage=3", "parallel.zero.offload=" + offload,
          "checkpoint.asynchronous=false"};
}

TEST(HostMemory, IsWhatSlabsTake) {
  const MemoryReport none = plan_of(resolved(offloading("none")), gpus(2)).memory;
  EXPECT_EQ(none.host_taken, 0);
  const MemoryReport m = plan_of(resolved(offloading("optimizer")), gpus(2)).memory;
  // Moments are not pinned; the rest is, in slabs that are at most twice as much and one more.
  EXPECT_GE(m.host_taken, m.host * 7 / 8);
  EXPECT_LT(m.host_taken, 2 * m.host + kMiB);
  EXPECT_EQ((m.host_taken - m.optimizer) % kMiB, 0);
  auto more = offloading("optimizer");
  more.emplace_back("parallel.offload_activations=true");
  EXPECT_GT(plan_of(resolved(more), gpus(2)).memory.host_taken, m.host_taken);
  more.back() = "checkpoint.asynchronous=true";
  const MemoryReport saving = plan_of(resolved(more), gpus(2)).memory;
  EXPECT_GT(saving.checkpoint_snapshot, 0);
  EXPECT_EQ(saving.host_taken, m.host_taken + saving.checkpoint_snapshot);
  EXPECT_EQ(plan_of(resolved(more), machine(2)).memory.host_taken, 0);  // all is host memory there
}

TEST(HostMemory, AHostThatIsTooSmall_IsRefused) {
  Topology topology = gpus(2);
  const MemoryReport m = plan_of(resolved(offloading("optimizer")), topology).memory;
  topology.host_memory_bytes = 2 * m.host_taken;
  EXPECT_NO_THROW((void)plan_of(resolved(offloading("optimizer")), topology));
  --topology.host_memory_bytes;
  try {
    (void)plan_of(resolved(offloading("optimizer")), topology);
    FAIL() << "a plan beyond the host";
  } catch (const recipe::RecipeError& error) {
    for (const std::string& words :
         {std::string("parallel.zero.offload"), "2 ranks here x " + format_bytes(m.host_taken),
          std::string("beside the GPUs of this host"), std::string("powers of two"),
          std::string("parallel.zero.offload: none")})
      EXPECT_THAT(error.what(), HasSubstr(words));
  }
  EXPECT_NO_THROW((void)plan_of(resolved(offloading("none")), topology));
}

TEST(HostMemory, ThePageShowsIt) {
  const Plan plan = plan_of(resolved(offloading("optimizer")), gpus(2));
  EXPECT_THAT(describe_plan(plan), HasSubstr("slabs of powers of two"));
  EXPECT_THAT(describe_plan(plan), HasSubstr(format_bytes(plan.memory.host_taken)));
  EXPECT_THAT(plan_json(plan), HasSubstr("\"host_taken\""));
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
