// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// A step that the device closes by itself: its sums are made, added up over ranks and judged there,
// and come to the host in pinned memory when the step is through.
#pragma once
#include <deque>
#include <string>
#include <vector>

#include "capstan/comm/communicator.h"
#include "capstan/device/accelerator.h"
#include "capstan/optim/device_step.h"
#include "capstan/optim/optimizer.h"
#include "capstan/plan/plan.h"
#include "engine/step_control_internal.h"

namespace capstan::engine {

class DeviceDecision {
 public:
  // `shards` must outlive this.
  DeviceDecision(const std::vector<parallel::Shard>& shards, const plan::Plan& plan,
                 device::Accelerator& accelerator);
  ~DeviceDecision();
  DeviceDecision(const DeviceDecision&) = delete;
  DeviceDecision& operator=(const DeviceDecision&) = delete;

  // What the host knows of a step before it is run, on its way to the device.
  void open_step(int64_t target_tokens, double lr);
  // In place of the sums of decide(), where the optimizer runs in the backward: numbers() are ready
  // for updates from open_updates to decide(), each behind the squares of its shard.
  void open_updates();
  void add_squares(size_t shard);
  // Queues sums and decision; the optimizer may read numbers() behind them. loss: this rank's part,
  // fp64, 0-d, on the device; undefined without the last stage. Collective over: world.
  void decide(const Tensor& loss, bool counts_loss, const comm::Communicator& world);
  [[nodiscard]] const optim::StepNumbers& numbers() const { return step_.numbers(); }
  // Queues the copy of the outcome, behind everything of the step.
  void send_outcome();

  // What the device found and did.
  struct Outcome {
    StepSums sums;
    bool applied = false;
    int64_t count = 0;
    double gradient_scale = 0;
    double loss_scale = 0;  // of the next step
  };
  [[nodiscard]] size_t pending() const { return pending_.size(); }
  // Of the oldest step on its way; waits until it is through, with later ones queued behind it.
  // Throws what ended the job meanwhile.
  [[nodiscard]] Outcome receive(const comm::Communicator& world);
  void restore(const EngineScalars& scalars);

 private:
  struct Pending {
    Tensor values;  // pinned
    device::Event done;
    int64_t target_tokens = 0;
  };

  device::Accelerator& accelerator_;
  optim::DeviceStep step_;
  Tensor values_;             // fp64: the sums, then what was decided
  Tensor sums_;               // a view
  bool has_squares_ = false;  // updates came first
  int64_t target_tokens_ = 0;
  std::deque<Pending> pending_;
  std::vector<device::Event> events_;  // at rest
};

// Empty, or why the host decides, which it has to wait for. The same on all ranks.
[[nodiscard]] std::string reason_to_wait(const plan::Plan& plan, const optim::Optimizer& optimizer);

}  // namespace capstan::engine
