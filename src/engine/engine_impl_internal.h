// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What an Engine is made of. engine.cpp makes it and has what does not train; engine_steps.cpp is
// the optimizer step.
#pragma once
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "capstan/device/accelerator.h"
#include "capstan/engine/engine.h"
#include "capstan/optim/optimizer.h"
#include "engine/backward_updates_internal.h"
#include "engine/device_decision_internal.h"
#include "engine/executor_internal.h"
#include "engine/gemm_choices_internal.h"
#include "engine/host_updates_internal.h"
#include "engine/micro_batch_internal.h"
#include "engine/step_control_internal.h"
#include "engine/step_graph_internal.h"

namespace capstan::engine {

inline constexpr const char* kModel = "policy";

// What makes steps that a graph cannot repeat.
[[noreturn]] void refuse_graph(std::string got);

struct Engine::Impl {
  Impl(const plan::Plan& plan_in, mesh::Mesh& mesh_in, const EngineOptions& options);
  void make_optimizer();
  void choose_who_decides();
  void check_experts_of_graph() const;
  // Stochastic rounding asks for the index of each element.
  [[nodiscard]] std::vector<parallel::Shard> shards_of_optimizer() const;
  // Of one micro-batch or all of a step.
  template <class Rows>
  [[nodiscard]] Rows parts_of(const Rows& rows) const {
    return cut_rows(finds_documents ? find_documents(rows) : rows, context.size(), context.rank());
  }
  // What only ranks of the last stage have, on all.
  [[nodiscard]] Tensor from_last_stage(const Tensor& made, const std::vector<int64_t>& shape,
                                       at::ScalarType type) const;
  // Scores of whole rows out of this rank's part of them.
  [[nodiscard]] Tensor whole_rows(const Tensor& part_BT, const MicroBatch& batch) const;
  [[nodiscard]] param::Context without_gradient(param::Mode mode, const param::RowMap& rows) const;
  [[nodiscard]] bool has_history() const { return model.fp8 && model.fp8->is_delayed(); }
  [[nodiscard]] std::vector<mesh::StateEntry> fp8_entries() const;

  // Loss, gradient squares and flags of all ranks in one small reduction.
  StepSums sum_over_ranks(double local_loss, const optim::SquareSums& squares,
                          int64_t target_tokens);
  // The maxima of delayed scaling become those of all ranks, so that histories are the same
  // everywhere and outlive a change of the layout.
  void join_maxima();
  [[nodiscard]] optim::SquareSums own_squares();
  void apply(const StepControl::Update& update);
  void publish() {
    for (const size_t s : shard_stores) model.stores[s]->publish();
  }
  // Loss and gradient norm are read here.
  void close_step(const Tensor& loss, int64_t target_tokens);
  // Nothing is read: a skipped step changes no weight, so publishing it does no harm.
  void step_on_device(const StepWork& work, int64_t target_tokens);
  void run_passes(const StepWork& work, Tensor& loss);
  [[nodiscard]] int64_t started_steps() const;
  [[nodiscard]] Tensor scale_on_device() const;
  // The optimizer's own pass before that of the step: the same rows, with labels that the model
  // draws.
  void estimate_curvature(StepWork work, const std::vector<MicroBatch>& on_host);
  void run_curvature(const StepWork& work, const optim::CurvaturePass& pass);
  void update_on_device(const Tensor& loss);
  // What the graphs read of a step, where they read it.
  void load_graph(StepWork& work);
  void step_by_graph(StepWork work);
  [[nodiscard]] StepReport next_report();

  plan::Plan plan;
  mesh::Mesh& mesh;
  const at::Device device = device::run_device();
  const bool finds_documents = uses_document_starts(plan, device);
  parallel::ParallelModel model;
  StepControl control;
  Executor executor;
  comm::Communicator data, stage, context, pipeline, world;
  std::vector<parallel::Shard> shards;  // trainable ones
  std::vector<size_t> shard_stores;     // their stores
  std::unique_ptr<optim::Optimizer> optimizer;
  std::optional<BackwardUpdates> in_backward;  // optimizer.in_backward
  std::optional<HostUpdates> host_updates;     // parallel.zero.offload
  std::optional<DeviceDecision> on_device;     // where the host does not wait for it
  std::optional<StepGraph> graph;              // run.graphs
  std::unique_ptr<GemmChoices> gemm;           // run.gemm, where it is not LibTorch
  std::deque<StepReport> reports;              // of finished steps, not handed out yet
  EvalReport eval;
};

}  // namespace capstan::engine
