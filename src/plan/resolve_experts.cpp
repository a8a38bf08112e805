// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Experts of the model shape, and their axis of the grid.
#include <fmt/format.h>

#include <numeric>

#include "capstan/base/bytes.h"
#include "capstan/plan/experts.h"
#include "plan/moe_internal.h"
#include "plan/resolve_internal.h"
#include "plan/saturate_internal.h"

namespace capstan::plan {
namespace {

// Rules of the recipe keep each size in its range; together they may still be too many.
void check_expert_size(Draft& draft, const ModelShape& shape) {
  const ExpertShape& e = shape.experts;
  const int64_t one = saturating_multiply(3 * e.intermediate_size, shape.hidden_size);
  const int64_t all =
      saturating_multiply(saturating_multiply(one, e.count), shape.num_hidden_layers);
  constexpr int64_t kMost = 1'000'000'000'000'000;
  if (all > kMost)
    draft.refuse({"model.experts.count", fmt::format("{:.1e} parameters", static_cast<double>(all)),
                  "at most 1e15 in all experts", "sizes beyond that cannot be planned", ""});
}

}  // namespace

void resolve_experts(Draft& draft, ModelShape& shape) {
  recipe::Experts& from = draft.recipe.model.experts;
  if (from.count == 0) return;
  if (!from.intermediate_size) {
    from.intermediate_size = shape.intermediate_size;
    draft.choose("model.experts.intermediate_size", std::to_string(shape.intermediate_size),
                 "model.intermediate_size");
  }
  shape.experts = {.count = from.count,
                   .per_token = from.per_token,
                   .intermediate_size = *from.intermediate_size,
                   .shared_intermediate_size = from.shared_intermediate_size,
                   .shared_gate = from.shared_gate,
                   .router = from.router,
                   .normalize_weights = from.normalize_weights,
                   .groups = from.groups,
                   .groups_per_token = from.groups_per_token,
                   .scaling = from.scaling,
                   .auxiliary_loss = from.auxiliary_loss,
                   .auxiliary_scope = from.auxiliary_scope,
                   .z_loss = from.z_loss,
                   .bias_update_rate = from.bias_update_rate,
                   .capacity_factor = from.capacity_factor};
  check_expert_size(draft, shape);
}

void check_expert_axis(Draft& draft, const ModelShape& shape, std::optional<int64_t> shards) {
  const recipe::Parallel& parallel = draft.recipe.parallel;
  const int64_t wanted = parallel.expert, count = shape.experts.count;
  if (wanted == 1) return;
  if (count == 0) {
    draft.refuse({"parallel.expert", std::to_string(wanted), "1", "the model has no experts",
                  "Leave the key out, or set model.experts.count"});
    return;
  }
  const std::optional<int64_t> ranks =
      shards ? std::optional(*shards * parallel.context.size * parallel.tensor) : std::nullopt;
  const std::string nearest =
      fmt::format("Nearest: {}", nearest_divisors(ranks ? std::gcd(count, *ranks) : count, wanted));
  if (count % wanted != 0)
    draft.refuse({"parallel.expert", std::to_string(wanted),
                  fmt::format("a divisor of model.experts.count {}", count),
                  "each rank holds as many experts", nearest});
  else if (ranks && *ranks % wanted != 0)
    draft.refuse({"parallel.expert", std::to_string(wanted),
                  fmt::format("a divisor of shards {} x context {} x tensor {} = {}", *shards,
                              parallel.context.size, parallel.tensor, *ranks),
                  "experts spread over these ranks, never over replicas",
                  nearest + (*shards == 1 ? "; or make shards with parallel.zero.stage" : "")});
}

std::optional<GroupedObstacle> grouped_obstacle(const recipe::Recipe& r) {
  constexpr int64_t kRow = 8;  // numbers of bf16 in 16 bytes
  constexpr int64_t kMostExperts = 1023;
  const recipe::Experts& e = r.model.experts;
  if (r.precision.compute != "bf16")
    return GroupedObstacle{"experts are multiplied in one product in bf16 alone",
                           "Set precision.compute: bf16"};
  if (e.count > kMostExperts)
    return GroupedObstacle{fmt::format("one product takes at most {} experts", kMostExperts),
                           fmt::format("Set model.experts.count to at most {}", kMostExperts)};
  if (r.model.hidden_size % kRow == 0 && e.intermediate_size.value_or(0) % kRow == 0) return {};
  return GroupedObstacle{
      "experts are multiplied in one product if their sizes are multiples of 8",
      "Set model.hidden_size and model.experts.intermediate_size to multiples of 8"};
}

int64_t exchanged_rows(const recipe::Recipe& r, const ModelShape& shape, const BatchPlan& batch,
                       int64_t tokens) {
  const bool is_fixed = r.run.device == "cuda" && r.parallel.expert > 1 &&
                        shape.experts.capacity_factor && !grouped_obstacle(r);
  if (!is_fixed) return 0;
  return saturating_multiply(shape.experts.count, expert_room(shape.experts, batch.micro_samples,
                                                              batch.sequence_length, tokens));
}

int64_t rows_with_room(const recipe::Recipe& r, const ModelShape& shape, const BatchPlan& batch,
                       int64_t tokens) {
  if (r.parallel.expert > 1) return exchanged_rows(r, shape, batch, tokens);
  if (r.run.device != "cuda" || grouped_obstacle(r)) return 0;
  return saturating_multiply(
      shape.experts.count,
      own_expert_room(shape.experts, batch.micro_samples, batch.sequence_length, tokens));
}

bool knows_expert_rows(const Plan& plan) {
  const Grid::Sizes& sizes = plan.grid.sizes();
  if (sizes.ep > 1) return true;
  const BatchPlan& batch = plan.batch;
  const int64_t tokens = saturating_multiply(batch.micro_samples, batch.sequence_length / sizes.cp);
  return own_expert_room(plan.model().shape.experts, batch.micro_samples, batch.sequence_length,
                         (tokens + sizes.tp - 1) / sizes.tp) > 0;
}

}  // namespace capstan::plan
