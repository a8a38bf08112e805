// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/trainer/prove.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <mutex>
#include <tuple>

#include "capstan/base/error.h"
#include "capstan/base/text.h"
#include "capstan/comm/threads.h"
#include "capstan/trainer/batches.h"
#include "trainer/prove_internal.h"

namespace capstan::trainer {
namespace {

using engine::Engine;
using engine::StepReport;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kEvalStep = 1'000'000;  // its rows are those of no other step

double relative(double a, double b) {
  if (std::isnan(a) && std::isnan(b)) return 0;
  const double error = std::fabs(a - b) / std::max(1e-3, std::fabs(b));
  return std::isnan(error) ? kInfinity : error;
}

at::Tensor part_of(const at::Tensor& whole, const plan::Box& box) {
  at::Tensor part = whole;
  for (size_t d = 0; d < box.begin.size(); ++d)
    part = part.narrow(static_cast<int64_t>(d), box.begin[d], box.extent[d]);
  return part.reshape({-1});
}

std::string key_of(const mesh::StateEntry& entry) { return entry.kind + " of " + entry.name; }

std::vector<engine::MicroBatch> batches_of(const Engine& engine, int rank, int64_t step,
                                           uint64_t seed) {
  const plan::Plan& plan = engine.plan();
  const int64_t first = plan.grid.data_parallel_index(rank) * plan.batch.samples_per_rank;
  const data::Documents documents = data::parse_documents(plan.resolved.data.documents);
  return split_batch(draw_rows({.first = step * plan.batch.global_samples + first,
                                .samples = plan.batch.samples_per_rank,
                                .length = plan.batch.sequence_length,
                                .vocab = plan.model().shape.vocab_size,
                                .documents = documents,
                                .seed = seed}),
                     plan.batch.micro_samples, documents);
}

double evaluate(Engine& engine, int rank, uint64_t seed) {
  for (const auto& batch : batches_of(engine, rank, kEvalStep, seed)) engine.evaluate(batch);
  return engine.report_eval().loss();
}

// The run of one rank: numbers, and all state after every step.
struct Reference {
  std::vector<StepReport> reports;
  std::vector<std::map<std::string, at::Tensor>> states;
  double eval_loss = 0;
};

plan::Plan plan_of(const ReducedRun& run, const recipe::Recipe& recipe, int ranks) {
  plan::Topology topology;
  topology.world_size = topology.local_size = ranks;
  topology.physical_cores = ranks;
  recipe::Resolved resolved;
  resolved.recipe = recipe;
  try {
    plan::Plan plan = plan::make_plan(resolved, topology, {});
    if (run.bucket_bytes) plan.bucket_bytes = *run.bucket_bytes;
    return plan;
  } catch (const recipe::RecipeError& e) {
    throw InternalError(ErrorText{.module = "trainer",
                                  .what = "making the recipe small",
                                  .why = e.problems().front().text(),
                                  .fix = "Change the layout, or report the recipe"});
  }
}

Reference run_reference(const ProveOptions& options, const ReducedRun& run) {
  Reference reference;
  const plan::Plan plan = plan_of(run, on_one_rank(run.recipe), 1);
  const auto on_rank = [&](const comm::Communicator& world) {
    mesh::Mesh mesh(world, plan.grid);
    Engine engine(plan, mesh);
    const auto objective = engine::make_next_token_objective();
    for (int step = 0; step < options.steps; ++step) {
      const auto batches = batches_of(engine, 0, step, options.seed);
      reference.reports.push_back(engine.step(batches, *objective));
      auto& state = reference.states.emplace_back();
      for (const auto& entry : engine.state_entries())
        state[key_of(entry)] = entry.tensor.clone().view(entry.global_shape);
    }
    reference.eval_loss = evaluate(engine, 0, options.seed);
  };
  comm::run_thread_ranks(1, on_rank, {.timeout_s = options.timeout_s});
  return reference;
}

// What one rank, and then all of them, found.
class Findings {
 public:
  explicit Findings(double bar) : bar_(bar) {}

  void add(const std::string& kind, const std::string& group, int64_t values, Difference found) {
    ErrorRow& row = rows_[{kind, group}];
    row = {kind, group, row.values + values, std::max(row.error, found.error)};
    error_ = std::max(error_, found.error);
    if (found.error > bar_) take(std::move(found));
  }
  void add_elements(const std::string& key, int64_t count) { written_[key] += count; }

  void merge(const Findings& other) {
    for (const auto& [key, row] : other.rows_) {
      ErrorRow& own = rows_[key];
      own = {row.kind, row.group, own.values + row.values, std::max(own.error, row.error)};
    }
    error_ = std::max(error_, other.error_);
    if (other.first_) take(*other.first_);
    for (const auto& [key, count] : other.written_) written_[key] += count;
  }

  // Every element of the state is written to a checkpoint by exactly one rank.
  void check_written(const std::map<std::string, at::Tensor>& state, int64_t step) {
    for (const auto& [key, whole] : state) {
      const int64_t count = written_[key];
      if (count == whole.numel()) continue;
      error_ = kInfinity;
      take({.step = step,
            .what = key,
            .error = kInfinity,
            .text = fmt::format("ranks hold {} of its {} elements", count, whole.numel())});
    }
  }

  void report(ProveReport& report) const {
    for (const auto& [key, row] : rows_) report.rows.push_back(row);
    report.error = error_;
    report.first = first_;
  }

