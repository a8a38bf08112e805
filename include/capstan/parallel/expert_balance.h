// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// ExpertBalance: what experts report during an optimizer step, and what follows from it for the
// next one: biases of routers and the fractions behind a global auxiliary loss. The engine passes
// it as Context::stats in Mode::kTrain, its states() as Context::routers in every pass, and calls
// finish_step() after the last micro-batch.
#pragma once
#include <ATen/core/Tensor.h>

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

// Belongs to one rank. States and sums lie on the device of the run: reports do not wait for it,
// finish_step() does.
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
  // Forgets what was reported (a step that threw).
  void reset();

  // Live states for checkpoints, whole on every rank: kind "router", one dimension of E.
  [[nodiscard]] std::vector<mesh::StateEntry> state_entries(const std::string& model,
                                                            bool writes) const;

 private:
  [[nodiscard]] bool computes(int layer) const;
  [[nodiscard]] at::Tensor row(int layer);
  void update(const ExpertLoad& load);

  plan::ModelShape shape_;
  std::vector<int> layers_;
  std::vector<param::RouterState> states_;  // by layer of the model
  at::Tensor sums_LX_;                      // fp64: tokens of each expert, then the single numbers
  Listener listener_;
  bool wants_entropy_ = false;
};

}  // namespace capstan::parallel
