// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/parallel/gradient_buckets.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <utility>

#include "capstan/base/check.h"

namespace capstan::parallel {

GradientBuckets::GradientBuckets(std::vector<Bucket> buckets, std::vector<FlatStore*> stores,
                                 BucketHooks hooks)
    : buckets_(std::move(buckets)),
      stores_(std::move(stores)),
      hooks_(std::move(hooks)),
      next_(buckets_.size()) {}

void GradientBuckets::begin_step(const std::vector<int>& passes) {
  CAPSTAN_CHECK(passes.size() == stores_.size(), "passes of {} stores for {}", passes.size(),
                stores_.size());
  for (FlatStore* store : stores_) store->begin_step();
  passes_left_ = passes;
  works_.clear();
  next_ = 0;
}

bool GradientBuckets::is_complete(const Bucket& bucket) const {
  return std::all_of(bucket.stores.begin(), bucket.stores.end(),
                     [&](int s) { return passes_left_[static_cast<size_t>(s)] == 0; });
}

void GradientBuckets::pass_done(int store) {
  int& left = passes_left_.at(static_cast<size_t>(store));
  CAPSTAN_CHECK(left > 0, "backward went through block {} more often than planned",
                stores_[static_cast<size_t>(store)]->layout().block);
  if (--left > 0) return;
  for (; next_ < buckets_.size() && is_complete(buckets_[next_]); ++next_) issue(next_);
}

void GradientBuckets::issue(size_t index) {
  const Bucket& bucket = buckets_[index];
  for (const int s : bucket.stores) stores_[static_cast<size_t>(s)]->finish_gradient();
  if (hooks_.before_reduce) hooks_.before_reduce(static_cast<int>(index), bucket.gradients);
  if (hooks_.on_reduce) hooks_.on_reduce(static_cast<int>(index));
  const bool alone = bucket.group.size() == 1;
  works_.push_back(alone ? comm::Work() : bucket.group.all_reduce(bucket.gradients));
}

void GradientBuckets::wait() {
  CAPSTAN_CHECK(next_ == buckets_.size(), "bucket {} of {} was never complete", next_,
                buckets_.size());
  for (size_t i = 0; i < works_.size(); ++i) {
    works_[i].wait();
    if (hooks_.after_reduce) hooks_.after_reduce(static_cast<int>(i), buckets_[i].gradients);
  }
  works_.clear();
}

}  // namespace capstan::parallel
