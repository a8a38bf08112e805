// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Steps of make_plan. Each fixes the `auto` values of its part in Draft::recipe, notes the choices
// and collects problems instead of throwing, so that a user sees all of them at once.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "capstan/plan/param_patterns.h"
#include "capstan/plan/plan.h"

namespace capstan::plan {

struct ProblemText {
  std::string key, got, need, why, fix;
};

struct Draft {
  const recipe::Resolved& input;
  const Topology& topology;
  const PlanInputs& inputs;
  recipe::Recipe recipe;  // input.recipe with autos fixed so far
  std::vector<recipe::Problem> problems = {};
  std::vector<std::string> choices = {};

  void refuse(ProblemText text);
  void choose(const std::string& key, const std::string& value, const std::string& why);
  // The user wrote the key, as opposed to a default.
  [[nodiscard]] bool is_given(const std::string& key) const;
};

// "24 or 32": the multiples of `unit` next to `value`, at least one unit.
[[nodiscard]] std::string nearest_multiples(int64_t value, int64_t unit);
// "4 or 8": the divisors of `count` next to `wanted`.
[[nodiscard]] std::string nearest_divisors(int64_t count, int64_t wanted);

void resolve_run(Draft& draft);
[[nodiscard]] ModelShape resolve_shape(Draft& draft);
void resolve_experts(Draft& draft, ModelShape& shape);
// shards: ranks that share one copy; none while they are not known.
void check_expert_axis(Draft& draft, const ModelShape& shape, std::optional<int64_t> shards);
[[nodiscard]] std::optional<Grid> resolve_grid(Draft& draft, const ModelShape& shape);
// The table of legal combinations (src/plan/legal.cpp), for what needs no rank grid.
void check_layout(Draft& draft, const ModelShape& shape);
// Micro-batches that a schedule runs together: their number is a multiple of it.
[[nodiscard]] int64_t round_of(const recipe::Pipeline& pipeline);
void check_schedule_fits(Draft& draft, const BatchPlan& batch);
// Patterns over names of parameters: each must match one.
void check_patterns(Draft& draft, const char* key, const std::vector<std::string>& patterns,
                    const std::vector<ParamSpec>& table);
struct TearRefusal {
  const char *key, *state, *need;
};
void refuse_torn(Draft& draft, const TearRefusal& refusal, const std::vector<TornUnit>& torn);
void check_frozen(Draft& draft, const ModelShape& shape);
void check_wide(Draft& draft, const ModelShape& shape);
// Blocks of 8-bit states lie whole on a rank.
void check_row_blocks(Draft& draft, const ModelShape& shape);
void check_fp8(Draft& draft, const ModelShape& shape);
void check_graphs(Draft& draft);
// After the precision.
void check_gemm(Draft& draft);
void check_in_backward(Draft& draft, const std::optional<BatchPlan>& batch);
[[nodiscard]] PrecisionPlan resolve_precision(Draft& draft);
[[nodiscard]] std::optional<BatchPlan> resolve_batch(Draft& draft, const Grid& grid);
void resolve_lr_schedule(Draft& draft, const BatchPlan& batch);

// All of these read a plan whose models, grid, schedule, precision and batch are set.
[[nodiscard]] int64_t predict_checkpoint_bytes(const Plan& plan);
// Of one micro-batch on one rank of the tensor and context axes.
[[nodiscard]] ActivationBytes activation_bytes_of(const Plan& plan);
void check_memory(Draft& draft, const Plan& plan);
void check_host_memory(Draft& draft, const Plan& plan);  // what a GPU's ranks keep there

}  // namespace capstan::plan
