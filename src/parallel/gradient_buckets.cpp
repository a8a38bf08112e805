// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/parallel/gradient_buckets.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <utility>

#include "capstan/base/check.h"

namespace capstan::parallel {
namespace {

// Whole gradients that wait for their sum, besides the one that backward is filling.
constexpr size_t kMostPendingShards = 1;

}  // namespace

GradientBuckets::GradientBuckets(std::vector<Bucket> buckets, std::vector<FlatStore*> stores,
                                 BucketHooks hooks)
    : buckets_(std::move(buckets)),
      stores_(std::move(stores)),
      bucket_of_(stores_.size(), -1),
      hooks_(std::move(hooks)),
      is_complete_(stores_.size(), false) {
  for (size_t b = 0; b < buckets_.size(); ++b)
    for (const int s : buckets_[b].stores)
      bucket_of_.at(static_cast<size_t>(s)) = static_cast<int>(b);
  finished_ = static_cast<int>(buckets_.size());
}

void GradientBuckets::begin_step() {
  for (FlatStore* store : stores_) store->begin_step();
  std::fill(is_complete_.begin(), is_complete_.end(), false);
  pending_.clear();
  next_ = 0;
  finished_ = 0;
}

void GradientBuckets::complete(int store, bool is_last) {
  const int index = bucket_of_.at(static_cast<size_t>(store));
  CAPSTAN_CHECK(index >= 0, "a frozen buffer has no gradient to sum");
  if (!buckets_[static_cast<size_t>(index)].gradients.defined()) return issue_shard(index, is_last);
  CAPSTAN_CHECK(is_last, "bucket {} is summed once per step", index);
  is_complete_[static_cast<size_t>(store)] = true;
  const auto is_ready = [&](const Bucket& bucket) {
    return std::all_of(bucket.stores.begin(), bucket.stores.end(),
                       [&](int s) { return bool(is_complete_[static_cast<size_t>(s)]); });
  };
  for (; next_ < buckets_.size() && is_ready(buckets_[next_]); ++next_)
    issue_bucket(static_cast<int>(next_));
}

// One collective per group, whatever the number of ranges.
void GradientBuckets::sum_partial(const Bucket& bucket, const std::vector<Tensor>& gradients) {
  for (const PartialSum& partial : bucket.partial) {
    std::vector<Tensor> parts;
    for (const auto& range : partial.ranges) {
      const auto at = std::find(bucket.stores.begin(), bucket.stores.end(), range.store);
      parts.push_back(gradients.at(static_cast<size_t>(at - bucket.stores.begin()))
                          .narrow(0, range.begin, range.count));
    }
    if (parts.size() == 1) {
      partial.group.all_reduce(parts.front()).wait();
      continue;
    }
    const Tensor packed = at::cat(parts);
    partial.group.all_reduce(packed).wait();
    int64_t begin = 0;
    for (const Tensor& part : parts) {
      part.copy_(packed.narrow(0, begin, part.numel()));
      begin += part.numel();
    }
  }
}

void GradientBuckets::issue_bucket(int index) {
  const Bucket& bucket = buckets_[static_cast<size_t>(index)];
  std::vector<Tensor> gradients;
  for (const int s : bucket.stores)
    gradients.push_back(stores_[static_cast<size_t>(s)]->take_gradient(true));
  sum_partial(bucket, gradients);
  if (hooks_.before_reduce) hooks_.before_reduce(index, bucket.gradients);
  if (hooks_.on_reduce) hooks_.on_reduce(index);
  const bool alone = bucket.sum.size() == 1;
  pending_.push_back(
      {alone ? comm::Work() : bucket.sum.all_reduce(bucket.gradients), index, {}, {}});
  ++finished_;
}

void GradientBuckets::issue_shard(int index, bool is_last) {
  const Bucket& bucket = buckets_[static_cast<size_t>(index)];
  FlatStore& store = *stores_[static_cast<size_t>(bucket.stores.front())];
  Pending pending;
  pending.bucket = index;
  pending.taken = store.take_gradient(is_last);
  sum_partial(bucket, {pending.taken});
  if (hooks_.before_reduce) hooks_.before_reduce(index, pending.taken);
  if (hooks_.on_reduce) hooks_.on_reduce(index);
  pending.target = store.reduction_target(pending.taken);
  pending.work = bucket.sum.reduce_scatter(pending.target, pending.taken);
  pending_.push_back(std::move(pending));
  while (pending_.size() > kMostPendingShards) retire();
  if (is_last) ++finished_;
}

void GradientBuckets::retire() {
  Pending pending = std::move(pending_.front());
  pending_.pop_front();
  pending.work.wait();
  if (!pending.target.defined()) return;
  const Bucket& bucket = buckets_[static_cast<size_t>(pending.bucket)];
  stores_[static_cast<size_t>(bucket.stores.front())]->add_to_shard(pending.target);
}

void GradientBuckets::sum_replicas() {
  std::vector<comm::Work> works;
  const auto sum = [&](const comm::Communicator& group, const std::vector<int>& stores) {
    if (group.size() == 1) return;
    for (const int s : stores)
      works.push_back(group.all_reduce(stores_[static_cast<size_t>(s)]->gradient_shard()));
  };
  const auto wait = [&] {
    for (auto& work : works) work.wait();
    works.clear();
  };
  for (const Bucket& bucket : buckets_) sum(bucket.replicas, bucket.stores);
  wait();
  for (const Bucket& bucket : buckets_) sum(bucket.tied, bucket.tied_stores);
  wait();
}

void GradientBuckets::finish_step() {
  CAPSTAN_CHECK(finished_ == static_cast<int>(buckets_.size()), "{} of {} buckets were summed",
                finished_, buckets_.size());
  while (!pending_.empty()) retire();
  sum_replicas();
  for (size_t b = 0; b < buckets_.size() && hooks_.after_reduce; ++b) {
    const Bucket& bucket = buckets_[b];
    const FlatStore& store = *stores_[static_cast<size_t>(bucket.stores.front())];
    hooks_.after_reduce(static_cast<int>(b),
                        bucket.gradients.defined() ? bucket.gradients : store.gradient_shard());
  }
  for (FlatStore* store : stores_) store->end_step();
}

}  // namespace capstan::parallel
