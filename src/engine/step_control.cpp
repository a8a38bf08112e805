// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "engine/step_control_internal.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "capstan/base/check.h"
#include "capstan/base/error.h"
#include "capstan/optim/grad_norm.h"

namespace capstan::engine {

optim::LossScaleOptions loss_scale_rule(const plan::PrecisionPlan& precision) {
  optim::LossScaleOptions options;
  options.dynamic = precision.dynamic_loss_scale;
  options.start = options.dynamic ? optim::kFirstLossScale : precision.loss_scale;
  return options;
}

optim::SpikeOptions spike_rule(const recipe::Optimizer& recipe) {
  return {.sigma = recipe.spike_skip.sigma, .window = recipe.spike_skip.window};
}

StepControl::StepControl(const plan::Plan& plan)
    : batch_(plan.batch),
      recipe_(plan.resolved.optimizer),
      lr_(optim::make_lr_schedule(plan.resolved.lr_schedule, recipe_.lr, batch_.total_steps,
                                  batch_.tokens_per_step)),
      scale_(loss_scale_rule(plan.precision)),
      has_loss_scale_(plan.precision.compute == DType::kFp16),
      spikes_(spike_rule(recipe_)) {}

std::string StepControl::reason_to_skip(const StepSums& sums, double norm) {
  if (!sums.loss_is_finite || !std::isfinite(sums.loss)) return "nonfinite loss";
  if (!sums.gradient_is_finite || !std::isfinite(norm)) return "nonfinite gradient";
  if (sums.target_tokens == 0) return "no target tokens";
  if (spikes_.is_spike(sums.loss, norm)) return "spike";
  return {};
}

StepControl::Update StepControl::next_update(int64_t target_tokens) const {
  return {target_tokens > 0, lr(), 1.0 / scale_.value(), scalars_.optimizer_count + 1};
}

StepControl::Verdict StepControl::close_step(const StepSums& sums) {
  Verdict verdict;
  const double norm = std::sqrt(sums.squares) / scale_.value();
  const std::string skipped = reason_to_skip(sums, norm);
  const bool is_finite = !skipped.starts_with("nonfinite");
  const double lr = this->lr();
  if (skipped.empty()) {
    const double clip =
        recipe_.max_grad_norm ? optim::clip_factor(norm, *recipe_.max_grad_norm) : 1.0;
    verdict.update = {true, lr, clip / scale_.value(), ++scalars_.optimizer_count};
  }
  StepReport& report = verdict.report;
  if (has_loss_scale_) report.loss_scale = scale_.value();
  scale_.update(is_finite);
  ++scalars_.step;
  scalars_.tokens += batch_.tokens_per_step;
  scalars_.samples += batch_.global_samples;
  scalars_.skipped_total += skipped.empty() ? 0 : 1;
  scalars_.nonfinite_in_row = is_finite ? 0 : scalars_.nonfinite_in_row + 1;
  report.step = scalars_.step;
  report.loss = sums.loss;
  report.grad_norm = norm;
  report.lr = lr;
  report.target_tokens = sums.target_tokens;
  report.tokens = scalars_.tokens;
  report.samples = scalars_.samples;
  report.skipped = skipped;
  return verdict;
}

double StepControl::lr(int64_t ahead) const {
  return optim::lr_of_step(lr_, scalars_.step + ahead);
}

StepReport StepControl::confirm_step(const StepSums& sums, const Decided& device) {
  const Verdict own = close_step(sums);
  const double scale = own.update.gradient_scale;
  CAPSTAN_CHECK(device.applied == own.update.apply && device.count == scalars_.optimizer_count,
                "step {}: the device {} it as update {}, the host's rules say {} ('{}')",
                own.report.step, device.applied ? "applied" : "skipped", device.count,
                scalars_.optimizer_count, own.report.skipped);
  CAPSTAN_CHECK(!device.applied || std::fabs(device.gradient_scale - scale) <= 1e-9 * scale,
                "step {}: the device scaled gradients by {}, the host's rules say {}",
                own.report.step, device.gradient_scale, scale);
  CAPSTAN_CHECK(device.loss_scale == scale_.value(),
                "step {}: the device goes on with a loss scale of {}, the host's rules say {}",
                own.report.step, device.loss_scale, scale_.value());
  return own.report;
}

void StepControl::check_divergence(const StepReport& last) const {
  if (recipe_.in_backward && scalars_.nonfinite_in_row > 0)
    throw DivergenceError(ErrorText{
        .module = "engine",
        .what = fmt::format("training at step {}", last.step),
        .got = last.skipped,
        .need = "finite losses and gradients with optimizer.in_backward",
        .why = "blocks were updated in the backward and the step cannot be undone: the weights in "
               "memory are of no use, the last checkpoint is good",
        .fix = "Resume from the last checkpoint with a lower optimizer.lr, or with "
               "optimizer.in_backward: false, which skips such steps"});
  if (scalars_.nonfinite_in_row < std::max<int64_t>(1, recipe_.nonfinite_limit)) return;
  throw DivergenceError(ErrorText{
      .module = "engine",
      .what = fmt::format("training at step {}", last.step),
      .got = fmt::format("{} steps in a row without a usable gradient (the last: {})",
                         scalars_.nonfinite_in_row, last.skipped),
      .need = fmt::format("fewer than optimizer.nonfinite_limit {}", recipe_.nonfinite_limit),
      .why = "the run has diverged",
      .fix = "Lower optimizer.lr or lengthen lr_schedule.warmup, then resume from an "
             "earlier checkpoint"});
}

EngineScalars StepControl::scalars() const {
  EngineScalars out = scalars_;
  out.loss_scale = scale_.value();
  out.good_steps_at_scale = scale_.good_steps();
  out.spike_losses = spikes_.losses();
  out.spike_norms = spikes_.norms();
  return out;
}

void StepControl::restore(const EngineScalars& scalars) {
  scalars_ = scalars;
  scale_.restore(scalars.loss_scale, scalars.good_steps_at_scale);
  spikes_.restore(scalars.spike_losses, scalars.spike_norms);
}

}  // namespace capstan::engine
