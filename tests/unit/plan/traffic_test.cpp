// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Traffic of one step by hand: 4 layers, hidden 256, 4 heads and 2 key/value heads of 64, micro-
// batches of 4 x 256 tokens, everything in fp32. That the engine sends the same is proven for
// random layouts in tests/ranks/equivalence.
#include <gtest/gtest.h>

#include "capstan/base/bytes.h"
#include "recipes.h"

namespace capstan::plan {
namespace {

using testing::machine;
using testing::plan_of;
using testing::resolved;

constexpr int64_t kStream = 4 * 256 * 256 * 4;  // the residual stream of a micro-batch: 1 MiB
constexpr const char* kShardGather = "dp_shard+cp/all_gather";
constexpr const char* kShardReduce = "dp_shard+cp/reduce_scatter";

void expect_traffic(const Traffic& traffic, const std::string& key, int64_t calls, int64_t bytes) {
  ASSERT_TRUE(traffic.contains(key)) << key;
  EXPECT_EQ(traffic.at(key).calls, calls) << key;
  EXPECT_EQ(traffic.at(key).bytes, bytes) << key;
}

TEST(Traffic, TensorParallelSumsTwicePerLayerAndDirection) {
  const Traffic t = plan_of(resolved({"parallel.tensor=2"}), machine(2)).traffic;
  // Per micro-batch: embedding; 4 layers x (2 forward + 2 backward); the head's input gradient;
  // largest logits, then sums and target logits, of 1,024 tokens.
  expect_traffic(t, "tp/all_reduce", 2 * (1 + 16 + 1 + 2), 2 * (18 * kStream + 3 * 1024 * 4));
  EXPECT_EQ(t.size(), 1u);
}

TEST(Traffic, RecomputeRepeatsTheForwardSumsOfLayers) {
  const Traffic t =
      plan_of(resolved({"parallel.tensor=2", "parallel.recompute.mode=block"}), machine(2)).traffic;
  expect_traffic(t, "tp/all_reduce", 2 * (1 + 24 + 1 + 2), 2 * (26 * kStream + 3 * 1024 * 4));
}

TEST(Traffic, SequenceParallelGathersAndScattersTheSameStream) {
  const Plan plan = plan_of(resolved({"parallel.tensor=2", "parallel.sequence=true"}), machine(2));
  const Traffic& t = plan.traffic;
  // Forward: embedding and 2 per layer, backward: 2 per layer and the head.
  expect_traffic(t, "tp/reduce_scatter", 2 * 18, 2 * 18 * kStream);
  // Half of the stream each: layers 2 + 2 + 2 (the input again), the head, the embedding's
  // gradient.
  expect_traffic(t, "tp/all_gather", 2 * (24 + 2), 2 * 26 * kStream / 2);
  // Norms saw half of the tokens each: 9 of 256 features in one bucket.
  expect_traffic(t, "tp/all_reduce", 2 * 2 + 1, 2 * 3 * 1024 * 4 + 9 * 256 * 4);
}

TEST(Traffic, OverlappedSequenceParallelGoesRoundPartByPart) {
  const Traffic t = plan_of(resolved({"parallel.tensor=2", "parallel.sequence=true",
                                      "parallel.sequence_overlap=true"}),
                            machine(2))
                        .traffic;
  // Per layer 2 forward and 2 backward sums, 6 gathers, each one hop; embedding and head as before.
  expect_traffic(t, "tp/send", 2 * 4 * 10, 2 * 4 * 10 * kStream / 2);
  expect_traffic(t, "tp/recv", 2 * 4 * 10, 2 * 4 * 10 * kStream / 2);
  expect_traffic(t, "tp/reduce_scatter", 2 * 2, 2 * 2 * kStream);
  expect_traffic(t, "tp/all_gather", 2 * 2, 2 * 2 * kStream / 2);
}

TEST(Traffic, GradientsTravelInTheReductionsType) {
  const auto traffic = [](std::vector<std::string> layout, const std::string& type, int ranks) {
    layout.push_back("precision.reduction=" + type);
    return plan_of(resolved(layout), machine(ranks)).traffic;
  };
  const auto half = [&](const std::vector<std::string>& layout, const std::string& key, int ranks) {
    const TrafficEntry wide = traffic(layout, "fp32", ranks).at(key),
                       narrow = traffic(layout, "bf16", ranks).at(key);
    EXPECT_EQ(narrow.calls, wide.calls) << key;
    EXPECT_EQ(narrow.bytes, wide.bytes / 2) << key;
  };
  half({}, "dp_replicate+dp_shard+cp/all_reduce", 2);
  for (const std::string stage : {"1", "2", "3"})
    half({"parallel.zero.stage=" + stage}, kShardReduce, 2);
  half({"parallel.zero.stage=3", "parallel.zero.shard_size=2", "batch.micro_samples=2"},
       "dp_replicate/all_reduce", 4);
  half({"parallel.pipeline.size=2"}, "pp/all_reduce", 2);
  // Weights, and the norms that tensor ranks sum, are no part of it.
  const auto gathers = [&](const char* type) {
    return traffic({"parallel.zero.stage=3"}, type, 2).at(kShardGather).bytes;
  };
  EXPECT_EQ(gathers("bf16"), gathers("fp32"));
  const auto norms = [&](const char* type) {
    return traffic({"parallel.tensor=2", "parallel.sequence=true"}, type, 2)
        .at("tp/all_reduce")
        .bytes;
  };
  EXPECT_EQ(norms("bf16"), norms("fp32"));
}

TEST(Traffic, CopiedKeyValueHeadsAreSummedOverTheirHolders) {
  const Traffic t = plan_of(resolved({"parallel.tensor=4"}), machine(4)).traffic;
  // Two ranks hold each of the 2 heads: 4 layers x key and value of 64 x 256, one sum per bucket.
  expect_traffic(t, "tp/all_reduce", 2 * 20 + 1,
                 2 * (18 * kStream + 3 * 1024 * 4) + 4 * 2 * 64 * 256 * 4);
}

TEST(Traffic, PipelineSendsTheStreamAndItsGradient) {
  const Plan plan = plan_of(resolved({"parallel.pipeline.size=2"}), machine(2));
  for (const int rank : {0, 1}) {
    const Traffic t = predict_traffic(plan, rank);
    expect_traffic(t, "pp/send", 2, 2 * kStream);
    expect_traffic(t, "pp/recv", 2, 2 * kStream);
    // The tied embedding is summed over both stages once a step.
    expect_traffic(t, "pp/all_reduce", 1, 8192 * 256 * 4);
  }
  const Plan untied = plan_of(
      resolved({"parallel.pipeline.size=2", "model.tie_word_embeddings=false"}), machine(2));
  EXPECT_FALSE(untied.traffic.contains("pp/all_reduce"));
}

TEST(Traffic, RingPassesKeysAndValuesOnAndTheirGradientsHome) {
  const Traffic t = plan_of(resolved({"parallel.context.size=2"}), machine(2)).traffic;
  // 512 tokens of 2 x 2 x 64 features. Per layer and micro-batch one hop forward, one backward and
  // two with gradients.
  for (const char* key : {"cp/send", "cp/recv"})
    expect_traffic(t, key, 2 * 4 * 4, 2 * 4 * 4 * 512 * 256 * 4);
  expect_traffic(t, "dp_replicate+dp_shard+cp/all_reduce", 1, 5'048'576 * 4);
}

TEST(Traffic, AllToAllExchangesHeadsForTokensAndBack) {
  const Traffic t =
      plan_of(resolved({"parallel.context.size=2", "parallel.context.method=all_to_all"}),
              machine(2))
          .traffic;
  // Query, key, value (512 features) one way, the output (256) the other; the same backward.
  expect_traffic(t, "cp/all_to_all", 2 * 4 * 4, 2 * 4 * 2 * 512 * (512 + 256) * 4);
}

TEST(Traffic, ZeroStagesReduceScatterAndGather) {
  const auto traffic = [](const std::vector<std::string>& overrides) {
    return plan_of(resolved(overrides), machine(2)).traffic;
  };
  constexpr int64_t kModel = 5'048'576 + 256;  // elements, the last norm padded to two shards
  const Traffic one = traffic({"parallel.zero.stage=1"});
  expect_traffic(one, kShardReduce, 6, kModel * 4);
  expect_traffic(one, kShardGather, 6, kModel * 4 / 2);
  // Two micro-batches: two sums of every buffer, unless one waits for the end of the step.
  const std::vector<std::string> two = {"parallel.zero.stage=2", "batch.global_samples=16"};
  expect_traffic(traffic(two), kShardReduce, 12, 2 * kModel * 4);
  expect_traffic(
      traffic({"parallel.zero.stage=2", "batch.global_samples=16", "parallel.zero.reduce=step"}),
      kShardReduce, 6, kModel * 4);
  // Stage 3: forward 6 buffers and the tied table for the head; backward head (2) and layers.
  const Traffic three = traffic({"parallel.zero.stage=3"});
  EXPECT_EQ(three.at(kShardGather).calls, 13);
  const Traffic kept =
      traffic({"parallel.zero.stage=3", "parallel.zero.reshard_after_forward=false"});
  expect_traffic(kept, kShardGather, 6, kModel * 4 / 2);
}

TEST(Traffic, HybridShardsSumOverTheReplicas) {
  const Traffic t = plan_of(resolved({"parallel.zero.stage=2", "parallel.zero.shard_size=2",
                                      "batch.global_samples=16"}),
                            machine(4))
                        .traffic;
  constexpr int64_t kModel = 5'048'576 + 256;
  expect_traffic(t, "dp_replicate/all_reduce", 6, kModel * 4 / 2);
  expect_traffic(t, kShardReduce, 6, kModel * 4);
}

TEST(Traffic, BoundariesTravelInTheResidualType) {
  const Traffic t =
      plan_of(resolved({"parallel.pipeline.size=2", "precision.compute=bf16"}), machine(2)).traffic;
  expect_traffic(t, "pp/send", 2, 2 * kStream);  // the residual stream stays fp32 on cpu
  const Traffic columns =
      plan_of(resolved({"parallel.tensor=2", "precision.compute=bf16"}), machine(2)).traffic;
  expect_traffic(columns, "tp/all_reduce", 40, 2 * (kStream + 17 * kStream / 2 + 3 * 1024 * 4));
}

}  // namespace
}  // namespace capstan::plan
