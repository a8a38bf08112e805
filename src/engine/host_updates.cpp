// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "engine/host_updates_internal.h"

#include "capstan/base/trace.h"

namespace capstan::engine {

HostUpdates::HostUpdates(parallel::ParallelModel& model, const std::vector<parallel::Shard>& shards,
                         const std::vector<size_t>& stores, optim::PerShardOptimizer& optimizer,
                         uint64_t seed)
    : model_(model), shards_(shards), stores_(stores), optimizer_(optimizer), seed_(seed) {}

optim::SquareSums HostUpdates::await_squares() {
  const trace::Span span("optimizer", "squares");
  std::vector<optim::SquareParts> parts(shards_.size());
  for (size_t i = shards_.size(); i-- > 0;) {  // the last block's gradient is complete first
    model_.stores[stores_[i]]->await_gradient();
    parts[i] = optim::parts_of_squares(shards_[i]);
  }
  return optim::add_up(parts);
}

void HostUpdates::await_gradients() {
  for (const size_t s : stores_) model_.stores[s]->await_gradient();
}

void HostUpdates::update(const StepControl::Update& update) {
  for (size_t i = 0; i < shards_.size(); ++i) {
    optimizer_.of(i).step({update.lr, update.gradient_scale, update.count, seed_});
    model_.stores[stores_[i]]->publish();
  }
}

}  // namespace capstan::engine
