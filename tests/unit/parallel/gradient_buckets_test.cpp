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
    for (auto& bucket : list) bucket.gradients = at::zeros({1}, at::kDouble);
    BucketHooks hooks;
    hooks.on_reduce = [this](int bucket) { issued.push_back(bucket); };
    buckets = std::make_unique<GradientBuckets>(std::move(list), stores, hooks);
  }
};

TEST(GradientBuckets, IssuesABucketWhenItsLastStoreIsComplete) {
  FourBlocks s;
  s.buckets->begin_step();
  s.buckets->complete(3, true);
  EXPECT_EQ(s.issued, (std::vector<int>{0}));
  s.buckets->complete(2, true);
  EXPECT_EQ(s.issued, (std::vector<int>{0}));
  EXPECT_FALSE(s.stores[2]->is_finished());
  s.buckets->complete(1, true);
  EXPECT_EQ(s.issued, (std::vector<int>{0, 1}));
  EXPECT_TRUE(s.stores[2]->is_finished());
  s.buckets->complete(0, true);
  EXPECT_EQ(s.issued, (std::vector<int>{0, 1, 2}));
  s.buckets->finish_step();
}

TEST(GradientBuckets, KeepsThePlannedOrderWhateverCompletesFirst) {
  FourBlocks s;
  s.buckets->begin_step();
  for (const int store : {0, 1, 2}) s.buckets->complete(store, true);
  EXPECT_TRUE(s.issued.empty());
  s.buckets->complete(3, true);
  EXPECT_EQ(s.issued, (std::vector<int>{0, 1, 2}));
}

TEST(GradientBuckets, MissingSum_IsAnError) {
  FourBlocks s;
  s.buckets->begin_step();
  s.buckets->complete(3, true);
  EXPECT_THROW(s.buckets->finish_step(), InternalError);
}

}  // namespace
}  // namespace capstan::parallel
