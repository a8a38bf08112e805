// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/engine/engine.h"

#include <ATen/ATen.h>

#include <utility>

#include "capstan/base/check.h"
#include "capstan/base/error.h"
#include "capstan/base/log.h"
#include "capstan/device/threads.h"
#include "capstan/parallel/context_split.h"
#include "capstan/plan/frozen.h"
#include "capstan/plan/optimizer_states.h"
#include "engine/attention_note_internal.h"
#include "engine/engine_impl_internal.h"
#include "engine/experts_note_internal.h"
#include "engine/state_internal.h"

namespace capstan::engine {
namespace {

parallel::BucketHooks bucket_hooks(const EngineHooks& hooks) {
  parallel::BucketHooks out;
  if (hooks.trace) out.on_reduce = [trace = hooks.trace](int bucket) { trace("reduce", bucket); };
  out.before_reduce = hooks.before_reduce;
  out.after_reduce = hooks.after_reduce;
  return out;
}

// Weights without gradients and moments.
plan::Plan frozen(plan::Plan plan) {
  plan::ModelPlan& model = plan.models.at(kModel);
  model.layout =
      plan::Layout(model.shape, plan::freeze(model.table(), {"*"}), model.layout.options());
  return plan;
}

}  // namespace

Engine::Impl::Impl(const plan::Plan& plan_in, mesh::Mesh& mesh_in, const EngineOptions& options)
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

void Engine::Impl::make_optimizer() {
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

void Engine::Impl::choose_who_decides() {
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

void Engine::Impl::check_experts_of_graph() const {
  const ops::GroupedChoice choice = ops::choose_grouped(experts_case(plan, device));
  if (choice.form != ops::GroupedForm::kGrouped)
    refuse_graph("experts that the host has to count: " + choice.reason);
  if (counts_travellers(plan)) refuse_graph("rows that travel between experts in any number");
}

std::vector<parallel::Shard> Engine::Impl::shards_of_optimizer() const {
  if (!plan::rounds_by_index(plan.resolved.optimizer)) return shards;
  std::vector<parallel::Shard> numbered;
  for (const size_t s : shard_stores) numbered.push_back(model.stores[s]->numbered_shard());
  return numbered;
}

Tensor Engine::Impl::from_last_stage(const Tensor& made, const std::vector<int64_t>& shape,
                                     at::ScalarType type) const {
  if (pipeline.size() == 1) return made;
  Tensor whole =
      made.defined() ? made : at::empty(shape, at::TensorOptions().device(device).dtype(type));
  CAPSTAN_CHECK(whole.scalar_type() == type && whole.sizes() == at::IntArrayRef(shape),
                "the last stage made {} of another shape or type", c10::toString(type));
  pipeline.broadcast(whole, executor.last_pipeline_rank()).wait();
  return whole;
}

Tensor Engine::Impl::whole_rows(const Tensor& part_BT, const MicroBatch& batch) const {
  const bool wide = plan.precision.compute == DType::kFp64;
  const Tensor mine_BT =
      from_last_stage(part_BT, batch.ids_BT.sizes().vec(), wide ? at::kDouble : at::kFloat);
  if (context.size() == 1) return mine_BT;
  Tensor all = at::empty({context.size() * mine_BT.size(0), mine_BT.size(1)}, mine_BT.options());
  context.control().all_gather(all, mine_BT.contiguous()).wait();
  return parallel::join_sequence(all.chunk(context.size(), 0));
}

param::Context Engine::Impl::without_gradient(param::Mode mode, const param::RowMap& rows) const {
  param::Context made{.key = {}, .mode = mode, .rows = &rows};
  if (model.balance) made.routers = model.balance->states();
  return made;
}

std::vector<mesh::StateEntry> Engine::Impl::fp8_entries() const {
  if (!has_history()) return {};
  const Tensor history = model.fp8->history_HP2();
  const plan::Shape shape = history.sizes().vec();
  return {{kModel, "fp8", "layers.maxima", shape, plan::whole_box(shape), history.view({-1}),
           mesh.rank() == 0}};
}

Engine::Engine(const plan::Plan& plan, mesh::Mesh& mesh, EngineOptions options) {
  device::prepare_vector_math();
  impl_ = std::make_unique<Impl>(plan, mesh, options);
}
Engine::~Engine() = default;

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