 private:
  void take(Difference found) {
    const auto place = [](const Difference& d) { return std::tuple(d.step, -d.error, d.rank); };
    if (!first_ || place(found) < place(*first_)) first_ = std::move(found);
  }
  double bar_;
  double error_ = 0;
  std::map<std::pair<std::string, std::string>, ErrorRow> rows_;
  std::map<std::string, int64_t> written_;
  std::optional<Difference> first_;
};

class Comparer {
 public:
  Comparer(const Reference& reference, const plan::Plan& plan, int rank, double bar)
      : reference_(reference), rank_(rank), findings(bar) {
    for (const plan::ParamSpec& spec : plan.model().table())
      groups_[spec.name] = plan::parameter_groups({spec}).front().first;
  }

  void compare(Engine& engine, const StepReport& report) {
    const StepReport& one = reference_.reports.at(static_cast<size_t>(report.step - 1));
    number("loss", report.step, relative(report.loss, one.loss));
    number("gradient norm", report.step, relative(report.grad_norm, one.grad_norm));
    if (report.skipped != one.skipped || report.target_tokens != one.target_tokens)
      findings.add(
          "loss", "", 0,
          {.step = report.step,
           .what = "loss",
           .rank = rank_,
           .error = kInfinity,
           .text = fmt::format("{} target tokens{}, one rank has {}{}", report.target_tokens,
                               skip_text(report), one.target_tokens, skip_text(one))});
    for (const mesh::StateEntry& entry : engine.state_entries()) compare(entry, report.step);
  }

  void compare_eval(double loss, int64_t step) {
    number("evaluation", step, relative(loss, reference_.eval_loss));
  }

 private:
  static std::string skip_text(const StepReport& report) {
    return report.skipped.empty() ? "" : ", skipped: " + report.skipped;
  }
  void number(const std::string& what, int64_t step, double error) {
    findings.add(what, "", 1, {.step = step, .what = what, .rank = rank_, .error = error});
  }
  void compare(const mesh::StateEntry& entry, int64_t step) {
    const size_t at = static_cast<size_t>(step - 1);
    const std::string key = key_of(entry);
    const at::Tensor& whole = reference_.states.at(at).at(key);
    const double scale = std::max(1e-3, whole.abs().max().item<double>());
    double error = entry.tensor.sub(part_of(whole, entry.box)).abs().max().item<double>() / scale;
    if (std::isnan(error)) error = kInfinity;
    const auto group = groups_.find(entry.name);  // the balance of routers is in no table
    findings.add(entry.kind, group == groups_.end() ? "router" : group->second,
                 entry.tensor.numel(),
                 {.step = step,
                  .what = key,
                  .shape = entry.global_shape,
                  .box = entry.box,
                  .rank = rank_,
                  .error = error});
    const bool is_last = at + 1 == reference_.states.size();
    if (is_last && entry.writes) findings.add_elements(key, entry.tensor.numel());
  }

  const Reference& reference_;
  int rank_;
  std::map<std::string, std::string> groups_;

 public:
  Findings findings;
};

Findings run_layout(const ProveOptions& options, const ReducedRun& run,
                    const Reference& reference) {
  const plan::Plan plan = plan_of(run, run.recipe, run.ranks);
  Findings all(options.bar);
  std::mutex mutex;
  const auto on_rank = [&](const comm::Communicator& world) {
    const int rank = world.rank();
    mesh::Mesh mesh(world, plan.grid);
    Engine engine(plan, mesh,
                  {.hooks = options.hooks ? options.hooks(rank) : engine::EngineHooks{}});
    const auto objective = engine::make_next_token_objective();
    Comparer comparer(reference, plan, rank, options.bar);
    for (int step = 0; step < options.steps; ++step)
      comparer.compare(engine,
                       engine.step(batches_of(engine, rank, step, options.seed), *objective));
    comparer.compare_eval(evaluate(engine, rank, options.seed), options.steps);
    {
      const std::lock_guard lock(mutex);
      all.merge(comparer.findings);
    }
    (void)engine.weights_hash();  // replicas are equal to the bit
  };
  try {
    comm::run_thread_ranks(run.ranks, on_rank, {.timeout_s = options.timeout_s});
  } catch (const comm::RankError&) {
    ProveReport so_far;
    all.report(so_far);
    if (!so_far.first) throw;  // else replicas differ because something before them does
    return all;
  }
  all.check_written(reference.states.back(), options.steps);
  return all;
}

// "[0:32, :] of [61, 16]"
std::string part_text(const plan::Box& box, const plan::Shape& shape) {
  std::vector<std::string> part, whole;
  for (size_t d = 0; d < shape.size(); ++d) {
    const int64_t begin = box.begin[d], end = begin + box.extent[d];
    part.push_back(box.extent[d] == shape[d] ? ":" : fmt::format("{}:{}", begin, end));
    whole.push_back(std::to_string(shape[d]));
  }
  return fmt::format(" [{}] of [{}]", join(part, ", "), join(whole, ", "));
}

}  // namespace

ProveReport prove(const ProveOptions& options) {
  ProveReport report;
  report.bar = options.bar;
  report.reduced = reduce_run(plan_whole_run(options));
  report.reduced.recipe.run.seed = static_cast<int64_t>(options.seed);
  report.layout = describe_layout(report.reduced.recipe, report.reduced.ranks);
  const Reference reference = run_reference(options, report.reduced);
  run_layout(options, report.reduced, reference).report(report);
  return report;
}

std::string describe(const Difference& d, double bar) {
  if (!d.text.empty()) return fmt::format("step {}: {}: {}", d.step, d.what, d.text);
  const std::string part = d.shape.empty() ? "" : part_text(d.box, d.shape);
  return fmt::format("step {}: {}{} on rank {} differs from one rank by {:.1e}, need {:g}", d.step,
                     d.what, part, d.rank, d.error, bar);
}

}  // namespace capstan::trainer
