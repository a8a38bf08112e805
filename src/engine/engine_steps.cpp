// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <ATen/ATen.h>

#include <cmath>
#include <utility>

#include "capstan/base/check.h"
#include "capstan/base/error.h"
#include "capstan/base/trace.h"
#include "capstan/optim/grad_norm.h"
#include "engine/engine_impl_internal.h"

namespace capstan::engine {

void refuse_graph(std::string got) {
  throw ConfigError(ErrorText{.module = "engine",
                              .what = "recording a step as a graph",
                              .got = std::move(got),
                              .need = "work that is the same in every step",
                              .why = "a graph repeats what was recorded",
                              .fix = "Set run.graphs: false"});
}

StepSums Engine::Impl::sum_over_ranks(double local_loss, const optim::SquareSums& squares,
                                      int64_t target_tokens) {
  const Tensor sums = at::empty({4}, at::kDouble);
  auto* s = sums.data_ptr<double>();
  // Tensor-parallel ranks compute the same loss; one of them counts it. Ranks without the last
  // stage have none.
  s[0] = mesh.coord().tp == 0 ? local_loss : 0.0;
  s[1] = squares.counted;
  s[2] = std::isfinite(local_loss) ? 0 : 1;
  s[3] = squares.is_finite ? 0 : 1;
  world.all_reduce(sums).wait();
  return {s[0], s[1], s[2] == 0, s[3] == 0, target_tokens};
}

void Engine::Impl::join_maxima() {
  if (world.size() > 1) world.all_reduce(model.fp8->step_maxima_P2(), comm::ReduceOp::kMax).wait();
}

optim::SquareSums Engine::Impl::own_squares() {
  if (host_updates) return host_updates->await_squares();
  return in_backward ? in_backward->squares() : optim::sum_of_squares(shards);
}

void Engine::Impl::apply(const StepControl::Update& update) {
  const trace::Span span("optimizer", "update");
  if (host_updates) return host_updates->update(update);
  optimizer->step({update.lr, update.gradient_scale, update.count,
                   static_cast<uint64_t>(plan.resolved.run.seed)});
  publish();
}

void Engine::Impl::close_step(const Tensor& loss, int64_t target_tokens) {
  const optim::SquareSums squares = own_squares();
  const double local_loss = loss.defined() ? loss.item<double>() : 0;
  auto verdict = control.close_step(sum_over_ranks(local_loss, squares, target_tokens));
  if (verdict.update.apply && !in_backward) apply(verdict.update);
  if (has_history()) {
    join_maxima();
    model.fp8->finish_step(verdict.update.apply);
  }
  if (model.balance)
    verdict.report.experts = model.balance->finish_step(world, verdict.update.apply);
  reports.push_back(std::move(verdict.report));
}

void Engine::Impl::step_on_device(const StepWork& work, int64_t target_tokens) {
  on_device->open_step(target_tokens, control.lr(static_cast<int64_t>(on_device->pending())));
  if (graph) {
    step_by_graph(work);
  } else {
    Tensor loss;
    run_passes(work, loss);
    update_on_device(loss);
  }
  if (!in_backward && !graph) publish();
  if (model.balance) model.balance->send_loads();
  on_device->send_outcome();
}

void Engine::Impl::run_passes(const StepWork& work, Tensor& loss) {
  if (in_backward) in_backward->open_step(*on_device, /*publishes=*/!graph);
  executor.run(work, [&](const Tensor& made) {
    model.buckets->finish_step();
    loss = made;
  });
}

int64_t Engine::Impl::started_steps() const {
  return control.scalars().step + (on_device ? static_cast<int64_t>(on_device->pending()) : 0);
}

Tensor Engine::Impl::scale_on_device() const {
  return on_device && plan.precision.dynamic_loss_scale ? on_device->numbers().loss_scale
                                                        : Tensor();
}

void Engine::Impl::estimate_curvature(StepWork work, const std::vector<MicroBatch>& on_host) {
  const auto seed = static_cast<uint64_t>(plan.resolved.run.seed);
  const optim::CurvaturePass pass{.tokens = static_cast<double>(plan.batch.tokens_per_step),
                                  .gradient_scale = 1.0 / work.loss_scale,
                                  .count = control.scalars().optimizer_count,
                                  .seed = seed,
                                  .on_device = on_device ? &on_device->numbers() : nullptr};
  const auto uniform = to_device(uniform_numbers(on_host, seed, started_steps()), device);
  work.uniform = &uniform;
  work.scale_on_device = Tensor();  // scaled and unscaled by the number that the host knows
  if (in_backward) in_backward->open_curvature(pass);
  if (!graph) return run_curvature(work, pass);
  load_graph(work);
  graph->load_curvature(uniform);
  work.uniform = &graph->uniform();
  graph->curvature.run([&] {
    if (model.fp8) model.fp8->forget_weights();
    run_curvature(work, pass);
  });
}

void Engine::Impl::run_curvature(const StepWork& work, const optim::CurvaturePass& pass) {
  executor.run(work, [&](const Tensor&) {
    model.buckets->finish_step();
    if (host_updates) host_updates->await_gradients();
    if (!in_backward) optimizer->observe_curvature(pass);
  });
}

void Engine::Impl::update_on_device(const Tensor& loss) {
  const trace::Span span("optimizer", "update");
  on_device->decide(loss, mesh.coord().tp == 0, world);
  if (has_history()) {
    join_maxima();
    model.fp8->finish_step_on_device(on_device->numbers().skip);
  }
  if (model.balance) model.balance->finish_step_on_device(world, on_device->numbers().skip);
  if (in_backward) return;
  optimizer->step_on_device(on_device->numbers(), static_cast<uint64_t>(plan.resolved.run.seed));
}

void Engine::Impl::load_graph(StepWork& work) {
  std::vector<Tensor> weights;
  for (const MicroBatch& batch : *work.batches) {
    weights.push_back(executor.scaled_weights(work, batch));
    if (!weights.back().defined()) refuse_graph("an objective without token weights");
  }
  for (auto& store : model.stores) store->settle();
  graph->load(*work.batches, weights);
  work.batches = &graph->batches();
  work.weights = &graph->weights();
}

void Engine::Impl::step_by_graph(StepWork work) {
  load_graph(work);
  graph->passes.run([&] {
    if (model.fp8) model.fp8->forget_weights();
    run_passes(work, graph->loss);
  });
  graph->update.run([&] {
    update_on_device(graph->loss);
    for (const size_t s : shard_stores) model.stores[s]->gather_update();
    for (const size_t s : shard_stores) model.stores[s]->settle();
  });
  for (const size_t s : shard_stores) model.stores[s]->note_update();
}

StepReport Engine::Impl::next_report() {
  if (on_device) {
    const auto outcome = on_device->receive(world);
    StepReport report = control.confirm_step(
        outcome.sums, {outcome.applied, outcome.count, outcome.gradient_scale, outcome.loss_scale});
    if (model.balance) report.experts = model.balance->receive_loads();
    if (has_history() && outcome.applied && model.fp8->note_applied() && graph &&
        graph->is_recorded())
      graph->forget();
    return report;
  }
  StepReport report = std::move(reports.front());
  reports.pop_front();
  return report;
}

StepReport Engine::step(const std::vector<MicroBatch>& rows, const Objective& objective) {
  CAPSTAN_CHECK(unreported_steps() == 0, "step() after start_step() without its finish_step()");
  start_step(rows, objective);
  return finish_step();
}

void Engine::start_step(const std::vector<MicroBatch>& rows, const Objective& objective) {
  Impl& e = *impl_;
  check_batches(rows, e.plan.batch);
  if (e.gemm) e.gemm->before_step();
  if (!e.device.is_cpu()) check_ids(rows, e.plan.model().shape.vocab_size);
  const auto batches = e.parts_of(rows);
  // What weights are divided by must be known before any forward.
  const Tensor counts = at::empty({3}, at::kDouble);
  auto* c = counts.data_ptr<double>();
  c[0] = objective.local_denominator(batches);
  c[1] = static_cast<double>(count_targets(batches));
  c[2] = e.graph && e.graph->needs_room(batches) ? 1 : 0;
  e.data.all_reduce(counts).wait();
  if (c[2] > 0) e.graph->make_room(batches);
  const auto target_tokens = static_cast<int64_t>(c[1]);
  const auto on_device = to_device(batches, e.device);
  const StepWork work{&on_device, &objective, c[0], e.control.loss_scale(), e.scale_on_device()};
  if (e.optimizer->wants_curvature(e.started_steps())) e.estimate_curvature(work, batches);
  if (e.on_device) return e.step_on_device(work, target_tokens);
  if (e.in_backward) e.in_backward->open_step(e.control.next_update(target_tokens));
  e.executor.run(work, [&](const Tensor& loss) {
    e.model.buckets->finish_step();
    e.close_step(loss, target_tokens);
  });
}

StepReport Engine::finish_step() {
  CAPSTAN_CHECK(unreported_steps() > 0, "finish_step() without a start_step()");
  StepReport report = impl_->next_report();
  impl_->control.check_divergence(report);
  return report;
}

int64_t Engine::unreported_steps() const {
  const Impl& e = *impl_;
  return static_cast<int64_t>(e.on_device ? e.on_device->pending() : e.reports.size());
}

bool Engine::reports_late() const { return impl_->on_device.has_value(); }

}  // namespace capstan::engine
