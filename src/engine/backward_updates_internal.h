// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// optimizer.in_backward: every store is updated as soon as its gradient of the step is summed, and
// its squares are added up before they are overwritten. A pass for the curvature is observed store
// by store likewise.
#pragma once
#include <optional>
#include <vector>

#include "capstan/optim/grad_norm.h"
#include "capstan/optim/per_shard.h"
#include "capstan/parallel/parallelize.h"
#include "engine/device_decision_internal.h"
#include "engine/step_control_internal.h"

namespace capstan::engine {

class BackwardUpdates {
 public:
  // shards[i] and optimizer.of(i) belong to store stores[i]. All must outlive this.
  BackwardUpdates(parallel::ParallelModel& model, const std::vector<parallel::Shard>& shards,
                  const std::vector<size_t>& stores, optim::PerShardOptimizer& optimizer,
                  uint64_t seed);

  // Before the passes of a step: by numbers of the host, or by those of the device. In a graph
  // what is updated is published by the caller, behind all updates.
  void open_step(const StepControl::Update& update);
  void open_step(DeviceDecision& device, bool publishes);
  // Before a pass for the curvature, which ends with the next open_step.
  void open_curvature(const optim::CurvaturePass& pass) { curvature_ = pass; }
  // Behind the passes: squares of all shards, where the host gave the numbers.
  [[nodiscard]] const optim::SquareSums& squares() const { return squares_; }

 private:
  void update(int store);
  void update_by_host(size_t shard);

  parallel::ParallelModel& model_;
  const std::vector<parallel::Shard>& shards_;
  std::vector<std::optional<size_t>> shard_of_;  // by store
  optim::PerShardOptimizer& optimizer_;
  uint64_t seed_;
  StepControl::Update numbers_;
  DeviceDecision* device_ = nullptr;
  bool publishes_ = true;
  std::optional<optim::CurvaturePass> curvature_;
  optim::SquareSums squares_;
};

}  // namespace capstan::engine
