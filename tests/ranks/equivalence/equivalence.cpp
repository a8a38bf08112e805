// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "ranks/equivalence/equivalence.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <mutex>

#include "capstan/base/error.h"
#include "capstan/comm/threads.h"
#include "capstan/ops/router.h"
#include "ranks/engine_fixture.h"
#include "support/run_ranks.h"

namespace capstan::test {
namespace {

using engine::Engine;

double relative(double a, double b) {
  const double error = std::fabs(a - b) / std::max(1e-3, std::fabs(b));
  return std::isnan(error) ? INFINITY : error;
}

at::Tensor part_of(const at::Tensor& whole, const plan::Box& box) {
  at::Tensor part = whole;
  for (size_t d = 0; d < box.begin.size(); ++d)
    part = part.narrow(static_cast<int64_t>(d), box.begin[d], box.extent[d]);
  return part.reshape({-1});
}

// One rank's entries against the reference.
void compare_state(Engine& engine, const ReferenceRun& reference, Comparison& result) {
  for (const auto& entry : engine.state_entries()) {
    const std::string key = entry.kind + "/" + entry.name;
    const at::Tensor& whole = reference.state.at(key);
    const double scale = std::max(1e-3, whole.abs().max().item<double>());
    const double error = entry.tensor.cpu()
                             .to(at::kDouble)
                             .sub(part_of(whole, entry.box).to(at::kDouble))
                             .abs()
                             .max()
                             .item<double>() /
                         scale;
    if (error <= result.state) continue;
    result.state = std::isnan(error) ? INFINITY : error;
    result.worst = key;
  }
}

double experts_error(const std::vector<parallel::ExpertLoad>& mine,
                     const std::vector<parallel::ExpertLoad>& all) {
  if (mine.size() != all.size()) return INFINITY;
  double error = 0;
  for (const parallel::ExpertLoad& load : mine) {
    const auto same = std::find_if(all.begin(), all.end(),
                                   [&](const auto& other) { return other.layer == load.layer; });
    if (same == all.end() || same->tokens.size() != load.tokens.size()) return INFINITY;
    for (size_t e = 0; e < load.tokens.size(); ++e)
      error = std::max(error, relative(load.tokens[e], same->tokens[e]));
    error = std::max({error, relative(load.dropped, same->dropped),
                      relative(load.routed_tokens, same->routed_tokens),
                      relative(load.auxiliary_loss, same->auxiliary_loss),
                      relative(load.z_loss, same->z_loss)});
  }
  return error;
}

std::vector<engine::MicroBatch> batches_of(const Engine& engine, int rank, int64_t step) {
  return engine::testing::make_batches(engine.plan(), engine.plan().grid.data_parallel_index(rank),
                                       step);
}

// Keeps the smallest margin of a router's choice.
engine::EngineHooks watch_choices(const plan::Plan& plan, double& margin) {
  const plan::ExpertShape& experts = plan.model().shape.experts;
  const ops::RouterSpec spec{.per_token = experts.per_token,
                             .sigmoid = experts.router == "sigmoid",
                             .groups = experts.groups,
                             .groups_per_token = experts.groups_per_token};
  engine::EngineHooks hooks;
  hooks.experts = [spec, &margin](const char* name, int, const at::Tensor& value,
                                  const param::RouterState& state) {
    if (std::string_view(name) == "router_scores")
      margin = std::min(margin, ops::choice_margin(value, state.bias_E, spec));
  };
  return hooks;
}

// How small the sums are whose rounding would show: what Lion takes the sign of, out of the moment
// before and after (m' = b2 m + (1 - b2) g), and what Sophia divides, m / (rho h), where it clips,
// as it does everywhere before the first estimate.
class WatchDirections {
 public:
  explicit WatchDirections(const plan::Plan& plan) : optimizer_(plan.resolved.optimizer) {}

  // After each step; returns the smallest of the step that is not 0.
  double smallest(Engine& engine) {
    double smallest = INFINITY;
    if (optimizer_.name == "adamw") return smallest;
    std::map<std::string, at::Tensor> moments, curvatures;
    for (const auto& entry : engine.state_entries()) {
      if (entry.kind == "optimizer.exp_avg") moments[entry.name] = entry.tensor;
      if (entry.kind == "optimizer.hessian") curvatures[entry.name] = entry.tensor;
    }
    for (const auto& [name, moment] : moments) {
      const at::Tensor size = optimizer_.name == "lion" ? direction(before_[name], moment)
                                                        : steadiness(moment, curvatures.at(name));
      const at::Tensor moved = size.masked_select(size.gt(0));
      if (moved.numel() > 0) smallest = std::min(smallest, moved.min().item<double>());
      before_[name] = moment.clone();
    }
    return smallest;
  }

