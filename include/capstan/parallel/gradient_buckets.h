// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// GradientBuckets: sums gradients over ranks while backward goes on. Every reduction is a sum. In
// order, for each bucket:
//   1. partial sums over the tensor axis, for parameters that several of its ranks hold while each
//      saw a part of what they act on (norms under sequence parallel, copied key/value heads);
//   2. the data axes: all-reduce of the bucket, or with ZeRO reduce-scatter of a buffer to its
//      shards (a bucket is then one buffer);
//   3. at the end of the step: all-reduce of shards over the replicas that are left, and the sum
//      over the two stages that hold a tied embedding. Where the optimizer runs in the backward
//      (update_when_summed) they follow 2 when the next bucket has been issued, whose sum then
//      travels; on a rank alone at once.
// Sums 2 and 3 travel in the reduction's dtype and are kept in the gradients'; sums 1, which are
// few, travel as they are. What has no other rank to go to is not rounded.
// Sums are issued in the plan's order (plan::list_passes), the same on every rank.
#pragma once
#include <ATen/core/Tensor.h>

#include <deque>
#include <functional>
#include <optional>
#include <utility>
#include <vector>

#include "capstan/comm/communicator.h"
#include "capstan/parallel/flat_store.h"

namespace capstan::parallel {

struct BucketHooks {
  std::function<void(int bucket)> on_reduce;  // when a bucket is issued
  // Before it is issued; may write to the gradients (fault injection).
  std::function<void(int bucket, const Tensor& gradients)> before_reduce;
  // When the sum of the step has arrived; may write to the gradients (the shard with ZeRO).
  std::function<void(int bucket, const Tensor& gradients)> after_reduce;
};

// Elements of one store's flat gradient that are summed over `group` first.
struct PartialSum {
  comm::Communicator group;
  struct Range {
    int store = 0;
    int64_t begin = 0, count = 0;
  };
  std::vector<Range> ranges;
};

class GradientBuckets {
 public:
  struct Bucket {
    Tensor gradients;  // 1-d, stage 0: the memory of its stores, side by side; else undefined
    std::vector<int> stores;
    comm::Communicator sum;       // stage 0: all that hold copies; else the shard axes
    comm::Communicator replicas;  // ZeRO: the data axes over which shards are not cut
    comm::Communicator tied;      // first and last stage, for tied_stores; one rank elsewhere
    std::vector<int> tied_stores;
    std::vector<PartialSum> partial;
  };
  // stores: all stores of the rank, addressed by index; they must outlive the buckets. reduction:
  // what sums travel in; none: the gradients' own.
  GradientBuckets(std::vector<Bucket> buckets, std::vector<FlatStore*> stores, BucketHooks hooks,
                  std::optional<at::ScalarType> reduction = std::nullopt);

  // `update` is called for each store when its gradient of the step is summed, within complete() of
  // the bucket after it (on a rank alone of its own) or finish_step(). Until then its memory may
  // not be written to: plan::place_gradients. Without tied stages.
  void update_when_summed(std::function<void(int store)> update) { update_ = std::move(update); }

  void begin_step();
  // What the passes have added to the store's gradient is to be summed. Issues what is now
  // complete. is_last: nothing more comes in this step.
  void complete(int store, bool is_last);
  // Waits for all reductions. Collective over: the groups of the buckets.
  void finish_step();

  [[nodiscard]] size_t size() const { return buckets_.size(); }

 private:
  struct Pending {
    comm::Work work;
    int bucket = 0;
    bool is_last = true;   // of the bucket in this step
    Tensor taken, target;  // ZeRO: whole gradient, its part of the sum
    Tensor travelling;     // stage 0: the bucket in the reduction's dtype; else undefined
  };
  // `gradients` as it travels over `group`: itself unless rounded to the reduction's dtype.
  [[nodiscard]] Tensor on_its_way(const Tensor& gradients, const comm::Communicator& group) const;
  void sum_partial(const Bucket& bucket, const std::vector<Tensor>& gradients);
  void issue_bucket(int index);
  void update_buckets(size_t most_waiting);
  [[nodiscard]] Tensor summed(const Bucket& bucket) const;  // the shard with ZeRO
  void issue_shard(int index, bool is_last);
  void retire();
  void arrive(int index);
  void sum_replicas();
  void sum_shards(const comm::Communicator& group, const std::vector<int>& stores);
  void retire_sums(size_t most);

  std::vector<Bucket> buckets_;
  std::vector<FlatStore*> stores_;
  std::vector<int> bucket_of_;  // by store; -1: frozen
  BucketHooks hooks_;
  std::function<void(int store)> update_;  // empty: optimizers run behind the backward
  std::deque<int> waiting_;                // buckets to be updated, in order of issue
  bool is_alone_ = true;                   // no sum goes to another rank
  std::vector<bool> is_complete_;          // by store, stage 0
  std::vector<bool> has_arrived_;          // by bucket: the sum of the step
  bool offloads_ = false;                  // sums go to the host one by one
  size_t next_ = 0;                        // stage 0: first bucket not issued yet
  int finished_ = 0;                       // buckets whose last sum has been issued
  std::deque<Pending> pending_;            // in order of issue
  std::optional<at::ScalarType> reduction_;
  struct ShardSum {
    comm::Work work;
    Tensor shard, travelling;
  };
  std::deque<ShardSum> shard_sums_;  // at the end of the step, in order of issue
};

}  // namespace capstan::parallel
