// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <optional>

#include "capstan/base/error.h"
#include "capstan/optim/adamw.h"
#include "capstan/optim/device_step.h"
#include "optim/adamw_by_numbers_internal.h"
#include "optim/device_update_internal.h"
#include "optim/optimizers_internal.h"

namespace capstan::optim {
namespace {

class AdamW final : public Optimizer {
 public:
  AdamW(const recipe::Optimizer& recipe, const std::vector<parallel::Shard>& shards)
      : recipe_(recipe) {
    tensors_.reserve(shards.size());
    for (const auto& shard : shards)
      tensors_.push_back({shard.master, shard.gradient, at::zeros_like(shard.master),
                          at::zeros_like(shard.master), shard.copy});
    for (size_t i = 0; i < shards.size(); ++i)
      for (const auto& range : shards[i].ranges)
        jobs_.push_back({&tensors_[i], range.begin, range.end, range.decay});
    if (DeviceUpdate::fits(jobs_)) on_device_.emplace(jobs_);
  }

  void step(const UpdateStep& step) override {
    AdamWStep numbers = constants();
    numbers.lr = step.lr;
    numbers.gradient_scale = step.gradient_scale;
    numbers.count = step.count;
    on_device_ ? on_device_->step(numbers) : adamw_update(jobs_, numbers);
  }

  void step_on_device(const StepNumbers& numbers) override {
    on_device_ ? on_device_->step_by(constants(), numbers.bytes)
               : adamw_by_numbers(jobs_, constants(), numbers);
  }

  [[nodiscard]] bool reads_device_numbers() const override {
    return std::all_of(tensors_.begin(), tensors_.end(), [](const AdamWTensors& t) {
      return !t.weights.is_cpu() && !t.gradient.is_cpu();
    });
  }

  std::vector<OptimizerState> states() override {
    std::vector<OptimizerState> states;
    for (size_t i = 0; i < tensors_.size(); ++i) {
      states.push_back({"exp_avg", i, tensors_[i].first});
      states.push_back({"exp_avg_sq", i, tensors_[i].second});
    }
    return states;
  }

 private:
  [[nodiscard]] AdamWStep constants() const {
    return {.beta1 = recipe_.betas[0],
            .beta2 = recipe_.betas[1],
            .eps = recipe_.eps,
            .weight_decay = recipe_.weight_decay};
  }

  recipe::Optimizer recipe_;
  std::vector<AdamWTensors> tensors_;
  std::vector<AdamWJob> jobs_;  // point into tensors_
  std::optional<DeviceUpdate> on_device_;
};

}  // namespace

std::unique_ptr<Optimizer> make_adamw(const recipe::Optimizer& recipe,
                                      const std::vector<parallel::Shard>& shards) {
  const bool betas_fit = recipe.betas.size() == 2 && recipe.betas[0] >= 0 && recipe.betas[0] < 1 &&
                         recipe.betas[1] >= 0 && recipe.betas[1] < 1;
  if (!betas_fit)
    throw ConfigError(
        ErrorText{.module = "optim",
                  .what = "making AdamW",
                  .got = fmt::format("optimizer.betas [{}]", fmt::join(recipe.betas, ", ")),
                  .need = "two numbers, each in [0, 1)",
                  .why = {},
                  .fix = {}});
  return std::make_unique<AdamW>(recipe, shards);
}

}  // namespace capstan::optim
