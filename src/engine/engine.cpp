// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/engine/engine.h"

#include <ATen/ATen.h>

#include <cmath>
#include <deque>
#include <optional>
#include <utility>

#include "capstan/base/check.h"
#include "capstan/base/error.h"
#include "capstan/base/hash.h"
#include "capstan/base/log.h"
#include "capstan/base/trace.h"
#include "capstan/device/accelerator.h"
#include "capstan/optim/grad_norm.h"
#include "capstan/optim/optimizer.h"
#include "capstan/parallel/context_split.h"
#include "capstan/plan/frozen.h"
#include "capstan/plan/optimizer_states.h"
#include "engine/attention_note_internal.h"
#include "engine/backward_updates_internal.h"
#include "engine/device_decision_internal.h"
#include "engine/executor_internal.h"
#include "engine/experts_note_internal.h"
#include "engine/gemm_choices_internal.h"
#include "engine/host_updates_internal.h"
#include "engine/micro_batch_internal.h"
#include "engine/state_internal.h"
#include "engine/step_control_internal.h"
#include "engine/step_graph_internal.h"

namespace capstan::engine {
namespace {

constexpr const char* kModel = "policy";

parallel::BucketHooks bucket_hooks(const EngineHooks& hooks) {
  parallel::BucketHooks out;
  if (hooks.trace) out.on_reduce = [trace = hooks.trace](int bucket) { trace("reduce", bucket); };
  out.before_reduce = hooks.before_reduce;
  out.after_reduce = hooks.after_reduce;
  return out;
}

[[noreturn]] void refuse_graph(std::string got) {
  throw ConfigError(ErrorText{.module = "engine",
                              .what = "recording a step as a graph",
                              .got = std::move(got),
                              .need = "work that is the same in every step",
                              .why = "a graph repeats what was recorded",
                              .fix = "Set run.graphs: false"});
}

// Weights without gradients and moments.
plan::Plan frozen(plan::Plan plan) {
  plan::ModelPlan& model = plan.models.at(kModel);
  model.layout =
      plan::Layout(model.shape, plan::freeze(model.table(), {"*"}), model.layout.options());
  return plan;
}

}  // namespace

struct Engine::Impl {
  Impl(const plan::Plan& plan_in, mesh::Mesh& mesh_in, const EngineOptions& options)
      : plan(options.trains ? plan_in : frozen(plan_in)),
        mesh(mesh_in),
        model(parallel::parallelize(plan, kModel, mesh, bucket_hooks(options.hooks))),
        control(plan),
        executor(plan, model, mesh, options.hooks.trace),
        data(mesh.along(plan::kDenseAxes).control()),
        stage(mesh.along(plan::kDenseAxes | plan::Axis::kTp).control()),
        context(mesh.along(plan::Axis::kCp)),
        pipeline(mesh.along(plan::Axis::kPp).control()),
        world(mesh.world().control()) {
    if (model.balance) model.balance->listen(options.hooks.experts);
    for (size_t i = 0; i < model.stores.size(); ++i) {
      auto& store = *model.stores[i];
      if (options.initializes)
        store.initialize(static_cast<uint64_t>(plan.resolved.run.seed), kModel);
      if (!store.layout().trainable) continue;
      shards.push_back(store.shard());
      shard_stores.push_back(i);
    }
    if (!options.trains) return;
    make_optimizer();
    if (device.is_cpu()) return;
    gemm = GemmChoices::make(plan.resolved.run, world, options.gemm_file);
    choose_who_decides();
  }

  void make_optimizer() {
    const recipe::Optimizer& recipe = plan.resolved.optimizer;
    const bool offloads = plan.resolved.parallel.zero.offload != "none";
    if (!recipe.in_backward && !offloads) {
      optimizer = optim::make_optimizer(recipe, shards_of_optimizer());
      return;
    }
    const auto seed = static_cast<uint64_t>(plan.resolved.run.seed);
    auto parts = std::make_unique<optim::PerShardOptimizer>(recipe, shards_of_optimizer());
    offloads ? void(host_updates.emplace(model, shards, shard_stores, *parts, seed))
             : void(in_backward.emplace(model, shards, shard_stores, *parts, seed));
    optimizer = std::move(parts);
  }

