// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "engine/backward_updates_internal.h"

#include <ATen/core/grad_mode.h>

#include "capstan/base/trace.h"

namespace capstan::engine {

BackwardUpdates::BackwardUpdates(parallel::ParallelModel& model,
                                 const std::vector<parallel::Shard>& shards,
                                 const std::vector<size_t>& stores,
                                 optim::PerShardOptimizer& optimizer, uint64_t seed)
    : model_(model),
      shards_(shards),
      shard_of_(model.stores.size()),
      optimizer_(optimizer),
      seed_(seed) {
  for (size_t i = 0; i < stores.size(); ++i) shard_of_.at(stores[i]) = i;
  model_.buckets->update_when_summed([this](int store) { update(store); });
}

void BackwardUpdates::open_step(const StepControl::Update& update) {
  curvature_.reset();
  numbers_ = update;
  squares_ = {};
}

void BackwardUpdates::open_step(DeviceDecision& device, bool publishes) {
  curvature_.reset();
  device_ = &device;
  publishes_ = publishes;
  device.open_updates();
}

void BackwardUpdates::update(int store) {
  const at::NoGradGuard no_grad;
  const trace::Span span("optimizer", "update");
  const size_t shard = shard_of_.at(static_cast<size_t>(store)).value();
  if (curvature_) return optimizer_.of(shard).observe_curvature(*curvature_);
  if (device_) {
    device_->add_squares(shard);
    optimizer_.of(shard).step_on_device(device_->numbers(), seed_);
  } else {
    update_by_host(shard);
  }
  if (publishes_) model_.stores[static_cast<size_t>(store)]->publish();
}

void BackwardUpdates::update_by_host(size_t shard) {
  const optim::SquareSums own = optim::sum_of_squares({&shards_[shard], 1});
  squares_.counted += own.counted;
  squares_.is_finite = squares_.is_finite && own.is_finite;
  if (!numbers_.apply) return;
  optimizer_.of(shard).step({numbers_.lr, numbers_.gradient_scale, numbers_.count, seed_});
}

}  // namespace capstan::engine
