// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// `capstan prove`: runs the layout of a recipe, at reduced size and in fp64, on rank threads of
// this process and compares it with the run of one rank: losses, gradient norms, evaluation and,
// after every step and on every rank, every element of the parameters and of the optimizer's state.
// Reads no data and no tokenizer: rows are drawn from a seed.
#pragma once
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "capstan/engine/engine.h"
#include "capstan/plan/plan.h"

namespace capstan::trainer {

// What was changed to make a recipe small.
struct ReductionNote {
  std::string key, before, after, why;
};
struct ReducedRun {
  recipe::Recipe recipe;  // every `auto` that matters fixed
  int ranks = 1;
  std::optional<int64_t> bucket_bytes;  // in place of the plan's, which hold the small model whole
  std::vector<ReductionNote> notes;     // only what differs
};
// The smallest run of the same layout: number of stages, chunks, shards and replicas, which sizes
// divide by which, whether key/value heads are cut or copied, how many micro-batches a pipeline
// has, ties, windows and documents stay. Above `most_ranks` ranks the data axes become shorter,
// down to 2, then the longest of the others. Pure; the plan is of the whole recipe.
[[nodiscard]] ReducedRun reduce_run(const plan::Plan& whole, int most_ranks = 64);
// The same run on one rank, a step in one micro-batch.
[[nodiscard]] recipe::Recipe on_one_rank(const recipe::Recipe& recipe);

struct ProveOptions {
  recipe::Resolved recipe;
  // Ranks of the whole run. None: the product of the axes; `parallel.data: auto` then takes two
  // groups of shards, or the nearest number that the batch allows.
  std::optional<int> world;
  int steps = 4;
  uint64_t seed = 1;  // of initial weights and rows
  double bar = 1e-9;
  double timeout_s = 600;                              // of every wait of a rank
  std::function<engine::EngineHooks(int rank)> hooks;  // of the layout's ranks, for tests
};

// |a - b| / max(|b|, 1e-3), of a tensor by its largest elements.
struct ErrorRow {
  std::string kind;    // "loss", "gradient norm", "evaluation", "model", "optimizer.exp_avg", ...
  std::string group;   // of parameters (plan::parameter_groups); empty for numbers of the run
  int64_t values = 0;  // compared, over all ranks and steps
  double error = 0;
};
// Where the run first leaves that of one rank: of the first step with an error above the bar the
// largest one.
struct Difference {
  int64_t step = 0;   // from 1
  std::string what;   // "loss", or kind and name of a tensor
  plan::Shape shape;  // of the whole tensor; empty for numbers of the run
  plan::Box box;      // the part that this rank holds
  int rank = 0;
  double error = 0;
  std::string text;  // what differs, if no number says it
};
struct ProveReport {
  ReducedRun reduced;
  std::string layout;  // in words
  std::vector<ErrorRow> rows;
  double error = 0;  // the largest one
  double bar = 0;
  std::optional<Difference> first;
  [[nodiscard]] bool is_proven() const { return !first.has_value(); }
};
// Throws RecipeError when the recipe itself is refused, comm::RankError when a rank fails.
[[nodiscard]] ProveReport prove(const ProveOptions& options);

// "tensor 2 with sequence, pipeline 2 (1f1b), data 2 (ZeRO 3, 2 shards) on 8 ranks".
[[nodiscard]] std::string describe_layout(const recipe::Recipe& recipe, int ranks);
[[nodiscard]] std::string describe(const Difference& difference, double bar);

}  // namespace capstan::trainer