  void choose_who_decides() {
    const std::string reason = reason_to_wait(plan, *optimizer);
    if (reason.empty()) on_device.emplace(shards, plan, *device::accelerator());
    if (plan.resolved.run.graphs) {
      if (!reason.empty()) refuse_graph("a step that the host decides: " + reason);
      if (model.balance) check_experts_of_graph();
      graph.emplace(*device::accelerator(), world);
    }
    if (mesh.rank() != 0) return;
    log_attention(plan, device);
    if (model.balance) log_experts(plan, device);
    if (reason.empty())
      log::info("engine", "steps are decided on the device{}, their reports come one step late",
                graph ? " and launched as two graphs" : "");
    else
      log::info("engine", "the host waits for the outcome of every step: {}", reason);
  }

  void check_experts_of_graph() const {
    const ops::GroupedChoice choice = ops::choose_grouped(experts_case(plan, device));
    if (choice.form != ops::GroupedForm::kGrouped)
      refuse_graph("experts that the host has to count: " + choice.reason);
    if (counts_travellers(plan)) refuse_graph("rows that travel between experts in any number");
  }

  // Stochastic rounding asks for the index of each element.
  [[nodiscard]] std::vector<parallel::Shard> shards_of_optimizer() const {
    if (!plan::rounds_by_index(plan.resolved.optimizer)) return shards;
    std::vector<parallel::Shard> numbered;
    for (const size_t s : shard_stores) numbered.push_back(model.stores[s]->numbered_shard());
    return numbered;
  }

