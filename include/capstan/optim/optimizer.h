// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Optimizers work on shards of flat buffers and are found by optimizer.name, so a new one is a
// class here and a value in the recipe's table.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "capstan/parallel/shard.h"
#include "capstan/recipe/recipe.h"

namespace capstan::optim {

struct UpdateStep {
  double lr = 0;
  double gradient_scale =
      1;              // clip factor / loss scale: the true gradient is this times the buffer
  int64_t count = 1;  // number of this update, from 1; skipped steps do not count
  uint64_t seed = 0;  // of stochastic rounding
};

struct StepNumbers;  // device_step.h

// What a pass on labels drawn from the model has left.
struct CurvaturePass {
  double tokens = 1;          // its gradients are those of a mean over so many
  double gradient_scale = 1;  // 1 / loss scale: the true gradient is this times the buffer
  int64_t count = 0;          // updates so far
  uint64_t seed = 0;          // of stochastic rounding
  const StepNumbers* on_device = nullptr;  // the count is read there
};

// One state tensor of one shard, laid out like it: a value for every `block` elements. Padding is
// zero.
struct OptimizerState {
  std::string kind;  // "exp_avg"
  size_t shard = 0;  // index into the shards the optimizer was made with
  at::Tensor values;
  int64_t block = 1;
};

class Optimizer {
 public:
  virtual ~Optimizer() = default;
  // Updates master and copy of all shards. Padding stays zero.
  virtual void step(const UpdateStep& step) = 0;
  // The same by numbers that are in device memory, where a step may also be skipped: nothing waits
  // for them. Only where reads_device_numbers() is true.
  virtual void step_on_device(const StepNumbers& numbers, uint64_t seed);
  [[nodiscard]] virtual bool reads_device_numbers() const { return false; }
  // Whether the step after `finished_steps` begins with a pass on labels drawn from the model, and
  // what that pass is for: its gradients are in the shards. A function of the count alone.
  [[nodiscard]] virtual bool wants_curvature(int64_t /*finished_steps*/) const { return false; }
  virtual void observe_curvature(const CurvaturePass& pass);
  // Views of live storage, for checkpoints. Equal order for equal shards.
  [[nodiscard]] virtual std::vector<OptimizerState> states() = 0;
};

// Frozen shards (without gradient) are not among `shards`. Where plan::rounds_by_index()
// they are numbered (FlatStore::numbered_shard).
using OptimizerBuilder = std::function<std::unique_ptr<Optimizer>(
    const recipe::Optimizer&, const std::vector<parallel::Shard>& shards)>;

// Throws ConfigError naming what exists.
[[nodiscard]] std::unique_ptr<Optimizer> make_optimizer(const recipe::Optimizer& recipe,
                                                        const std::vector<parallel::Shard>& shards);
// Replaces one of the same name. Thread-safe, as is make_optimizer.
void register_optimizer(const std::string& name, OptimizerBuilder builder);
[[nodiscard]] std::vector<std::string> optimizer_names();

}  // namespace capstan::optim
