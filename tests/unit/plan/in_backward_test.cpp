// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// optimizer.in_backward: what it goes with, and whose gradients share memory.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "capstan/plan/gradient_places.h"
#include "recipes.h"

namespace capstan::plan {
namespace {

using ::testing::HasSubstr;
using testing::machine;
using testing::plan_of;
using testing::resolved;

TEST(OptimizerInBackward, IsRefusedByName) {
  const std::vector<std::string> legal = {"optimizer.in_backward=true",
                                          "optimizer.max_grad_norm=none", "batch.micro_samples=8",
                                          "model.tie_word_embeddings=false"};
  const auto with = [&](std::vector<std::string> more) {
    more.insert(more.begin(), legal.begin(), legal.end());
    return resolved(more);
  };
  const Plan plan = plan_of(with({}), machine(1));
  EXPECT_EQ(plan.batch.micro_batches, 1);
  EXPECT_LT(plan.memory.gradients,
            plan_of(with({"optimizer.in_backward=false"}), machine(1)).memory.gradients / 2);
  const auto why = [&](std::vector<std::string> more, int ranks = 1) -> std::string {
    try {
      (void)plan_of(with(std::move(more)), machine(ranks));
    } catch (const recipe::RecipeError& e) {
      EXPECT_EQ(e.problems().size(), 1U) << e.what();
      EXPECT_EQ(e.problems().at(0).key, "optimizer.in_backward");
      return e.problems().at(0).text();
    }
    return "accepted";
  };
  EXPECT_EQ(why({"optimizer.name=sophia"}), "accepted");
  EXPECT_THAT(why({"optimizer.max_grad_norm=1.0"}), HasSubstr("Set optimizer.max_grad_norm: none"));
  EXPECT_THAT(why({"optimizer.spike_skip.sigma=6"}), HasSubstr("spike_skip.sigma: none"));
  EXPECT_THAT(why({"precision.compute=fp16"}), HasSubstr("precision.loss_scale"));
  EXPECT_THAT(why({"batch.micro_samples=2"}),
              HasSubstr("Set batch.global_samples: 2 or batch.micro_samples: 8"));
  EXPECT_THAT(why({"parallel.pipeline.schedule=zero_bubble"}), HasSubstr("zero_bubble"));
  EXPECT_THAT(why({"parallel.pipeline.size=2"}, 2), HasSubstr("parallel.pipeline.size: 1"));
  EXPECT_THAT(why({"parallel.zero.offload=optimizer"}), HasSubstr("zero.offload: none"));
  Topology gpu = machine(1);
  gpu.device = "cuda";
  EXPECT_TRUE(plan_of(with({"run.graphs=true"}), gpu).resolved.run.graphs);
}

// Buffers of a block side by side, those of another block over them, a tied table apart.
TEST(OptimizerInBackward, BlocksShareGradientMemory) {
  for (const bool tied : {false, true}) {
    const Plan plan = plan_of(
        resolved({tied ? "model.tie_word_embeddings=true" : "model.tie_word_embeddings=false",
                  "optimizer.moments=int8", "model.frozen=['*.3.*']"}),
        machine(1));
    const RankLayout layout = plan.model().layout.rank(0);
    const SharedGradients shared = share_gradients(layout, tied, 0);
    int64_t layers_end = 0;
    for (size_t a = 0; a < layout.buffers.size(); ++a) {
      const FlatBuffer& one = layout.buffers[a];
      if (!one.trainable) continue;
      const int64_t end = shared.begin[a] + one.numel;
      EXPECT_LE(end, shared.numel);
      if (one.block > 0) layers_end = std::max(layers_end, end);
      for (size_t b = 0; b < a; ++b) {
        const FlatBuffer& other = layout.buffers[b];
        const bool meets = shared.begin[b] < end && shared.begin[a] < shared.begin[b] + other.numel;
        const bool apart = other.block == one.block || (tied && other.block == 0);
        if (other.trainable && apart) {
          EXPECT_FALSE(meets) << a << " and " << b;
        }
      }
    }
    const int64_t table = layout.buffers.front().numel;
    EXPECT_EQ(shared.numel, tied ? layers_end + table : std::max(layers_end, table));
  }
}

// What a block wrote is on its way to other ranks while the next block writes.
TEST(OptimizerInBackward, NeighboursHavePlacesApartWhereSumsTravel) {
  for (const int stage : {0, 1, 3})
    for (const bool tied : {true, false}) {
      const Plan plan = plan_of(
          resolved({"optimizer.in_backward=true", "optimizer.max_grad_norm=none",
                    "batch.micro_samples=4", "optimizer.moments=int8", "model.frozen=['*.2.*']",
                    std::string("model.tie_word_embeddings=") + (tied ? "true" : "false"),
                    "parallel.zero.stage=" + std::to_string(stage)}),
          machine(2));
      const RankLayout layout = plan.model().layout.rank(0);
      ASSERT_TRUE(sums_over_ranks(plan.grid, layout));
      const SharedGradients places = place_gradients(plan.grid, layout, tied, stage),
                            shared = share_gradients(layout, tied, stage);
      EXPECT_GT(places.numel, shared.numel);
      EXPECT_LE(places.numel, 2 * shared.numel);
      const auto kept = [&](const FlatBuffer& b) { return stage >= 2 ? b.shard_numel() : b.numel; };
      for (size_t a = 0; a < layout.buffers.size(); ++a)
        for (size_t b = 0; b < a; ++b) {
          const FlatBuffer &one = layout.buffers[a], &other = layout.buffers[b];
          if (!one.trainable || !other.trainable) continue;
          EXPECT_LE(places.begin[a] + kept(one), places.numel);
          const bool meets = places.begin[b] < places.begin[a] + kept(one) &&
                             places.begin[a] < places.begin[b] + kept(other);
          // Block 3, whose number in the list of parameters is 2, is frozen.
          const int distance = one.block - other.block - (one.block > 3 && other.block < 3 ? 1 : 0);
          if (distance <= 1 || (tied && other.block == 0)) {
            EXPECT_FALSE(meets) << one.block << " and " << other.block;
          }
        }
    }
}

TEST(OptimizerInBackward, OneRank_HasOnePlace) {
  const Plan plan = plan_of(resolved({"optimizer.in_backward=true", "optimizer.max_grad_norm=none",
                                      "batch.micro_samples=8"}),
                            machine(1));
  const RankLayout layout = plan.model().layout.rank(0);
  EXPECT_FALSE(sums_over_ranks(plan.grid, layout));
  EXPECT_EQ(place_gradients(plan.grid, layout, true, 0).numel,
            share_gradients(layout, true, 0).numel);
}

}  // namespace
}  // namespace capstan::plan