  // Loss, gradient squares and flags of all ranks in one small reduction.
  StepSums sum_over_ranks(double local_loss, const optim::SquareSums& squares,
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

  // Of one micro-batch or all of a step.
  template <class Rows>
  [[nodiscard]] Rows parts_of(const Rows& rows) const {
    return cut_rows(finds_documents ? find_documents(rows) : rows, context.size(), context.rank());
  }

  // What only ranks of the last stage have, on all.
  [[nodiscard]] Tensor from_last_stage(const Tensor& made, const std::vector<int64_t>& shape,
                                       at::ScalarType type) const {
    if (pipeline.size() == 1) return made;
    Tensor whole =
        made.defined() ? made : at::empty(shape, at::TensorOptions().device(device).dtype(type));
    CAPSTAN_CHECK(whole.scalar_type() == type && whole.sizes() == at::IntArrayRef(shape),
                  "the last stage made {} of another shape or type", c10::toString(type));
    pipeline.broadcast(whole, executor.last_pipeline_rank()).wait();
    return whole;
  }

  // Scores of whole rows out of this rank's part of them.
  [[nodiscard]] Tensor whole_rows(const Tensor& part_BT, const MicroBatch& batch) const {
    const bool wide = plan.precision.compute == DType::kFp64;
    const Tensor mine_BT =
        from_last_stage(part_BT, batch.ids_BT.sizes().vec(), wide ? at::kDouble : at::kFloat);
    if (context.size() == 1) return mine_BT;
    Tensor all = at::empty({context.size() * mine_BT.size(0), mine_BT.size(1)}, mine_BT.options());
    context.control().all_gather(all, mine_BT.contiguous()).wait();
    return parallel::join_sequence(all.chunk(context.size(), 0));
  }

  [[nodiscard]] param::Context without_gradient(param::Mode mode, const param::RowMap& rows) const {
    param::Context made{.key = {}, .mode = mode, .rows = &rows};
    if (model.balance) made.routers = model.balance->states();
    return made;
  }

  // The maxima of delayed scaling become those of all ranks, so that histories are the same
  // everywhere and outlive a change of the layout.
  void join_maxima() {
    if (world.size() > 1)
      world.all_reduce(model.fp8->step_maxima_P2(), comm::ReduceOp::kMax).wait();
  }

  [[nodiscard]] bool has_history() const { return model.fp8 && model.fp8->is_delayed(); }

  [[nodiscard]] std::vector<mesh::StateEntry> fp8_entries() const {
    if (!has_history()) return {};
    const Tensor history = model.fp8->history_HP2();
    const plan::Shape shape = history.sizes().vec();
    return {{kModel, "fp8", "layers.maxima", shape, plan::whole_box(shape), history.view({-1}),
             mesh.rank() == 0}};
  }

  [[nodiscard]] optim::SquareSums own_squares() {
    if (host_updates) return host_updates->await_squares();
    return in_backward ? in_backward->squares() : optim::sum_of_squares(shards);
  }

  void apply(const StepControl::Update& update) {
    const trace::Span span("optimizer", "update");
    if (host_updates) return host_updates->update(update);
    optimizer->step({update.lr, update.gradient_scale, update.count,
                     static_cast<uint64_t>(plan.resolved.run.seed)});
    publish();
  }
  void publish() {
    for (const size_t s : shard_stores) model.stores[s]->publish();
  }

  // Loss and gradient norm are read here.
  void close_step(const Tensor& loss, int64_t target_tokens) {
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

  // Nothing is read: a skipped step changes no weight, so publishing it does no harm.
  void step_on_device(const StepWork& work, int64_t target_tokens) {
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

  void run_passes(const StepWork& work, Tensor& loss) {
    if (in_backward) in_backward->open_step(*on_device, /*publishes=*/!graph);
    executor.run(work, [&](const Tensor& made) {
      model.buckets->finish_step();
      loss = made;
    });
  }

  [[nodiscard]] int64_t started_steps() const {
    return control.scalars().step + (on_device ? static_cast<int64_t>(on_device->pending()) : 0);
  }

  [[nodiscard]] Tensor scale_on_device() const {
    return on_device && plan.precision.dynamic_loss_scale ? on_device->numbers().loss_scale
                                                          : Tensor();
  }

  // The optimizer's own pass before that of the step: the same rows, with labels that the model
  // draws.
  void estimate_curvature(StepWork work, const std::vector<MicroBatch>& on_host) {
    const auto seed = static_cast<uint64_t>(plan.resolved.run.seed);
    const optim::CurvaturePass pass{.tokens = static_cast<double>(plan.batch.tokens_per_step),
                                    .gradient_scale = 1.0 / work.loss_scale,
                                    .count = control.scalars().optimizer_count,
                                    .seed = seed,
                                    .on_device = on_device ? &on_device->numbers() : nullptr};
    const auto uniform = to_device(uniform_numbers(on_host, seed, started_steps()), device);
    work.uniform = &uniform;
    work.scale_on_device = {};  // scaled and unscaled by the number that the host knows
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

  void run_curvature(const StepWork& work, const optim::CurvaturePass& pass) {
    executor.run(work, [&](const Tensor&) {
      model.buckets->finish_step();
      if (host_updates) host_updates->await_gradients();
      if (!in_backward) optimizer->observe_curvature(pass);
    });
  }

  void update_on_device(const Tensor& loss) {
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

  // What the graphs read of a step, where they read it.
  void load_graph(StepWork& work) {
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

  void step_by_graph(StepWork work) {
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

  [[nodiscard]] StepReport next_report() {
    if (on_device) {
      const auto outcome = on_device->receive(world);
      StepReport report = control.confirm_step(
          outcome.sums,
          {outcome.applied, outcome.count, outcome.gradient_scale, outcome.loss_scale});
      if (model.balance) report.experts = model.balance->receive_loads();
      if (has_history() && outcome.applied && model.fp8->note_applied() && graph) graph->forget();
      return report;
    }
    StepReport report = std::move(reports.front());
    reports.pop_front();
    return report;
  }

  plan::Plan plan;
  mesh::Mesh& mesh;
  const at::Device device = device::run_device();
  const bool finds_documents = uses_document_starts(plan, device);
  parallel::ParallelModel model;
  StepControl control;
  Executor executor;
  comm::Communicator data, stage, context, pipeline, world;
  std::vector<parallel::Shard> shards;  // trainable ones
  std::vector<size_t> shard_stores;     // their stores
  std::unique_ptr<optim::Optimizer> optimizer;
  std::optional<BackwardUpdates> in_backward;  // optimizer.in_backward
  std::optional<HostUpdates> host_updates;     // parallel.zero.offload
  std::optional<DeviceDecision> on_device;     // where the host does not wait for it
  std::optional<StepGraph> graph;              // run.graphs
  std::unique_ptr<GemmChoices> gemm;           // run.gemm, where it is not LibTorch
  std::deque<StepReport> reports;              // of finished steps, not handed out yet
  EvalReport eval;
};

Engine::Engine(const plan::Plan& plan, mesh::Mesh& mesh, EngineOptions options)
    : impl_(std::make_unique<Impl>(plan, mesh, options)) {}
Engine::~Engine() = default;

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

void Engine::evaluate(const MicroBatch& rows, const std::function<void(const Tensor&)>& per_token) {
  Impl& e = *impl_;
  check_batch(rows);
  if (!e.device.is_cpu()) check_ids({rows}, e.plan.model().shape.vocab_size);
  const MicroBatch batch = to_device(e.parts_of(rows), e.device);
  const param::Context context = e.without_gradient(param::Mode::kEval, batch.rows);
  Tensor logprob_BT = e.executor.eval_logprob(context, batch);
  if (logprob_BT.defined() && e.mesh.coord().tp == 0) {
    const Tensor is_target_BT = batch.targets_BT.ne(kIgnoredTarget);
    e.eval.loss_sum -=
        at::where(is_target_BT, logprob_BT.to(at::kDouble), 0.0).sum().item<double>();
    e.eval.target_tokens += is_target_BT.sum().item<int64_t>();
  }
  if (per_token) per_token(e.whole_rows(logprob_BT, batch));
}

EvalReport Engine::report_eval() {
  Impl& e = *impl_;
  const Tensor sums = at::empty({2}, at::kDouble);
  auto* s = sums.data_ptr<double>();
  s[0] = e.eval.loss_sum;
  s[1] = static_cast<double>(e.eval.target_tokens);
  e.eval = {};
  e.world.all_reduce(sums).wait();
  return {s[0], static_cast<int64_t>(s[1])};
}

Tensor Engine::next_logits(const Tensor& ids_BT, param::KvCache* cache) {
  Impl& e = *impl_;
  check_batch({ids_BT, ids_BT, {}});
  if (!e.device.is_cpu()) check_ids({{ids_BT, ids_BT, {}}}, e.plan.model().shape.vocab_size);
  const int64_t B = ids_BT.size(0), T = ids_BT.size(1), first = cache ? cache->length() : 0;
  param::RowMap rows;
  for (int64_t b = 0; b < B; ++b) rows.samples.push_back(b);
  const auto index = at::TensorOptions().device(e.device).dtype(at::kLong);
  rows.positions_BT = at::arange(first, first + T, index).expand({B, T}).contiguous();
  rows.positions_are_rows = first == 0;
  // Rows are whole on every rank, with and without a cache.
  param::Context context = e.without_gradient(param::Mode::kDecode, rows);
  context.cache = cache;
  Tensor logits_BV =
      e.executor.logits(context, to_device(MicroBatch{ids_BT, {}, {}}, e.device).ids_BT, 1);
  if (logits_BV.defined()) logits_BV = logits_BV.squeeze(1).contiguous();
  return e.from_last_stage(logits_BV, {B, e.plan.model().shape.vocab_size},
                           parallel::scalar_type_of(e.plan.precision.compute));
}

std::vector<mesh::StateEntry> Engine::state_entries() {
  Impl& e = *impl_;
  auto entries = list_state(e.model, e.optimizer.get(), e.shard_stores, e.mesh);
  if (e.model.balance)
    for (auto& entry : e.model.balance->state_entries(kModel, e.stage.rank() == 0))
      entries.push_back(std::move(entry));
  for (auto& entry : e.fp8_entries()) entries.push_back(std::move(entry));
  return entries;
}

EngineScalars Engine::scalars() const {
  CAPSTAN_CHECK(unreported_steps() == 0, "scalars() between start_step() and its finish_step()");
  return impl_->control.scalars();
}

void Engine::restore(const EngineScalars& scalars) {
  Impl& e = *impl_;
  CAPSTAN_CHECK(unreported_steps() == 0, "restore() between start_step() and its finish_step()");
  // Ranks that resumed from different steps would train on without noticing.
  const Tensor steps = at::empty({e.world.size()}, at::kLong);
  e.world.all_gather(steps, at::full({1}, scalars.step, at::kLong)).wait();
  for (int64_t r = 0; r < steps.numel(); ++r) {
    const int64_t step = steps[r].item<int64_t>();
    if (step == scalars.step) continue;
    throw DataError(
        ErrorText{.module = "engine",
                  .what = "restoring the run",
                  .got = "rank " + std::to_string(r) + " at step " + std::to_string(step),
                  .need = "step " + std::to_string(scalars.step),
                  .why = "all ranks resume from one checkpoint",
                  .fix = "Name the checkpoint by --resume DIR"});
  }
  e.control.restore(scalars);
  if (e.on_device) e.on_device->restore(e.control.scalars());
  for (auto& store : e.model.stores) store->refresh();
  if (e.model.fp8) e.model.fp8->refresh();
  if (e.has_history() && e.graph) e.graph->forget();  // there may be none now
}

std::string Engine::weights_hash() { return hash_weights(impl_->model, impl_->mesh); }

const plan::Plan& Engine::plan() const { return impl_->plan; }

}  // namespace capstan::engine
