// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// parallel.zero.offload: the optimizer runs on the host, one shard after the other. Squares are
// summed while later gradients are still on their way, and values go back while the next shard is
// updated.
#pragma once
#include <vector>

#include "capstan/optim/grad_norm.h"
#include "capstan/optim/per_shard.h"
#include "capstan/parallel/parallelize.h"
#include "engine/step_control_internal.h"

namespace capstan::engine {

class HostUpdates {
 public:
  // shards[i] and optimizer.of(i) belong to store stores[i]. All must outlive this.
  HostUpdates(parallel::ParallelModel& model, const std::vector<parallel::Shard>& shards,
              const std::vector<size_t>& stores, optim::PerShardOptimizer& optimizer,
              uint64_t seed);

  // Waits for the gradients of a step, in the order in which they come; this rank's squares, with
  // the bits of optim::sum_of_squares over all shards.
  [[nodiscard]] optim::SquareSums await_squares();
  void await_gradients();
  // In the order in which the next forward reads the values. Collective over: the shard axes.
  void update(const StepControl::Update& update);

 private:
  parallel::ParallelModel& model_;
  const std::vector<parallel::Shard>& shards_;
  const std::vector<size_t>& stores_;
  optim::PerShardOptimizer& optimizer_;
  uint64_t seed_;
};

}  // namespace capstan::engine
