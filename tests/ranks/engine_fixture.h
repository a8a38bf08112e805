// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// A tiny model, its data as pure functions, and training runs on thread ranks.
#pragma once
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "capstan/engine/engine.h"

namespace capstan::engine::testing {

struct TinyRun {
  int ranks = 1;
  int steps = 4;
  std::vector<std::string> overrides;  // of the tiny recipe: fp64, 8 samples of 12 tokens a step
  int64_t bucket_bytes = 1;            // one bucket per buffer
  std::vector<int> frozen_blocks = {};
  // On the fake device, of which the plan does not know: run.graphs, run.gemm and the engine's
  // file.
  bool graphs = false;
  std::string gemm = "auto", gemm_file = {};
};
[[nodiscard]] plan::Plan make_tiny_plan(const TinyRun& run);

// What all ranks of a step train on depends on the step only. Targets are ignored and documents cut
// unevenly over samples: sample 5 of each step has no target at all.
[[nodiscard]] std::vector<MicroBatch> make_batches(const plan::Plan& plan, int rank, int64_t step);

using Weights = std::map<std::string, Tensor>;
[[nodiscard]] Weights copy_weights(Engine& engine);

struct TinyResult {
  std::vector<StepReport> reports;  // of rank 0; checked equal on all ranks
  Weights weights;                  // of rank 0
  std::string hash;
};
// Trains from scratch. `hooks(rank)` gives each rank's hooks; `objective(rank)` its objective
// (null: next token).
struct TinyHooks {
  std::function<EngineHooks(int rank)> hooks;
  std::function<std::unique_ptr<Objective>(int rank)> objective;
};
[[nodiscard]] TinyResult train(const TinyRun& run, const TinyHooks& hooks = {});

// Runs fn(rank, engine) on each rank with a fresh engine.
void with_engines(const TinyRun& run, const std::function<void(int rank, Engine&)>& fn,
                  const TinyHooks& hooks = {});

// |a - b| <= tolerance max(1, |b|) for all losses, norms and weights.
void expect_same_run(const TinyResult& a, const TinyResult& b, double tolerance);

}  // namespace capstan::engine::testing
