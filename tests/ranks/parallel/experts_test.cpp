// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Experts over data, context and tensor ranks give the numbers of one rank, in fp64.
#include <ATen/ATen.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include "capstan/comm/ledger.h"
#include "capstan/plan/experts.h"
#include "ranks/parallel/experts_case.h"
#include "ranks/parallel/seams_case.h"
#include "support/run_ranks.h"

namespace capstan::test {
namespace {

using at::Tensor;
using Shape = plan::ExpertShape;

std::vector<ExpertCase> layouts() {
  std::vector<ExpertCase> all;
  for (const int tp : {1, 2})
    for (const bool sequence : {false, true})
      for (const int cp : {1, 2})
        for (const int shard : {1, 2, 4, 8})
          for (const int ep : {1, 2, 4, 8}) {
            const int ranks = tp * cp * shard;
            if ((sequence && tp == 1) || ranks == 1 || ranks > 8 || ranks % ep != 0) continue;
            ExpertCase c;
            c.shard = shard;
            c.cp = cp;
            c.tp = tp;
            c.ep = ep;
            c.sequence = sequence;
            all.push_back(c);
          }
  return all;
}

class EveryExpertLayout : public ::testing::TestWithParam<ExpertCase> {
 protected:
  static void expect_equal(const Shape& experts) {
    ExpertCase c = GetParam();
    c.experts = experts;
    expect_equal_to_one_rank(c);
  }
};

TEST_P(EveryExpertLayout, DroplessWithLossesOfTheRow) {
  expect_equal({.per_token = 2, .auxiliary_loss = 0.3, .z_loss = 0.1});
}

TEST_P(EveryExpertLayout, CapacityGatedSharedExpertAndLoadOfThePreviousStep) {
  expect_equal({.per_token = 3,
                .shared_intermediate_size = 10,
                .shared_gate = true,
                .normalize_weights = false,
                .auxiliary_loss = 0.3,
                .auxiliary_scope = "global",
                .capacity_factor = 0.8});
}

TEST_P(EveryExpertLayout, SigmoidWithGroupsBiasAndSharedExpert) {
  expect_equal({.per_token = 3,
                .shared_intermediate_size = 10,
                .router = "sigmoid",
                .groups = 4,
                .groups_per_token = 2,
                .scaling = 2.5,
                .auxiliary_loss = 0.2,
                .bias_update_rate = 0.01});
}

INSTANTIATE_TEST_SUITE_P(Experts, EveryExpertLayout, ::testing::ValuesIn(layouts()),
                         [](const auto& instance) {
                           const ExpertCase& c = instance.param;
                           return fmt::format("Dp{}Cp{}Tp{}{}Ep{}", c.shard, c.cp, c.tp,
                                              c.sequence ? "Sp" : "", c.ep);
                         });

TEST(ExpertLayouts, ReplicasMicroBatchesAndFrozenBlocks) {
  const Shape e{.per_token = 2, .auxiliary_loss = 0.3, .capacity_factor = 1.0};
  for (const int64_t micro_batches : {1, 2})
    for (const std::vector<int>& frozen : {std::vector<int>{}, {0, 1}, {2}})
      expect_equal_to_one_rank({.replicate = 2,
                                .shard = 2,
                                .tp = 2,
                                .ep = 4,
                                .experts = e,
                                .micro_batches = micro_batches,
                                .frozen_blocks = frozen});
}

// 15 and 7 tokens over two and four ranks of the tensor axis; one rank has none at all.
TEST(ExpertLayouts, TokensThatDoNotDivideOverTheTensorAxis) {
  for (const Shape& e : {Shape{.per_token = 2},
                         Shape{.per_token = 2, .auxiliary_loss = 0.3, .capacity_factor = 0.7}})
    for (const auto& [tp, tokens, samples] :
         {std::tuple{2, 15, 2}, {2, 15, 6}, {4, 7, 2}, {4, 1, 2}, {4, 3, 4}})
      expect_equal_to_one_rank(
          {.shard = 2, .tp = tp, .ep = 4, .experts = e, .samples = samples, .tokens = tokens});
}

// All tokens want the same few experts: most ranks compute nothing and still take part.
TEST(ExpertLayouts, OneExpertPerRankAndIdleRanks) {
  for (const int64_t per_token : {1, 8})
    expect_equal_to_one_rank(
        {.shard = 4, .tp = 2, .sequence = true, .ep = 8, .experts = {.per_token = per_token}});
  expect_equal_to_one_rank(
      {.shard = 8, .ep = 8, .experts = {.count = 64, .per_token = 1}, .samples = 8, .tokens = 2});
}

TEST(ExpertLayouts, DecodingEqualsOneRank) {
  for (const auto& [shard, cp, tp, ep] :
       {std::array{1, 1, 2, 2}, {2, 1, 2, 4}, {4, 1, 1, 2}, {2, 1, 4, 8}, {1, 2, 2, 4}})
    for (const Shape& e :
         {Shape{.per_token = 2, .capacity_factor = 0.5}, Shape{.per_token = 2,
                                                         .shared_intermediate_size = 12,
                                                         .shared_gate = true,
                                                         .bias_update_rate = 0.1}}) {
      ExpertCase c{.shard = shard, .cp = cp, .tp = tp, .ep = ep, .experts = e};
      c.sequence = tp > 1;
      SCOPED_TRACE(c.text());
      const Tensor want = ExpertRank(c, {}).decode();
      std::vector<double> errors(static_cast<size_t>(c.ranks()));
      run_ranks(c.ranks(), [&](comm::Communicator world) {
        const auto rank = static_cast<size_t>(world.rank());
        ExpertRank mine(c, world);
        errors[rank] = error_of(mine.decode(), mine.sample_part(want));
      });
      for (const double error : errors) EXPECT_LE(error, 1e-11);
    }
}

TEST(ExpertLayouts, TheSameLayoutTwiceGivesTheSameBits) {
  const ExpertCase c{.shard = 2,
                     .cp = 2,
                     .tp = 2,
                     .sequence = true,
                     .ep = 4,
                     .experts = {.per_token = 2, .auxiliary_loss = 0.1, .capacity_factor = 1.0}};
  std::vector<std::vector<Tensor>> runs;
  for (int run = 0; run < 2; ++run) {
    std::vector<std::vector<Tensor>> of_rank(static_cast<size_t>(c.ranks()));
    run_ranks(c.ranks(), [&](comm::Communicator world) {
      auto& mine = of_rank[static_cast<size_t>(world.rank())];
      ExpertRank rank(c, world);
      for (const auto& [name, x] : rank.train().stream) mine.push_back(x);
      for (size_t i = 0; i < rank.store().size(); ++i) mine.push_back(rank.store().gradient(i));
    });
    runs.emplace_back();
    for (const auto& list : of_rank)
      runs.back().insert(runs.back().end(), list.begin(), list.end());
  }
  ASSERT_EQ(runs[0].size(), runs[1].size());
  for (size_t i = 0; i < runs[0].size(); ++i) EXPECT_TRUE(runs[0][i].equal(runs[1][i])) << i;
}

TEST(ExpertLayouts, TrafficIsWhatThePlanSays) {
  for (const bool sequence : {false, true})
    for (const bool drops : {false, true}) {
      ExpertCase c{.shard = 2, .cp = 2, .tp = 2, .sequence = sequence, .ep = 4};
      c.experts = {.per_token = 2};
      if (drops) c.experts.capacity_factor = 0.8;
      SCOPED_TRACE(c.text());
      const int64_t tokens = c.samples * c.tokens / c.ranks();
      const auto want = plan::expert_exchange(shape_of(c), c.ep, tokens, DType::kFp64, false);
      std::vector<comm::Traffic> got(static_cast<size_t>(c.ranks()));
      run_ranks(c.ranks(), [&](comm::Communicator world) {
        ExpertRank rank(c, world);
        (void)rank.train();
        got[static_cast<size_t>(world.rank())] =
            rank.mesh().along(plan::Axis::kEp).ledger().of("ep", "all_to_all_v");
      });
      constexpr int64_t kLayers = 2;
      int64_t group = 0;
      for (size_t rank = 0; rank < got.size(); ++rank) {
        EXPECT_EQ(got[rank].calls, kLayers * want.calls);
        EXPECT_GE(got[rank].bytes, kLayers * want.bytes_least);
        EXPECT_LE(got[rank].bytes, kLayers * want.bytes_most);
        group += got[rank].bytes;
      }
      const int64_t groups = c.ranks() / c.ep;
      if (drops)
        EXPECT_LT(group, groups * kLayers * want.group_bytes);
      else
        EXPECT_EQ(group, groups * kLayers * want.group_bytes);
    }
}

}  // namespace
}  // namespace capstan::test
