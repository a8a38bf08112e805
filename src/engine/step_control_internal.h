// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// StepControl: the scalars of training and the decisions taken from them. Reads only numbers that
// are the same on every rank, so every rank decides alike. No tensors, no communication.
#pragma once
#include "capstan/engine/engine.h"
#include "capstan/optim/loss_scale.h"
#include "capstan/optim/lr_schedule.h"
#include "capstan/optim/spike.h"
#include "capstan/plan/plan.h"

namespace capstan::engine {

// One finished pass over the micro-batches, summed over ranks.
struct StepSums {
  double loss = 0;     // mean over the target tokens
  double squares = 0;  // of the gradient elements as they lie in the buffers (loss scale in)
  bool loss_is_finite = true;  // on every rank
  bool gradient_is_finite = true;
  int64_t target_tokens = 0;
};

// The rules that the recipe asks for.
[[nodiscard]] optim::LossScaleOptions loss_scale_rule(const plan::PrecisionPlan& precision);
[[nodiscard]] optim::SpikeOptions spike_rule(const recipe::Optimizer& recipe);

class StepControl {
 public:
  explicit StepControl(const plan::Plan& plan);

  [[nodiscard]] double loss_scale() const { return scale_.value(); }
  // Of the step after `ahead` steps that are not closed yet.
  [[nodiscard]] double lr(int64_t ahead = 0) const;

  struct Update {
    bool apply = false;
    double lr = 0, gradient_scale = 1;  // clip factor / loss scale
    int64_t count = 1;                  // number of the update
  };
  // The update of the step at hand, if nothing in it turns out to be non-finite: for optimizers
  // that run before the step is closed.
  [[nodiscard]] Update next_update(int64_t target_tokens) const;
  struct Verdict {
    Update update;
    StepReport report;
  };
  // Closes one step: progress advances whether it is applied or not; moments and count do not if it
  // is skipped.
  [[nodiscard]] Verdict close_step(const StepSums& sums);
  // The same for a step that the device has closed by the same rules: its verdict must be this
  // one's, else InternalError.
  struct Decided {
    bool applied = false;
    int64_t count = 0;
    double gradient_scale = 1;
    double loss_scale = 1;  // of the next step
  };
  [[nodiscard]] StepReport confirm_step(const StepSums& sums, const Decided& device);
  // Throws DivergenceError when too many steps in a row were skipped as non-finite; the first one
  // is too many where the optimizer has run in its backward.
  void check_divergence(const StepReport& last) const;

  [[nodiscard]] EngineScalars scalars() const;
  void restore(const EngineScalars& scalars);

 private:
  [[nodiscard]] std::string reason_to_skip(const StepSums& sums, double norm);

  plan::BatchPlan batch_;
  recipe::Optimizer recipe_;
  optim::LrSchedule lr_;
  optim::LossScale scale_;
  bool has_loss_scale_;
  optim::SpikeDetector spikes_;
  EngineScalars scalars_;  // progress and counts; scale and window live in the members above
};

}  // namespace capstan::engine
