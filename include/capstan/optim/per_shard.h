// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// An optimizer for every shard by itself, for updates of one shard at a time. States are those of
// one optimizer over all shards, in its order.
#pragma once
#include <memory>
#include <vector>

#include "capstan/optim/optimizer.h"

namespace capstan::optim {

class PerShardOptimizer final : public Optimizer {
 public:
  // Throws as make_optimizer().
  PerShardOptimizer(const recipe::Optimizer& recipe, const std::vector<parallel::Shard>& shards);
  [[nodiscard]] Optimizer& of(size_t shard) { return *parts_.at(shard); }

  void step(const UpdateStep& step) override;
  void step_on_device(const StepNumbers& numbers, uint64_t seed) override;
  [[nodiscard]] bool reads_device_numbers() const override;
  [[nodiscard]] bool wants_curvature(int64_t finished_steps) const override;
  void observe_curvature(const CurvaturePass& pass) override;
  [[nodiscard]] std::vector<OptimizerState> states() override;

 private:
  std::unique_ptr<Optimizer> of_none_;  // answers for a rank without shards as for any other
  std::vector<std::unique_ptr<Optimizer>> parts_;
};

}  // namespace capstan::optim
