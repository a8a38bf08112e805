// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "capstan/base/error.h"
#include "capstan/plan/schedule.h"

namespace capstan::plan {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

struct Score {
  double most = 0, squares = 0;
};
Score score(const std::vector<double>& cost, const std::vector<int>& first) {
  Score result;
  for (size_t part = 0; part < first.size(); ++part) {
    const int end = part + 1 < first.size() ? first[part + 1] : static_cast<int>(cost.size());
    double sum = 0;
    for (int i = first[part]; i < end; ++i) sum += cost[static_cast<size_t>(i)];
    result.most = std::max(result.most, sum);
    result.squares += sum * sum;
  }
  return result;
}
// Best of all splits, by trying them.
void try_all(const std::vector<double>& cost, std::vector<int> first, size_t stages, Score& best) {
  if (first.size() == stages) {
    const Score now = score(cost, first);
    if (now.most < best.most || (now.most == best.most && now.squares < best.squares)) best = now;
    return;
  }
  for (int next = first.back() + 1; next < static_cast<int>(cost.size()); ++next) {
    first.push_back(next);
    try_all(cost, first, stages, best);
    first.pop_back();
  }
}

TEST(BalanceStages, EqualBlocksGiveEqualParts) {
  EXPECT_THAT(balance_stages(std::vector<double>(8, 1), 4), ElementsAre(0, 2, 4, 6));
  // The early stages hold more in flight, so they get the smaller parts.
  EXPECT_THAT(balance_stages(std::vector<double>(10, 1), 4), ElementsAre(0, 2, 4, 7));
  EXPECT_THAT(balance_stages(std::vector<double>(10, 0.1), 4), ElementsAre(0, 2, 4, 7));
  EXPECT_THAT(balance_stages({3, 4, 5}, 1), ElementsAre(0));
  EXPECT_THAT(balance_stages({3, 4, 5}, 3), ElementsAre(0, 1, 2));
  EXPECT_THAT(balance_stages({0, 0, 0, 0}, 2).front(), 0);
}

TEST(BalanceStages, AHeavyHeadTakesLayersOffTheLastStage) {
  // Embedding, 8 layers, a head worth three layers.
  const std::vector<double> cost = {0.1, 1, 1, 1, 1, 1, 1, 1, 1, 3};
  EXPECT_THAT(balance_stages(cost, 4), ElementsAre(0, 3, 6, 9));
}

TEST(BalanceStages, EqualsTheBestOfAllSplits) {
  std::mt19937 random(3);
  for (int round = 0; round < 400; ++round) {
    const size_t blocks = 1 + random() % 11, stages = 1 + random() % blocks;
    std::vector<double> cost;
    for (size_t i = 0; i < blocks; ++i) cost.push_back(static_cast<double>(random() % 8));
    const std::vector<int> first = balance_stages(cost, static_cast<int>(stages));
    ASSERT_EQ(first.size(), stages);
    ASSERT_EQ(first.front(), 0);
    ASSERT_TRUE(std::is_sorted(first.begin(), first.end(), std::less_equal<>()));
    ASSERT_LT(first.back(), static_cast<int>(blocks));
    Score best{1e300, 1e300};
    try_all(cost, {0}, stages, best);
    const Score got = score(cost, first);
    EXPECT_EQ(got.most, best.most) << round;
    EXPECT_EQ(got.squares, best.squares) << round;
  }
}

TEST(BalanceStages, LargeModelsAreSplitAtOnce) {
  const std::vector<int> first = balance_stages(std::vector<double>(1026, 1.7), 256);
  ASSERT_EQ(first.size(), 256u);
  for (size_t part = 1; part < first.size(); ++part) EXPECT_LE(first[part] - first[part - 1], 5);
}

TEST(BalanceStages, WrongInputIsRefused) {
  try {
    (void)balance_stages({1, 1}, 3);
    FAIL();
  } catch (const ConfigError& e) {
    EXPECT_THAT(e.what(), HasSubstr("got 2 blocks for 3 stages, need a block for every stage"));
    EXPECT_THAT(e.what(), HasSubstr("parallel.pipeline.size"));
  }
  EXPECT_THROW((void)balance_stages({1, -1}, 1), InternalError);
  EXPECT_THROW((void)balance_stages({1, 1}, 0), InternalError);
}

}  // namespace
}  // namespace capstan::plan
