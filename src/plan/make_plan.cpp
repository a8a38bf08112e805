// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>

#include "capstan/base/bytes.h"
#include "capstan/base/check.h"
#include "capstan/base/text.h"
#include "capstan/plan/frozen.h"
#include "capstan/plan/keep_wide.h"
#include "capstan/plan/optimizer_states.h"
#include "plan/resolve_internal.h"

namespace capstan::plan {
namespace {

// First blocks of the stages: as given, or such that the most expensive stage is as cheap as can
// be.
std::vector<int> split_stages(const ModelShape& shape, const recipe::Pipeline& pipeline,
                              const FlopCount& flops) {
  std::vector<int> begin;
  if (pipeline.split) {
    int block = 0;
    for (const int64_t layers : *pipeline.split) {
      begin.push_back(block);
      block += static_cast<int>(layers) + (block == 0 ? 1 : 0);
    }
    return begin;
  }
  const double layer = (flops.forward.linear + flops.forward.attention) /
                       static_cast<double>(shape.num_hidden_layers);
  std::vector<double> cost(static_cast<size_t>(shape.num_blocks()), layer);
  cost.front() = 0;
  cost.back() = flops.forward.head;
  return balance_stages(cost, static_cast<int>(pipeline.size * pipeline.chunks));
}

ModelPlan make_model_plan(const ModelShape& shape, const Plan& plan) {
  const recipe::Parallel& parallel = plan.resolved.parallel;
  ModelPlan model;
  model.shape = shape;
  std::vector<ParamSpec> table = mark_row_blocks(
      keep_wide(freeze(find_family(shape.family).param_table(shape), plan.resolved.model.frozen),
                plan.resolved.precision.keep_fp32),
      plan.resolved.optimizer);
  model.parameters = count_parameters(table);
  LayoutOptions options;
  options.grid = plan.grid;
  options.zero_stage = static_cast<int>(parallel.zero.stage);
  options.sequence_parallel = parallel.sequence;
  options.stage_begin = split_stages(shape, parallel.pipeline, plan.flops);
  options.stage_of = plan.schedule.stage_of;
  model.layout = Layout(shape, std::move(table), std::move(options));
  return model;
}

FlopCount count_flops(const ModelShape& shape, int64_t sequence_length) {
  FlopCount flops;
  flops.forward = find_family(shape.family).forward_flops(shape, sequence_length);
  flops.per_token = 3 * flops.forward.total();
  return flops;
}

// Stages without a layer hold the embedding (first) or the head (last).
void check_split(Draft& draft, const ModelShape& shape) {
  const recipe::Pipeline& pipeline = draft.recipe.parallel.pipeline;
  if (!pipeline.split) return;
  const std::vector<int64_t>& split = *pipeline.split;
  const int64_t stages = pipeline.size * pipeline.chunks;
  int64_t layers = 0;
  bool is_legal = static_cast<int64_t>(split.size()) == stages;
  for (size_t i = 0; i < split.size(); ++i) {
    layers += split[i];
    const bool is_end = i == 0 || i + 1 == split.size();
    is_legal = is_legal && split[i] >= (is_end && split.size() > 1 ? 0 : 1);
  }
  if (is_legal && layers == shape.num_hidden_layers) return;
  draft.refuse({"parallel.pipeline.split",
                fmt::format("{} stages with {} layers", split.size(), layers),
                fmt::format("{} stages of at least one layer (first and last may have none), {} "
                            "layers in all",
                            stages, shape.num_hidden_layers),
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

// What the parameter table of a family asks for beyond the rules on shapes (legal.cpp), which those
// of this build cannot break.
void check_table(Draft& draft, const ModelShape& shape) {
  const std::vector<ParamSpec> table = find_family(shape.family).param_table(shape);
  const bool has_experts = std::any_of(table.begin(), table.end(),
                                       [](const ParamSpec& spec) { return spec.expert >= 0; });
  if (has_experts != (shape.experts.count > 0))
    draft.refuse({"model.experts.count", std::to_string(shape.experts.count),
                  has_experts ? "at least 1" : "0",
                  fmt::format("model.family {} {}", shape.family,
                              has_experts ? "has experts" : "has no experts"),
                  ""});
  const int64_t tensor = draft.recipe.parallel.tensor;
  for (const ParamSpec& spec : table) {
    if (spec.expert >= 0 || spec.tensor.kind != ShardRule::Kind::kSplit) continue;
    const int64_t size = spec.shape.at(static_cast<size_t>(spec.tensor.dim));
    const int64_t parts = spec.tensor.units > 0 ? std::min(tensor, spec.tensor.units) : tensor;
    const int64_t units = spec.tensor.units > 0 ? spec.tensor.units : size;
    if (size % parts == 0 && units % parts == 0 && tensor % parts == 0) continue;
    draft.refuse(
        {"parallel.tensor", std::to_string(tensor),
         fmt::format("a divisor of {}, dimension {} of {}", units, spec.tensor.dim, spec.name),
         "each tensor-parallel rank takes an equal part",
         fmt::format("Nearest: parallel.tensor {}", nearest_divisors(units, tensor))});
    return;  // other layers say the same
  }
}

// A family that says of no part what running it again costs has none that would.
void check_parts(Draft& draft, const ModelShape& shape) {
  if (draft.recipe.parallel.recompute.mode != "selective") return;
  const ForwardFlops flops = find_family(shape.family).forward_flops(shape, 1);
  if (flops.again_attention > 0 || flops.again_mlp > 0) return;
  draft.refuse({"parallel.recompute.mode", "selective", "none or block",
                fmt::format("layers of model.family {} have no parts that run again", shape.family),
                "Set parallel.recompute.mode: block"});
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
  if (draft.problems.empty()) check_table(draft, shape);
  if (draft.problems.empty()) check_parts(draft, shape);
  if (draft.problems.empty()) check_frozen(draft, shape);
  if (draft.problems.empty()) check_wide(draft, shape);
  if (draft.problems.empty()) check_row_blocks(draft, shape);
  plan.precision = resolve_precision(draft);
  if (draft.problems.empty()) check_fp8(draft, shape);
  const std::optional<BatchPlan> batch = grid ? resolve_batch(draft, *grid) : std::nullopt;
  if (batch) resolve_lr_schedule(draft, *batch);
  if (batch && draft.problems.empty()) check_schedule_fits(draft, *batch);
  check_graphs(draft);
  check_gemm(draft);
  check_in_backward(draft, batch);
  throw_if_refused(draft);

  plan.grid = *grid;
  plan.batch = *batch;
  plan.resolved = draft.recipe;
  plan.flops = count_flops(shape, plan.batch.sequence_length);
  const recipe::Pipeline& pipeline = draft.recipe.parallel.pipeline;
  plan.schedule = build_schedule(
      pipeline.schedule, Pass::kTrain, static_cast<int>(pipeline.size * pipeline.chunks),
      static_cast<int>(plan.batch.micro_batches), static_cast<int>(pipeline.chunks));
  plan.models.emplace("policy", make_model_plan(shape, plan));
  plan.threads_per_rank = static_cast<int>(*draft.recipe.run.threads);
  // Buffers that are updated one by one are summed one by one.
  plan.bucket_bytes =
      draft.recipe.optimizer.in_backward ? 1 : draft.recipe.parallel.bucket_mib * kMiB;
  plan.memory = report_memory(plan, 0);
  plan.traffic = predict_traffic(plan, 0);
  plan.checkpoint_bytes = predict_checkpoint_bytes(plan);
  check_memory(draft, plan);
  check_host_memory(draft, plan);
  throw_if_refused(draft);
  plan.choices = std::move(draft.choices);
  return plan;
}

}  // namespace capstan::plan
