// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// GradientBuckets: sums gradients over the data axes while backward goes on. A bucket is the
// gradient memory of consecutive blocks in backward order, one contiguous tensor, so that it is one
// collective. It is issued when the last pass of the step through its blocks has returned, and in
// the plan's order, which is the same on every rank.
#pragma once
#include <ATen/core/Tensor.h>

#include <functional>
#include <vector>

#include "capstan/comm/communicator.h"
#include "capstan/parallel/flat_store.h"

namespace capstan::parallel {

struct BucketHooks {
  std::function<void(int bucket)> on_reduce;  // when a bucket is issued
  // Before it is issued; may write to the gradients (fault injection).
  std::function<void(int bucket, const Tensor& gradients)> before_reduce;
  // When its sum has arrived; may write to the gradients.
  std::function<void(int bucket, const Tensor& gradients)> after_reduce;
};

class GradientBuckets {
 public:
  struct Bucket {
    Tensor gradients;          // 1-d
    std::vector<int> stores;   // whose gradients lie in it
    comm::Communicator group;  // that sums it; one rank: nothing to do
  };
  // stores: all stores of the rank, addressed by index; they must outlive the buckets.
  GradientBuckets(std::vector<Bucket> buckets, std::vector<FlatStore*> stores, BucketHooks hooks);

  // passes[s]: how often backward will go through store s in this step.
  void begin_step(const std::vector<int>& passes);
  // One backward pass through the store has returned; issues what is now complete.
  void pass_done(int store);
  // Waits for all reductions. Every pass must be done. Collective over: the data axes.
  void wait();

  [[nodiscard]] size_t size() const { return buckets_.size(); }

 private:
  [[nodiscard]] bool is_complete(const Bucket& bucket) const;
  void issue(size_t bucket);

  std::vector<Bucket> buckets_;
  std::vector<FlatStore*> stores_;
  BucketHooks hooks_;
  std::vector<int> passes_left_;   // by store
  size_t next_ = 0;                // first bucket not issued yet
  std::vector<comm::Work> works_;  // of issued buckets, in order
};

}  // namespace capstan::parallel
