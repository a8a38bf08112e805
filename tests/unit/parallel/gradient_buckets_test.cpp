// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/parallel/gradient_buckets.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "capstan/base/error.h"
#include "small_model.h"

namespace capstan::parallel {
namespace {

using testing::SmallModel;

// Buckets {3}, {2, 1}, {0} over the four blocks of the small model.
struct FourBlocks {
  SmallModel model;
  std::vector<std::unique_ptr<FlatStore>> owned;
  std::vector<FlatStore*> stores;
  std::vector<int> issued;
  std::unique_ptr<GradientBuckets> buckets;

  FourBlocks() {
    for (int block = 0; block < 4; ++block) {
      owned.push_back(model.store(block));
      stores.push_back(owned.back().get());
    }
    std::vector<GradientBuckets::Bucket> list(3);
    list[0].stores = {3};
    list[1].stores = {2, 1};
    list[2].stores = {0};
    BucketHooks hooks;
    hooks.on_reduce = [this](int bucket) { issued.push_back(bucket); };
    buckets = std::make_unique<GradientBuckets>(std::move(list), stores, hooks);
  }
};

TEST(GradientBuckets, IssuesABucketWhenItsLastPassIsDone) {
  FourBlocks s;
  s.buckets->begin_step({1, 1, 1, 1});
  s.buckets->pass_done(3);
  EXPECT_EQ(s.issued, (std::vector<int>{0}));
  s.buckets->pass_done(2);
  EXPECT_EQ(s.issued, (std::vector<int>{0}));
  EXPECT_FALSE(s.stores[2]->is_finished());
  s.buckets->pass_done(1);
  EXPECT_EQ(s.issued, (std::vector<int>{0, 1}));
  EXPECT_TRUE(s.stores[2]->is_finished());
  s.buckets->pass_done(0);
  EXPECT_EQ(s.issued, (std::vector<int>{0, 1, 2}));
  s.buckets->wait();
}

TEST(GradientBuckets, CountsPassesOfAllMicroBatchesAndUses) {
  FourBlocks s;
  s.buckets->begin_step({2, 1, 1, 1});  // a tied table: the head's pass and its own
  s.buckets->pass_done(3);
  s.buckets->pass_done(0);
  s.buckets->pass_done(2);
  s.buckets->pass_done(1);
  EXPECT_EQ(s.issued, (std::vector<int>{0, 1}));
  s.buckets->pass_done(0);
  EXPECT_EQ(s.issued, (std::vector<int>{0, 1, 2}));
}

TEST(GradientBuckets, KeepsThePlannedOrderWhateverCompletesFirst) {
  FourBlocks s;
  s.buckets->begin_step({1, 1, 1, 1});
  for (const int store : {0, 1, 2}) s.buckets->pass_done(store);
  EXPECT_TRUE(s.issued.empty());
  s.buckets->pass_done(3);
  EXPECT_EQ(s.issued, (std::vector<int>{0, 1, 2}));
}

TEST(GradientBuckets, MissingOrExtraPass_IsAnError) {
  FourBlocks s;
  s.buckets->begin_step({1, 1, 1, 1});
  s.buckets->pass_done(3);
  EXPECT_THROW(s.buckets->wait(), InternalError);
  EXPECT_THROW(s.buckets->pass_done(3), InternalError);
}

}  // namespace
}  // namespace capstan::parallel
