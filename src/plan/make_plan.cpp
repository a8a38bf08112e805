// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include "capstan/base/bytes.h"
#include "capstan/base/check.h"
#include "capstan/base/text.h"
#include "plan/resolve_internal.h"

namespace capstan::plan {
namespace {

ModelPlan make_model_plan(const ModelShape& shape, const Grid& grid,
                          const recipe::Parallel& parallel) {
  ModelPlan model;
  model.shape = shape;
  std::vector<ParamSpec> table = find_family(shape.family).param_table(shape);
  model.parameters = count_parameters(table);
  LayoutOptions options;
  options.grid = grid;
  options.zero_stage = static_cast<int>(parallel.zero.stage);
  options.sequence_parallel = parallel.sequence;
  if (parallel.pipeline.split) {
    int block = 0;
    for (const int64_t layers : *parallel.pipeline.split) {
      options.stage_begin.push_back(block);
      block += static_cast<int>(layers) + (block == 0 ? 1 : 0);
    }
  }
  model.layout = Layout(shape, std::move(table), std::move(options));
  return model;
}

FlopCount count_flops(const ModelShape& shape, int64_t sequence_length) {
  FlopCount flops;
  flops.forward = find_family(shape.family).forward_flops(shape, sequence_length);
  flops.per_token = 3 * flops.forward.total();
  return flops;
}

void check_split(Draft& draft, const ModelShape& shape) {
  const recipe::Pipeline& pipeline = draft.recipe.parallel.pipeline;
  if (!pipeline.split) return;
  int64_t layers = 0;
  bool is_positive = true;
  for (const int64_t part : *pipeline.split) {
    layers += part;
    is_positive = is_positive && part > 0;
  }
  if (is_positive && layers == shape.num_hidden_layers &&
      static_cast<int64_t>(pipeline.split->size()) == pipeline.size)
    return;
  draft.refuse({"parallel.pipeline.split",
                fmt::format("{} stages with {} layers", pipeline.split->size(), layers),
                fmt::format("{} stages of at least one layer, {} layers in all", pipeline.size,
                            shape.num_hidden_layers),
                "", "Set parallel.pipeline.split: auto"});
}

void check_family(Draft& draft) {
  const std::vector<std::string> names = family_names();
  for (const std::string& name : names)
    if (name == draft.recipe.model.family) return;
  draft.refuse({"model.family", "'" + draft.recipe.model.family + "'",
                "one of " + join(names, ", "), "", ""});
}

// Sizes within the range of each key can still multiply to a model that 64 bits do not describe.
void check_size(Draft& draft, const ModelShape& shape) {
  constexpr double kMost = 1e15;
  const ForwardFlops flops = find_family(shape.family).forward_flops(shape, 1);
  const double parameters = (flops.linear + 2 * flops.head) / 2;
  if (parameters > kMost)
    draft.refuse({"model.num_hidden_layers", fmt::format("about {:.1e} parameters", parameters),
                  fmt::format("at most {:.0e}", kMost), "sizes beyond that cannot be planned", ""});
}

void throw_if_refused(Draft& draft) {
  if (!draft.problems.empty()) throw recipe::RecipeError(std::move(draft.problems));
}

}  // namespace

Plan make_plan(const recipe::Resolved& recipe, const Topology& topology, const PlanInputs& inputs) {
  CAPSTAN_CHECK(topology.world_size >= 1 && topology.local_size >= 1,
                "a world of {} ranks, {} here", topology.world_size, topology.local_size);
  Draft draft{recipe, topology, inputs, recipe.recipe};
  Plan plan;
  plan.topology = topology;
  check_family(draft);
  resolve_run(draft);
  const ModelShape shape = resolve_shape(draft);
  const std::optional<Grid> grid = resolve_grid(draft, shape);
  check_split(draft, shape);
  if (draft.problems.empty()) check_size(draft, shape);
  plan.precision = resolve_precision(draft);
  const std::optional<BatchPlan> batch = grid ? resolve_batch(draft, *grid) : std::nullopt;
  if (batch) resolve_lr_schedule(draft, *batch);
  throw_if_refused(draft);

  plan.grid = *grid;
  plan.batch = *batch;
  plan.resolved = draft.recipe;
  plan.models.emplace("policy", make_model_plan(shape, plan.grid, draft.recipe.parallel));
  const recipe::Pipeline& pipeline = draft.recipe.parallel.pipeline;
  plan.schedule = build_schedule(
      pipeline.schedule, Pass::kTrain, static_cast<int>(pipeline.size * pipeline.chunks),
      static_cast<int>(plan.batch.micro_batches), static_cast<int>(pipeline.chunks));
  plan.flops = count_flops(shape, plan.batch.sequence_length);
  plan.threads_per_rank = static_cast<int>(*draft.recipe.run.threads);
  plan.bucket_bytes = draft.recipe.parallel.bucket_mib * kMiB;
  plan.memory = report_memory(plan, 0);
  plan.traffic = predict_traffic(plan, 0);
  plan.checkpoint_bytes = predict_checkpoint_bytes(plan);
  check_memory(draft, plan);
  throw_if_refused(draft);
  plan.choices = std::move(draft.choices);
  return plan;
}

}  // namespace capstan::plan
