// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// An optimizer for every shard by itself, for updates in the backward. States are those of one
// optimizer over all shards, in its order.
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
  [[nodiscard]] std::vector<OptimizerState> states() override;

 private:
  std::vector<std::unique_ptr<Optimizer>> parts_;
};

}  // namespace capstan::optim
