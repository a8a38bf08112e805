// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "engine/device_decision_internal.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <chrono>
#include <thread>
#include <utility>

namespace capstan::engine {
namespace {

using optim::DeviceSums;

// Behind the sums; all of them fp64 on their way to the host.
enum Decided { kSkip = DeviceSums::kCount, kUpdates, kScale, kLossScale, kValues };

// Far below a step, far above a query.
constexpr std::chrono::microseconds kBetweenLooks{50};

}  // namespace

DeviceDecision::DeviceDecision(const std::vector<parallel::Shard>& shards, const plan::Plan& plan,
                               device::Accelerator& accelerator)
    : accelerator_(accelerator),
      step_(shards, accelerator.device(),
            {.max_norm = plan.resolved.optimizer.max_grad_norm.value_or(0),
             .loss_scale = loss_scale_rule(plan.precision),
             .spikes = spike_rule(plan.resolved.optimizer)}),
      values_(at::zeros({kValues},
                        at::TensorOptions().device(accelerator.device()).dtype(at::kDouble))),
      sums_(values_.narrow(0, 0, DeviceSums::kCount)) {}

DeviceDecision::~DeviceDecision() {
  for (const Pending& step : pending_) accelerator_.destroy(step.done);
  for (const device::Event event : events_) accelerator_.destroy(event);
}

void DeviceDecision::open_step(int64_t target_tokens, double lr) {
  target_tokens_ = target_tokens;
  step_.set_step(lr, target_tokens == 0);
}

void DeviceDecision::decide(const Tensor& loss, bool counts_loss, const comm::Communicator& world) {
  const at::NoGradGuard no_grad;
  const bool has_squares = std::exchange(has_squares_, false);
  has_squares ? step_.close_updates() : void(sums_.zero_());
  if (loss.defined()) {
    if (counts_loss) sums_[DeviceSums::kLoss].copy_(loss);
    sums_[DeviceSums::kNonFiniteLoss].copy_(loss.isfinite().logical_not());
  }
  if (!has_squares) step_.sum_squares(sums_);
  if (world.size() > 1) world.all_reduce(sums_).wait();
  step_.decide(sums_);
}

void DeviceDecision::open_updates() {
  const at::NoGradGuard no_grad;
  sums_.zero_();
  step_.open_updates();
  has_squares_ = true;
}

void DeviceDecision::add_squares(size_t shard) {
  const at::NoGradGuard no_grad;
  step_.add_squares(shard, sums_);
}

void DeviceDecision::send_outcome() {
  const optim::StepNumbers& n = step_.numbers();
  values_[kSkip].copy_(n.skip);
  values_[kUpdates].copy_(n.count);
  values_[kScale].copy_(n.gradient_scale);
  values_[kLossScale].copy_(n.loss_scale);
  Pending step{.values = accelerator_.empty_pinned({kValues}, at::kDouble),
               .done = {},
               .target_tokens = target_tokens_};
  step.values.copy_(values_, /*non_blocking=*/true);
  if (events_.empty()) events_.push_back(accelerator_.create_event());
  step.done = events_.back();
  events_.pop_back();
  accelerator_.record(step.done, accelerator_.current_stream());
  pending_.push_back(std::move(step));
}

DeviceDecision::Outcome DeviceDecision::receive(const comm::Communicator& world) {
  const Pending step = std::move(pending_.front());
  pending_.pop_front();
  events_.push_back(step.done);
  while (!accelerator_.is_done(step.done)) {
    world.check_job();
    std::this_thread::sleep_for(kBetweenLooks);
  }
  world.check_job();  // the device also gets to the end of a step whose collectives were ended
  const double* const v = step.values.const_data_ptr<double>();
  return {.sums = {.loss = v[DeviceSums::kLoss],
                   .squares = v[DeviceSums::kSquares],
                   .loss_is_finite = v[DeviceSums::kNonFiniteLoss] == 0,
                   .gradient_is_finite = v[DeviceSums::kNonFiniteGradient] == 0,
                   .target_tokens = step.target_tokens},
          .applied = v[kSkip] == 0,
          .count = static_cast<int64_t>(v[kUpdates]),
          .gradient_scale = v[kScale],
          .loss_scale = v[kLossScale]};
}

void DeviceDecision::restore(const EngineScalars& scalars) {
  step_.restore({.count = scalars.optimizer_count,
                 .loss_scale = scalars.loss_scale,
                 .good_steps = scalars.good_steps_at_scale,
                 .losses = scalars.spike_losses,
                 .norms = scalars.spike_norms});
}

std::string reason_to_wait(const plan::Plan& plan, const optim::Optimizer& optimizer) {
  const recipe::Experts& experts = plan.resolved.model.experts;
  if (plan.precision.dynamic_loss_scale && (experts.auxiliary_loss > 0 || experts.z_loss > 0))
    return "losses on routers are scaled by the host, as is the dynamic loss scale of fp16 then";
  if (plan.resolved.parallel.zero.offload != "none") return "the optimizer is on the host";
  if (!optimizer.reads_device_numbers())
    return "the optimizer (" + plan.resolved.optimizer.name + ") is handed its numbers by the host";
  return {};
}

}  // namespace capstan::engine
