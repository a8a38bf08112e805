// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/parallel/gradient_buckets.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <utility>

#include "capstan/base/check.h"

namespace capstan::parallel {
namespace {

// Sums under way that hold memory of their own (whole gradients, rounded copies), besides what
// backward is filling.
constexpr size_t kMostPending = 1;

}  // namespace

GradientBuckets::GradientBuckets(std::vector<Bucket> buckets, std::vector<FlatStore*> stores,
                                 BucketHooks hooks, std::optional<at::ScalarType> reduction)
    : buckets_(std::move(buckets)),
      stores_(std::move(stores)),
      bucket_of_(stores_.size(), -1),
      hooks_(std::move(hooks)),
      is_complete_(stores_.size(), false),
      has_arrived_(buckets_.size(), false),
      reduction_(reduction) {
  is_alone_ = std::all_of(buckets_.begin(), buckets_.end(), [](const Bucket& bucket) {
    return bucket.sum.size() == 1 && bucket.replicas.size() == 1;
  });
  offloads_ = std::any_of(stores_.begin(), stores_.end(), [](const FlatStore* store) {
    return store->options().offload_optimizer;
  });
  for (size_t b = 0; b < buckets_.size(); ++b)
    for (const int s : buckets_[b].stores)
      bucket_of_.at(static_cast<size_t>(s)) = static_cast<int>(b);
  finished_ = static_cast<int>(buckets_.size());
}

void GradientBuckets::begin_step() {
  for (FlatStore* store : stores_) store->begin_step();
  std::fill(is_complete_.begin(), is_complete_.end(), false);
  std::fill(has_arrived_.begin(), has_arrived_.end(), false);
  pending_.clear();
  waiting_.clear();
  shard_sums_.clear();
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

Tensor GradientBuckets::on_its_way(const Tensor& gradients, const comm::Communicator& group) const {
  return reduction_ && group.size() > 1 ? gradients.to(*reduction_) : gradients;
}

void GradientBuckets::issue_bucket(int index) {
  const Bucket& bucket = buckets_[static_cast<size_t>(index)];
  std::vector<Tensor> gradients;
  for (const int s : bucket.stores)
    gradients.push_back(stores_[static_cast<size_t>(s)]->take_gradient(true));
  sum_partial(bucket, gradients);
  if (hooks_.before_reduce) hooks_.before_reduce(index, bucket.gradients);
  if (hooks_.on_reduce) hooks_.on_reduce(index);
  Pending pending;
  pending.bucket = index;
  const Tensor sent = on_its_way(bucket.gradients, bucket.sum);
  if (!sent.is_same(bucket.gradients)) pending.travelling = sent;
  if (bucket.sum.size() > 1) pending.work = bucket.sum.all_reduce(sent);
  const bool has_memory = pending.travelling.defined();
  pending_.push_back(std::move(pending));
  while ((has_memory || offloads_) && pending_.size() > kMostPending) retire();
  ++finished_;
  if (!update_) return;
  waiting_.push_back(index);
  update_buckets(is_alone_ ? 0 : 1);
}

// The block after the next writes to the same memory: by then the update has read it.
void GradientBuckets::update_buckets(size_t most_waiting) {
  for (; waiting_.size() > most_waiting; waiting_.pop_front()) {
    const int index = waiting_.front();
    const auto is_its_own = [&](const Pending& pending) { return pending.bucket == index; };
    while (std::any_of(pending_.begin(), pending_.end(), is_its_own)) retire();
    const Bucket& bucket = buckets_[static_cast<size_t>(index)];
    sum_shards(bucket.replicas, bucket.stores);
    retire_sums(0);
    if (hooks_.after_reduce) hooks_.after_reduce(index, summed(bucket));
    for (const int s : bucket.stores) update_(s);
  }
}

void GradientBuckets::issue_shard(int index, bool is_last) {
  const Bucket& bucket = buckets_[static_cast<size_t>(index)];
  FlatStore& store = *stores_[static_cast<size_t>(bucket.stores.front())];
  Pending pending;
  pending.bucket = index;
  pending.is_last = is_last;
  pending.taken = store.take_gradient(is_last);
  sum_partial(bucket, {pending.taken});
  if (hooks_.before_reduce) hooks_.before_reduce(index, pending.taken);
  if (hooks_.on_reduce) hooks_.on_reduce(index);
  pending.taken = on_its_way(pending.taken, bucket.sum);
  pending.target = store.reduction_target(pending.taken);
  pending.work = bucket.sum.reduce_scatter(pending.target, pending.taken);
  pending_.push_back(std::move(pending));
  while (pending_.size() > kMostPending) retire();
  if (!is_last) return;
  ++finished_;
  if (!update_) return;
  waiting_.push_back(index);
  update_buckets(is_alone_ ? 0 : 1);
}

void GradientBuckets::retire() {
  Pending pending = std::move(pending_.front());
  pending_.pop_front();
  pending.work.wait();
  const Bucket& bucket = buckets_[static_cast<size_t>(pending.bucket)];
  if (pending.travelling.defined()) bucket.gradients.copy_(pending.travelling);
  if (pending.target.defined())
    stores_[static_cast<size_t>(bucket.stores.front())]->add_to_shard(pending.target);
  const bool is_summed = pending.is_last && bucket.replicas.size() == 1 && bucket.tied.size() == 1;
  if (offloads_ && is_summed) arrive(pending.bucket);
}

// Once per step, when nothing more is added.
void GradientBuckets::arrive(int index) {
  if (has_arrived_[static_cast<size_t>(index)]) return;
  has_arrived_[static_cast<size_t>(index)] = true;
  const Bucket& bucket = buckets_[static_cast<size_t>(index)];
  if (hooks_.after_reduce) hooks_.after_reduce(index, summed(bucket));
  for (const int s : bucket.stores) stores_[static_cast<size_t>(s)]->send_gradient();
}

void GradientBuckets::sum_shards(const comm::Communicator& group, const std::vector<int>& stores) {
  if (group.size() == 1) return;
  for (const int s : stores) {
    ShardSum sum{{}, stores_[static_cast<size_t>(s)]->gradient_shard(), {}};
    sum.travelling = on_its_way(sum.shard, group);
    sum.work = group.all_reduce(sum.travelling);
    shard_sums_.push_back(std::move(sum));
    if (reduction_) retire_sums(kMostPending);
  }
}

void GradientBuckets::retire_sums(size_t most) {
  for (; shard_sums_.size() > most; shard_sums_.pop_front()) {
    ShardSum& sum = shard_sums_.front();
    sum.work.wait();
    if (!sum.travelling.is_same(sum.shard)) sum.shard.copy_(sum.travelling);
  }
}

void GradientBuckets::sum_replicas() {
  for (const Bucket& bucket : buckets_) sum_shards(bucket.replicas, bucket.stores);
  retire_sums(0);
  for (const Bucket& bucket : buckets_) sum_shards(bucket.tied, bucket.tied_stores);
  retire_sums(0);
}

Tensor GradientBuckets::summed(const Bucket& bucket) const {
  if (bucket.gradients.defined()) return bucket.gradients;
  return stores_[static_cast<size_t>(bucket.stores.front())]->gradient_shard();
}

void GradientBuckets::finish_step() {
  CAPSTAN_CHECK(finished_ == static_cast<int>(buckets_.size()), "{} of {} buckets were summed",
                finished_, buckets_.size());
  update_buckets(0);
  while (!pending_.empty()) retire();
  if (!update_) sum_replicas();
  for (size_t b = 0; b < buckets_.size() && !update_; ++b) arrive(static_cast<int>(b));
  for (FlatStore* store : stores_) store->end_step();
}

}  // namespace capstan::parallel
