// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <optional>

#include "capstan/base/check.h"
#include "capstan/base/error.h"
#include "capstan/optim/flat_update.h"
#include "capstan/parallel/flat_store.h"
#include "capstan/plan/optimizer_states.h"
#include "optim/device_update_internal.h"
#include "optim/flat_by_numbers_internal.h"
#include "optim/optimizers_internal.h"

namespace capstan::optim {
namespace {

// Where the update finds a state of the plan's table.
Tensor& place_of(FlatTensors& tensors, const std::string& kind) {
  if (kind == "exp_avg") return tensors.first;
  if (kind == "exp_avg_scale") return tensors.first_scale;
  if (kind == "exp_avg_sq" || kind == "hessian") return tensors.second;
  CAPSTAN_CHECK(kind == "exp_avg_sq_scale" || kind == "hessian_scale",
                "no state {} in AdamW, Lion and Sophia", kind);
  return tensors.second_scale;
}

class FlatOptimizer final : public Optimizer {
 public:
  FlatOptimizer(UpdateRule rule, const recipe::Optimizer& recipe,
                const std::vector<parallel::Shard>& shards)
      : rule_(rule), recipe_(recipe) {
    tensors_.reserve(shards.size());
    for (const auto& shard : shards) {
      tensors_.push_back({.weights = shard.master, .gradient = shard.gradient, .copy = shard.copy});
      add_states(tensors_.size() - 1, shard);
    }
    for (size_t i = 0; i < shards.size(); ++i)
      for (const auto& range : shards[i].ranges)
        jobs_.push_back({&tensors_[i], range.begin, range.end, range.decay, range.index});
    if (DeviceUpdate::fits(jobs_)) on_device_.emplace(rule, jobs_);
  }

  void step(const UpdateStep& step) override {
    FlatStep numbers = constants(step.seed);
    numbers.lr = step.lr;
    numbers.gradient_scale = step.gradient_scale;
    numbers.count = step.count;
    on_device_ ? on_device_->step(numbers) : update_flat(rule_, jobs_, numbers);
  }

  void step_on_device(const StepNumbers& numbers, uint64_t seed) override {
    on_device_ ? on_device_->step_by(constants(seed), numbers.bytes)
               : flat_by_numbers(rule_, jobs_, constants(seed), numbers);
  }

  [[nodiscard]] bool reads_device_numbers() const override {
    return std::all_of(tensors_.begin(), tensors_.end(), [&](const FlatTensors& t) {
      return !t.weights.is_cpu() && !t.gradient.is_cpu() &&
             (on_device_ || t.first.scalar_type() == t.weights.scalar_type());
    });
  }

  std::vector<OptimizerState> states() override { return states_; }

  // As the authors' program: the first interval takes all curvatures as 0.
  [[nodiscard]] bool wants_curvature(int64_t finished_steps) const override {
    return rule_ == UpdateRule::kSophia && finished_steps > 0 &&
           finished_steps % recipe_.sophia.interval == 0;
  }

  void observe_curvature(const CurvaturePass& pass) override {
    const CurvatureStep step{.beta2 = recipe_.betas[1],
                             .tokens = pass.tokens,
                             .gradient_scale = pass.gradient_scale,
                             .count = pass.count,
                             .seed = pass.seed};
    if (!on_device_) return update_curvature(jobs_, step);
    pass.on_device ? on_device_->observe_by(step, pass.on_device->bytes)
                   : on_device_->observe(step);
  }

 private:
  [[nodiscard]] FlatStep constants(uint64_t seed) const {
    return {.beta1 = recipe_.betas[0],
            .beta2 = recipe_.betas[1],
            .eps = recipe_.eps,
            .weight_decay = recipe_.weight_decay,
            .rho = recipe_.sophia.rho,
            .seed = seed};
  }

  void add_states(size_t index, const parallel::Shard& shard) {
    const DType master = shard.master.scalar_type() == at::kDouble ? DType::kFp64 : DType::kFp32;
    for (const auto& spec : plan::optimizer_states(recipe_, master, shard.update)) {
      Tensor& values = place_of(tensors_[index], spec.kind);
      values = at::zeros({shard.master.numel() / spec.block},
                         shard.master.options().dtype(parallel::scalar_type_of(spec.dtype)));
      states_.push_back({spec.kind, index, values, spec.block});
    }
  }

  UpdateRule rule_;
  recipe::Optimizer recipe_;
  std::vector<FlatTensors> tensors_;
  std::vector<OptimizerState> states_;
  std::vector<FlatJob> jobs_;  // point into tensors_
  std::optional<DeviceUpdate> on_device_;
};

std::unique_ptr<Optimizer> make_flat(UpdateRule rule, const recipe::Optimizer& recipe,
                                     const std::vector<parallel::Shard>& shards) {
  const bool betas_fit = recipe.betas.size() == 2 && recipe.betas[0] >= 0 && recipe.betas[0] < 1 &&
                         recipe.betas[1] >= 0 && recipe.betas[1] < 1;
  if (!betas_fit)
    throw ConfigError(
        ErrorText{.module = "optim",
                  .what = "making the optimizer",
                  .got = fmt::format("optimizer.betas [{}]", fmt::join(recipe.betas, ", ")),
                  .need = "two numbers, each in [0, 1)",
                  .why = {},
                  .fix = {}});
  return std::make_unique<FlatOptimizer>(rule, recipe, shards);
}

}  // namespace

std::unique_ptr<Optimizer> make_adamw(const recipe::Optimizer& recipe,
                                      const std::vector<parallel::Shard>& shards) {
  return make_flat(UpdateRule::kAdamW, recipe, shards);
}

std::unique_ptr<Optimizer> make_lion(const recipe::Optimizer& recipe,
                                     const std::vector<parallel::Shard>& shards) {
  return make_flat(UpdateRule::kLion, recipe, shards);
}

std::unique_ptr<Optimizer> make_sophia(const recipe::Optimizer& recipe,
                                       const std::vector<parallel::Shard>& shards) {
  return make_flat(UpdateRule::kSophia, recipe, shards);
}

}  // namespace capstan::optim
