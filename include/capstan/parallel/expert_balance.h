// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// ExpertBalance: what experts report during an optimizer step, and what follows from it for the
// next one: biases of routers and the fractions behind a global auxiliary loss. The engine passes
// it as Context::stats in Mode::kTrain, its states() as Context::routers in every pass, and calls
// finish_step() after the last micro-batch.
#pragma once
#include <ATen/core/Tensor.h>

#include <deque>
#include <functional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "capstan/comm/communicator.h"
#include "capstan/mesh/state_entry.h"
#include "capstan/param/context.h"
#include "capstan/plan/shape.h"

namespace capstan::parallel {

// Of one layer and step, over all ranks.
struct ExpertLoad {
  int layer = 0;
  std::vector<double> tokens;  // chosen for each expert, before capacity
  double dropped = 0;          // choices beyond capacity
  double routed_tokens = 0;
  double entropy = 0;  // mean over tokens, nats
  double auxiliary_loss = 0, z_loss = 0;

  [[nodiscard]] double max_over_mean() const;     // of `tokens`; 1 = even
  [[nodiscard]] double dropped_fraction() const;  // of the choices
};

// Belongs to one rank. States and sums lie on the device of the run, where they stay: a step may be
// closed there, with its loads on their way to the host, or by the host, which waits for the sums.
class ExpertBalance final : public param::StatSink {
 public:
  // layers: those that this rank computes. dtype of the states: fp32, fp64 for fp64 runs.
  ExpertBalance(const plan::ModelShape& shape, std::vector<int> layers, at::ScalarType dtype);

  void add(const char* name, int layer, const at::Tensor& value) override;
  [[nodiscard]] bool wants(const char* name) const override;
  // Sees every report of a pass, with the state that the layer's router chose by.
  using Listener = std::function<void(const char* name, int layer, const at::Tensor& value,
                                      const param::RouterState& state)>;
  void listen(Listener listener) { listener_ = std::move(listener); }
  // Entropy costs a pass over the scores; off unless wanted.
  void want_entropy(bool wanted) { wants_entropy_ = wanted; }

  [[nodiscard]] std::span<const param::RouterState> states() const { return states_; }
  // Sums over the ranks, updates the states of this rank when the step was applied, and starts
  // anew. Returns the loads of all layers, wherever they are computed. One all_reduce of fp64.
  // group: all ranks. Collective over: group.
  std::vector<ExpertLoad> finish_step(const comm::Communicator& group, bool applied);
  // The same without the host, which may be captured: skip, a number on the device, is 0 when the
  // step was applied. send_loads() then queues the copy to the host, and receive_loads() returns
  // the oldest of those copies; whoever calls it knows that it has arrived. Collective over: group.
  void finish_step_on_device(const comm::Communicator& group, const at::Tensor& skip);
  void send_loads();
  [[nodiscard]] std::vector<ExpertLoad> receive_loads();
  // Forgets what was reported (a step that threw).
  void reset();

  // Live states for checkpoints, whole on every rank: kind "router", one dimension of E.
  [[nodiscard]] std::vector<mesh::StateEntry> state_entries(const std::string& model,
                                                            bool writes) const;

 private:
  [[nodiscard]] bool computes(int layer) const;
  [[nodiscard]] at::Tensor row(int layer);
  void update(const at::Tensor& tokens_LE, const at::Tensor& is_applied);
  [[nodiscard]] std::vector<ExpertLoad> loads_of(const at::Tensor& sums_LX) const;

  plan::ModelShape shape_;
  std::vector<int> layers_;
  at::Tensor bias_LE_, fractions_LE_;       // undefined where unused
  std::vector<param::RouterState> states_;  // by layer of the model; views
  at::Tensor sums_LX_;                      // fp64: tokens of each expert, then the single numbers
  at::Tensor closed_LX_;                    // those of the last step that the device closed
  std::deque<at::Tensor> sent_;             // in pinned memory
  Listener listener_;
  bool wants_entropy_ = false;
};

}  // namespace capstan::parallel
