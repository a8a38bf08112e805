// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Memory, traffic and checkpoint size by hand.
#include <gtest/gtest.h>

#include "capstan/base/bytes.h"
#include "plan/resolve_internal.h"
#include "recipes.h"

namespace capstan::plan {
namespace {

using testing::machine;
using testing::plan_of;
using testing::resolved;

constexpr const char* kDenseReduce = "dp_replicate+dp_shard+cp/all_reduce";
constexpr int64_t kParameters = 5'048'576;

constexpr int64_t kNorm = 256, kLayer = 737'792, kEmbedding = 2'097'152;

// Buffers of the small model: embedding, four layers, last norm.
int64_t buffers(int64_t element) {
  return allocation_bytes(kEmbedding * element) + 4 * allocation_bytes(kLayer * element) +
         allocation_bytes(kNorm * element);
}

TEST(Memory, StatesOfAnFp32Run) {
  const MemoryReport m = plan_of(resolved(), machine(1)).memory;
  EXPECT_EQ(m.parameters, buffers(4));
  EXPECT_EQ(m.master, 0);                                     // the parameters are the master
  EXPECT_EQ(m.gradients, allocation_bytes(kParameters * 4));  // one bucket
  EXPECT_EQ(m.optimizer, 2 * buffers(4));
  EXPECT_EQ(m.communication, 0);
  EXPECT_EQ(m.peak(),
            m.parameters + m.gradients + m.optimizer + m.activations + m.workspace + m.data);
  EXPECT_EQ(m.checkpoint_snapshot, 3 * kParameters * 4);
}

TEST(Memory, StatesOfABf16Run) {
  const MemoryReport m = plan_of(resolved({"precision.compute=bf16"}), machine(2)).memory;
  EXPECT_EQ(m.parameters, buffers(2));
  EXPECT_EQ(m.master, buffers(4));
  EXPECT_EQ(m.gradients, allocation_bytes(kParameters * 4));  // one bucket
  EXPECT_EQ(m.optimizer, 2 * buffers(4));
  EXPECT_EQ(m.checkpoint_snapshot, 3 * kParameters * 4 / 2);  // two ranks share the copies
}

// Of three tensors' 4 x 5,048,576 bytes a copy lies beside a step, unless the only save is at the
// end: then beside parameters, gradients, two moments and the rotary table of 256 x 32 angles.
TEST(Memory, ACopyOfASave_LiesBesideAStepOrWhatLivesBetweenThem) {
  const auto memory = [](const std::vector<std::string>& overrides, Topology topology) {
    return plan_of(resolved(overrides), topology).memory;
  };
  const int64_t copy = allocation_bytes(3 * kParameters * 4);
  const int64_t between = 3 * buffers(4) + allocation_bytes(kParameters * 4) +
                          2 * allocation_bytes(int64_t{256} * 32 * 4);
  const MemoryReport beside = memory({"checkpoint.interval_steps=99"}, machine(1));
  EXPECT_EQ(beside.saving, beside.peak() + copy);
  EXPECT_EQ(beside.run_peak(), beside.saving);
  EXPECT_EQ(beside.needed(), beside.saving);
  for (const char* interval : {"checkpoint.interval_steps=none", "checkpoint.interval_steps=100"}) {
    const MemoryReport last = memory({interval}, machine(1));
    EXPECT_EQ(last.saving, between + copy) << interval;
    EXPECT_EQ(last.run_peak(), std::max(last.peak(), between + copy));
  }
  const MemoryReport wide =
      memory({"checkpoint.interval_steps=none", "batch.micro_samples=8"}, machine(1));
  EXPECT_EQ(wide.run_peak(), wide.peak());  // activations are more than the copy
  EXPECT_EQ(memory({"checkpoint.asynchronous=false"}, machine(1)).saving, 0);
  Topology gpu = machine(1);
  gpu.device = "cuda";
  gpu.memory_bytes = 80 * kGiB;
  const MemoryReport on_gpu = memory({"checkpoint.interval_steps=99"}, gpu);
  EXPECT_GT(on_gpu.checkpoint_snapshot, 0);
  EXPECT_EQ(on_gpu.saving, 0);  // the copy lies in host memory
}

TEST(Memory, TheLargestRankOfAPipelineCounts) {
  const Plan plan = plan_of(resolved({"parallel.pipeline.size=2", "batch.global_samples=32",
                                      "parallel.pipeline.schedule=1f1b"}),
                            machine(2));
  EXPECT_EQ(largest_run_peak(plan),
            std::max(report_memory(plan, 0).run_peak(), report_memory(plan, 1).run_peak()));
  EXPECT_NE(report_memory(plan, 0).run_peak(), report_memory(plan, 1).run_peak());
}

TEST(Memory, ShardedStatesShrink) {
  recipe::Resolved recipe = resolved({"precision.compute=bf16"});
  recipe.recipe.batch.micro_samples = 2;
  const MemoryReport whole = plan_of(recipe, machine(4, 4)).memory;
  recipe.recipe.parallel.zero.stage = 1;
  const MemoryReport one = plan_of(recipe, machine(4, 4)).memory;
  EXPECT_GE(one.parameters, whole.parameters);  // whole, padded to four shards
  EXPECT_LE(one.parameters, whole.parameters + 4096);
  EXPECT_LE(one.gradients, whole.gradients * 9 / 8);
  EXPECT_LT(one.optimizer, whole.optimizer * 3 / 10);
  EXPECT_LT(one.master, whole.master * 3 / 10);
  recipe.recipe.parallel.zero.stage = 2;
  EXPECT_LT(plan_of(recipe, machine(4, 4)).memory.gradients, whole.gradients);
  recipe.recipe.parallel.zero.stage = 3;
  EXPECT_LT(plan_of(recipe, machine(4, 4)).memory.parameters, whole.parameters);
}

TEST(Memory, ActivationsGrowWithTokensAndLayersNotWithMicroBatches) {
  const auto memory = [](const std::vector<std::string>& overrides) {
    return plan_of(resolved(overrides), machine(1)).memory;
  };
  const MemoryReport base = memory({});
  EXPECT_EQ(memory({"batch.global_samples=32"}).activations,
            base.activations);  // one stage: one in flight
  EXPECT_NEAR(static_cast<double>(memory({"batch.micro_samples=8"}).activations),
              2.0 * base.activations, 0.001 * base.activations);
  const int64_t layer = memory({"model.num_hidden_layers=5"}).activations - base.activations;
  EXPECT_EQ(memory({"model.num_hidden_layers=12"}).activations, base.activations + 8 * layer);
  // By hand, 1,024 tokens in fp32: 2 residuals, 2 norms of 256; qkv 512; attention 256;
  // gate, up, product 3 x 704; log-sum-exp of 4 heads and 2 scales.
  EXPECT_NEAR(static_cast<double>(layer), 1024.0 * 4 * (4 * 256 + 512 + 256 + 3 * 704 + 6),
              0.01 * layer);
}

// Where the peak lies depends on what is larger: the head with everything saved, a layer's
// backward, or a layer's backward while the head's gradients are being summed.
TEST(Memory, PeakIsTheLargestMomentOfTheStep) {
  const MemoryReport small_head =
      plan_of(resolved({"batch.micro_samples=8", "model.vocab_size=8192"}), machine(1)).memory;
  const ModelShape shape = plan_of(resolved(), machine(1)).model().shape;
  ActivationQuery query;
  query.tokens = 8 * 256;
  query.samples = 8;
  query.sequence_length = 256;
  const ActivationBytes bytes = find_family("llama").activation_bytes(shape, query);
  EXPECT_EQ(small_head.activations + small_head.workspace,
            4 * bytes.saved_per_layer +
                std::max(bytes.saved_head + bytes.head_workspace + query.tokens * 256 * 4,
                         bytes.layer_workspace));  // the last layer's output, until it is added
  EXPECT_EQ(small_head.communication, 0);
  // One bucket for everything is summed after the last backward, when nothing is kept any more.
  EXPECT_EQ(plan_of(resolved(), machine(2)).memory.communication, 0);
  // A small vocabulary, an untied head and small buckets: its sum is under way during the last
  // layer's backward.
  const MemoryReport early =
      plan_of(resolved({"model.tie_word_embeddings=false", "parallel.bucket_mib=1",
                        "batch.micro_samples=1", "batch.global_samples=2"}),
              machine(2))
          .memory;
  EXPECT_EQ(early.communication,
            allocation_bytes(kEmbedding * 4 + 1024) + allocation_bytes(kEmbedding * 2 + 512));
  EXPECT_LT(early.workspace, 256 * 8192 * 4);  // the moment is a layer's, not the head's
}

TEST(Memory, EarlyStagesHoldMoreInFlight) {
  const Plan plan =
      plan_of(resolved({"parallel.pipeline.size=4", "batch.global_samples=64",
                        "parallel.pipeline.split=[1, 1, 1, 1]", "parallel.pipeline.schedule=1f1b",
                        "model.tie_word_embeddings=false"}),
              machine(4));
  const int64_t layer = activation_bytes_of(plan).saved_per_layer;
  for (const int rank : {0, 1, 2}) {
    const MemoryReport m = report_memory(plan, rank);
    EXPECT_EQ(m.rank, rank);
    EXPECT_GE(m.activations, (4 - rank) * layer) << rank;
    EXPECT_LT(m.activations, (5 - rank) * layer) << rank;
  }
  // The stage of the head holds one micro-batch.
  EXPECT_LT(report_memory(plan, 3).activations, 2 * layer);
}

TEST(Memory, WeightHalvesHoldWhatTheyMultiply) {
  const auto peak = [](const char* schedule) {
    return plan_of(resolved({"parallel.pipeline.size=2", "batch.global_samples=32",
                             std::string("parallel.pipeline.schedule=") + schedule}),
                   machine(2))
        .memory.peak();
  };
  EXPECT_GT(peak("gpipe"), peak("1f1b"));
  EXPECT_GE(peak("zero_bubble"), peak("1f1b"));
  EXPECT_LT(peak("zero_bubble"), peak("gpipe"));
}

TEST(Memory, CutsFollowTheAxes) {
  const auto activations = [](const std::vector<std::string>& overrides, int ranks) {
    const Plan plan = plan_of(resolved(overrides), machine(ranks));
    return static_cast<double>(activation_bytes_of(plan).saved_per_layer);
  };
  const double whole = activations({}, 1);
  // Split features are halved, the residual stream (4 x 256 of 3,910 features) is not.
  EXPECT_NEAR(activations({"parallel.tensor=2"}, 2) / whole, 0.5 * (1 + 1026.0 / 3910), 0.01);
  EXPECT_NEAR(activations({"parallel.tensor=2", "parallel.sequence=true"}, 2) / whole, 0.5, 0.01);
  EXPECT_NEAR(activations({"parallel.context.size=2"}, 2) / whole, 0.5, 0.01);
}

TEST(Memory, RecomputeKeepsTheInputsOfLayers) {
  const auto memory = [](const std::vector<std::string>& overrides) {
    return plan_of(resolved(overrides), machine(1)).memory;
  };
  const std::vector<std::string> deep = {"model.num_hidden_layers=16", "model.vocab_size=8192"};
  const int64_t all = memory(deep).activations;
  const int64_t inputs = memory({deep[0], deep[1], "parallel.recompute.mode=block"}).activations;
  EXPECT_LT(inputs, all / 4);
  EXPECT_GE(inputs, 15 * 2 * 1024 * 256 * 4);
}

TEST(Memory, OffloadKeepsItsOwnMasterAndGradient) {
  const MemoryReport here = plan_of(resolved({"parallel.zero.stage=3"}), machine(2)).memory;
  const MemoryReport away =
      plan_of(resolved({"parallel.zero.stage=3", "parallel.zero.offload=all"}), machine(2)).memory;
  EXPECT_EQ(here.master, 0);
  // Half of the model each, as large as its allocations.
  for (const int64_t bytes : {away.master, away.gradients - here.gradients}) {
    EXPECT_GE(bytes, kParameters * 4 / 2);
    EXPECT_LE(bytes, kParameters * 4 / 2 * 21 / 20);
  }
}

// Llama 405B on 512 ranks: tensor 8 x pipeline 16 x data 4.
TEST(Memory, LargeWorldsArePlannedRankByRank) {
  Topology world = machine(512);
  world.local_size = 8;
  world.memory_bytes = 0;
  const Plan plan =
      make_plan(resolved({"model.hidden_size=16384", "model.intermediate_size=53248",
                          "model.num_hidden_layers=126", "model.num_attention_heads=128",
                          "model.num_key_value_heads=8", "model.vocab_size=128256",
                          "model.tie_word_embeddings=false", "precision.compute=bf16",
                          "precision.residual=bf16", "batch.sequence_length=8192",
                          "batch.global_samples=512", "batch.micro_samples=1", "parallel.tensor=8",
                          "parallel.sequence=true", "parallel.pipeline.size=16",
                          "parallel.pipeline.schedule=1f1b", "parallel.zero.stage=1"}),
                world, {});
  EXPECT_EQ(plan.model().parameters, 405'853'388'800);
  EXPECT_EQ(plan.grid.data_parallel_size(), 4);
  double elements = 0;
  for (int pp = 0; pp < 16; ++pp) {
    const int rank = plan.grid.rank_of({.pp = pp});
    const MemoryReport m = report_memory(plan, rank);
    elements += static_cast<double>(m.optimizer) / 8;  // a quarter of two moments in fp32
    EXPECT_LT(m.peak(), int64_t{1} << 37) << rank;
  }
  // 8 layers x 128 micro-batches x 6 gathers of an eighth of the stream in bf16.
  EXPECT_EQ(predict_traffic(plan, 32).at("tp/all_gather").bytes,
            int64_t{8} * 128 * 6 * 1024 * 16384 * 2);
  EXPECT_NEAR(elements * 4 * 8, 405.85e9, 0.02e12);
  EXPECT_GT(describe_plan(plan).size(), 4000u);
}

TEST(Memory, EveryRankReportsTheSameInDataParallel) {
  const Plan plan = plan_of(resolved(), machine(2));
  EXPECT_EQ(plan.model().layout.rank(0).buffers.size(), plan.model().layout.rank(1).buffers.size());
  EXPECT_EQ(plan.memory.rank, 0);
}

TEST(Traffic, OneAllReducePerBucket) {
  const Plan plan = plan_of(resolved(), machine(2));
  ASSERT_EQ(plan.traffic.size(), 1u);
  const TrafficEntry entry = plan.traffic.at(kDenseReduce);
  EXPECT_EQ(entry.calls, 1);  // 20.2 MB fit into one bucket of 25 MiB
  EXPECT_EQ(entry.bytes, kParameters * 4);
  const Plan small = plan_of(resolved({"parallel.bucket_mib=1"}), machine(2));
  EXPECT_EQ(small.traffic.at(kDenseReduce).calls, 6);  // a buffer is never cut
  EXPECT_EQ(small.traffic.at(kDenseReduce).bytes, kParameters * 4);
  // Gradients travel in their own type, whatever is computed in.
  const Plan half = plan_of(resolved({"precision.compute=bf16"}), machine(2));
  EXPECT_EQ(half.traffic.at(kDenseReduce).bytes, kParameters * 4);
  // More micro-batches: still once per step.
  EXPECT_EQ(
      plan_of(resolved({"batch.global_samples=64"}), machine(2)).traffic.at(kDenseReduce).calls, 1);
}

TEST(Traffic, OneRankIsSilent) { EXPECT_TRUE(plan_of(resolved(), machine(1)).traffic.empty()); }

TEST(Checkpoint, HoldsWeightsAndTwoMoments) {
  const Plan plan = plan_of(resolved(), machine(1));
  EXPECT_GT(plan.checkpoint_bytes, 3 * kParameters * 4);
  EXPECT_LT(plan.checkpoint_bytes, 3 * kParameters * 4 + 8 * kMiB);
}

TEST(Flops, TrainingIsThreeForwards) {
  const Plan plan = plan_of(resolved(), machine(2));
  const double forward = 2.0 * 4 * 737'280 + 4.0 * 4 * 256 * 128.5 + 2.0 * 256 * 8192;
  EXPECT_EQ(plan.flops.per_token, 3 * forward);
  EXPECT_EQ(plan.flops.convention, "causal");
}

}  // namespace
}  // namespace capstan::plan
