// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/optim/per_shard.h"

#include <algorithm>
#include <utility>

namespace capstan::optim {

PerShardOptimizer::PerShardOptimizer(const recipe::Optimizer& recipe,
                                     const std::vector<parallel::Shard>& shards)
    : of_none_(make_optimizer(recipe, {})) {
  for (const parallel::Shard& shard : shards) parts_.push_back(make_optimizer(recipe, {shard}));
}

void PerShardOptimizer::step(const UpdateStep& step) {
  for (const auto& part : parts_) part->step(step);
}

void PerShardOptimizer::step_on_device(const StepNumbers& numbers, uint64_t seed) {
  for (const auto& part : parts_) part->step_on_device(numbers, seed);
}

bool PerShardOptimizer::reads_device_numbers() const {
  return std::all_of(parts_.begin(), parts_.end(),
                     [](const auto& part) { return part->reads_device_numbers(); });
}

bool PerShardOptimizer::wants_curvature(int64_t finished_steps) const {
  return of_none_->wants_curvature(finished_steps);
}

void PerShardOptimizer::observe_curvature(const CurvaturePass& pass) {
  for (const auto& part : parts_) part->observe_curvature(pass);
}

std::vector<OptimizerState> PerShardOptimizer::states() {
  std::vector<OptimizerState> all;
  for (size_t i = 0; i < parts_.size(); ++i)
    for (OptimizerState& state : parts_[i]->states()) {
      state.shard = i;
      all.push_back(std::move(state));
    }
  return all;
}

}  // namespace capstan::optim