 private:
  [[nodiscard]] at::Tensor direction(const at::Tensor& before, const at::Tensor& moment) const {
    const double b1 = optimizer_.betas[0], b2 = optimizer_.betas[1];
    const at::Tensor old = before.defined() ? before : at::zeros_like(moment);
    return (old * b1 + (moment - old * b2) * ((1 - b1) / (1 - b2))).abs();
  }
  // Rounding turns a clipped quotient only by its sign. Others it moves by its ratio to rho h,
  // which therefore has to be larger than a sign's sum.
  [[nodiscard]] at::Tensor steadiness(const at::Tensor& moment, const at::Tensor& curvature) const {
    constexpr double kQuotientPerSign = 1e-4;
    const at::Tensor size = moment.abs(), divisor = curvature * optimizer_.sophia.rho;
    return at::where(size.gt(divisor), size, divisor * kQuotientPerSign) * size.gt(0);
  }

  recipe::Optimizer optimizer_;
  std::map<std::string, at::Tensor> before_;
};

double evaluate(Engine& engine, int rank) {
  for (const auto& batch : batches_of(engine, rank, 1000)) engine.evaluate(batch);
  return engine.report_eval().loss();
}

}  // namespace

double Comparison::error() const {
  if (!failure.empty()) return INFINITY;
  return std::max({loss, norm, eval, experts, state});
}

double state_error(Engine& engine, const ReferenceRun& reference) {
  Comparison result;
  compare_state(engine, reference, result);
  return result.state;
}

ReferenceRun run_reference(const LayoutCase& layout, int steps) {
  ReferenceRun run;
  const plan::Plan plan = make_case_plan(layout.one_rank());
  run_ranks(1, [&](comm::Communicator world) {
    mesh::Mesh mesh(world, plan.grid);
    Engine engine(plan, mesh, {.hooks = watch_choices(plan, run.margin)});
    const auto objective = engine::make_next_token_objective();
    WatchDirections directions(plan);
    for (int step = 0; step < steps; ++step) {
      run.reports.push_back(engine.step(batches_of(engine, 0, step), *objective));
      run.direction = std::min(run.direction, directions.smallest(engine));
    }
    run.eval_loss = evaluate(engine, 0);
    for (const auto& entry : engine.state_entries())
      run.state[entry.kind + "/" + entry.name] =
          entry.tensor.cpu().clone().view(entry.global_shape);
  });
  return run;
}

Comparison compare_layout(const LayoutCase& layout, const ReferenceRun& reference, int steps,
                          const RankRunner& runner) {
  Comparison result;
  const plan::Plan plan = make_case_plan(layout);
  std::mutex mutex;
  const auto on_rank = [&](comm::Communicator world) {
    const int rank = world.rank();
    mesh::Mesh mesh(world, plan.grid);
    Engine engine(plan, mesh);
    const auto objective = engine::make_next_token_objective();
    std::vector<engine::StepReport> reports;
    std::string hash;
    for (int step = 0; step < steps; ++step) {
      reports.push_back(engine.step(batches_of(engine, rank, step), *objective));
      if (step == 0) hash = engine.weights_hash();
    }
    const double eval = evaluate(engine, rank);
    const std::lock_guard lock(mutex);
    for (size_t i = 0; i < reports.size(); ++i) {
      result.loss = std::max(result.loss, relative(reports[i].loss, reference.reports[i].loss));
      result.experts =
          std::max(result.experts, experts_error(reports[i].experts, reference.reports[i].experts));
      result.norm =
          std::max(result.norm, relative(reports[i].grad_norm, reference.reports[i].grad_norm));
    }
    result.eval = std::max(result.eval, relative(eval, reference.eval_loss));
    result.first_hash = hash;
    compare_state(engine, reference, result);
  };
  try {
    runner ? runner(layout.ranks(), on_rank) : run_ranks(layout.ranks(), on_rank, 60);
  } catch (const std::exception& e) {
    result.failure = e.what();
  }
  return result;
}

std::string hash_after_one_step(const LayoutCase& layout) {
  const plan::Plan plan = make_case_plan(layout);
  std::string result;
  const auto on_rank = [&](comm::Communicator world) {
    mesh::Mesh mesh(world, plan.grid);
    Engine engine(plan, mesh);
    (void)engine.step(batches_of(engine, world.rank(), 0), *engine::make_next_token_objective());
    const std::string hash = engine.weights_hash();
    if (world.rank() == 0) result = hash;
  };
  try {
    run_ranks(layout.ranks(), on_rank, 60);
  } catch (const std::exception& e) {
    result = e.what();
  }
  return result;
}

std::vector<std::string> trace_of_first_step(const LayoutCase& layout) {
  std::vector<std::string> events;
  const plan::Plan plan = make_case_plan(layout);
  run_ranks(layout.ranks(), [&](comm::Communicator world) {
    const int rank = world.rank();
    mesh::Mesh mesh(world, plan.grid);
    engine::EngineHooks hooks;
    if (rank == 0)
      hooks.trace = [&](const char* what, int index) {
        events.push_back(std::string(what) + " " + std::to_string(index));
      };
    Engine engine(plan, mesh, {.hooks = hooks});
    (void)engine.step(batches_of(engine, rank, 0), *engine::make_next_token_objective());
  });
  return events;
}

}  // namespace capstan::test
