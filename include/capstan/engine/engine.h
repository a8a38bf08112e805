// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// One optimizer step of one rank: micro-batches through the blocks by the plan's schedule, gradient
// sums, clipping, optimizer. Used by the trainer and by loops of users (examples/custom_loop.cpp).
// All ranks of the mesh call the same methods in the same order.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "capstan/mesh/mesh.h"
#include "capstan/mesh/state_entry.h"
#include "capstan/nn/model.h"
#include "capstan/parallel/expert_balance.h"
#include "capstan/plan/plan.h"

namespace capstan::engine {

using at::Tensor;

// One micro-batch of this rank. Targets of -100 are ignored.
struct MicroBatch {
  Tensor ids_BT, targets_BT;  // int64
  param::RowMap rows;
};

// How token losses become the loss of a step. Weights use the step's global denominators.
class Objective {
 public:
  virtual ~Objective() = default;
  // What the step's weights are divided by, counted on this rank; summed over data ranks before any
  // forward.
  [[nodiscard]] virtual double local_denominator(const std::vector<MicroBatch>& batches) const = 0;
  // Fixed token weights [B, T] given the global denominator, or an undefined tensor when the loss
  // is not a weighted sum of token losses; then loss() is used.
  [[nodiscard]] virtual Tensor weights(const MicroBatch& batch,
                                       double global_denominator) const = 0;
  [[nodiscard]] virtual Tensor loss(const nn::TokenScores& scores, const MicroBatch& batch,
                                    double global_denominator) const = 0;
};
// Mean over the target tokens of the step: the objective of pretraining.
[[nodiscard]] std::unique_ptr<Objective> make_next_token_objective();

struct StepReport {
  int64_t step = 0;  // finished steps, this one included
  double loss =
      0;  // mean over the target tokens of this step, all ranks; may be non-finite when skipped
  double grad_norm = 0;  // before clipping
  double lr = 0;
  int64_t target_tokens = 0;        // all ranks
  int64_t tokens = 0, samples = 0;  // of all finished steps and ranks
  // Empty, or why: "nonfinite loss", "nonfinite gradient", "spike", "no target tokens".
  std::string skipped;
  std::optional<double> loss_scale;
  std::vector<parallel::ExpertLoad> experts;  // of all layers, all ranks
};

// Scalars that a resume needs besides the state entries; the same on all ranks.
struct EngineScalars {
  int64_t step = 0;             // finished steps, skipped ones included
  int64_t optimizer_count = 0;  // applied updates
  int64_t tokens = 0, samples = 0;
  int64_t nonfinite_in_row = 0, skipped_total = 0;
  double loss_scale = 0;
  int64_t good_steps_at_scale = 0;
  std::vector<double> spike_losses, spike_norms;  // window, oldest first
};

// Sums over all ranks of an evaluation pass.
struct EvalReport {
  double loss_sum = 0;  // nats
  int64_t target_tokens = 0;
  [[nodiscard]] double loss() const {
    return target_tokens ? loss_sum / static_cast<double>(target_tokens) : 0;
  }
};

struct EngineHooks {
  // For tests of order and faults: called with "forward", "backward", "reduce" and the block (or
  // bucket) concerned.
  std::function<void(const char* what, int index)> trace;
  // Before and after a bucket's gradients are summed over ranks; may write to them.
  std::function<void(int bucket, const Tensor&gradients)> before_reduce, after_reduce;
  // What experts report in the forward passes of a step, before any sum over ranks.
  parallel::ExpertBalance::Listener experts;
};

struct EngineOptions {
  EngineHooks hooks = {};
  bool trains = true;       // false: weights only, without gradients and optimizer
  bool initializes = true;  // false: weights are zero until a load and restore()
  // Where rank 0 keeps what was measured for run.gemm, and reads it before the first step; empty:
  // nowhere.
  std::string gemm_file = {};
};

class Engine {
 public:
  // Builds storage, model and optimizer of this rank by the plan; weights are initialised from
  // run.seed. Collective over: world.
  Engine(const plan::Plan& plan, mesh::Mesh& mesh, EngineOptions options = {});
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Runs one step over plan.batch.micro_batches micro-batches of this rank's data coordinate, in
  // whole rows: ranks that differ along pp, cp and tp only are handed the same ones.
  // Throws DivergenceError after optimizer.nonfinite_limit skipped steps in a row (the same on all
  // ranks). On a device the host waits for the step's end. Collective over: world.
  StepReport step(const std::vector<MicroBatch>& batches, const Objective& objective);

  // The two halves of step(), for loops that keep a device busy: start_step queues a step and its
  // update, finish_step gives the report of the oldest step that has none yet (and throws as step()
  // does). Where reports_late() is true nothing in start_step waits for the device, so a loop
  // starts the next step before it finishes this one; else a started step is done. Collective over:
  // world.
  void start_step(const std::vector<MicroBatch>& batches, const Objective& objective);
  StepReport finish_step();
  [[nodiscard]] int64_t unreported_steps() const;
  // Loss, gradient norm and what follows from them stay on the device. False on the CPU and where
  // the host decides; the log says why at the start.
  [[nodiscard]] bool reports_late() const;

  // Adds the scores of one micro-batch; call report_eval when all are in. `per_token` receives log
  // p(target) [B, T] of whole rows; all ranks give it or none. Collective over: pp, cp, tp.
  void evaluate(const MicroBatch& batch,
                const std::function<void(const Tensor& logprob_BT)>& per_token = {});
  [[nodiscard]] EvalReport report_eval();  // sums, resets. Collective over: world.

  // Logits of the last position of each row [B, V], the same on the ranks that share the rows; with
  // a cache the ids are the new tokens only. Collective over: pp, tp.
  [[nodiscard]] Tensor next_logits(const Tensor& ids_BT, param::KvCache* cache);

  // Views of live storage: master weights and moments, as this rank holds them. Valid until the
  // engine dies.
  [[nodiscard]] std::vector<mesh::StateEntry> state_entries();
  // Not while steps are unreported.
  [[nodiscard]] EngineScalars scalars() const;
  // After state entries were written to: refreshes compute copies and versions. Collective over:
  // world.
  void restore(const EngineScalars& scalars);
  // Hash of all master weights, the same for every layout. Collective over: world.
  [[nodiscard]] std::string weights_hash();
  [[nodiscard]] const plan::Plan& plan() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace capstan::engine
