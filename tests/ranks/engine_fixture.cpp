// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "ranks/engine_fixture.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <mutex>

#include "capstan/base/philox.h"
#include "capstan/plan/frozen.h"
#include "capstan/recipe/load.h"
#include "support/run_ranks.h"

namespace capstan::engine::testing {
namespace {

constexpr const char* kRecipe = R"(version: 1
run: {name: tiny, steps: 50}
model:
  vocab_size: 61
  hidden_size: 16
  intermediate_size: 24
  num_hidden_layers: 2
  num_attention_heads: 4
  num_key_value_heads: 2
  initializer_range: 0.2
data:
  tokenizer: data/tok
  train:
    - {path: data/train}
batch: {global_samples: 8, micro_samples: 2, sequence_length: 12}
optimizer: {lr: 1.0e-2}
lr_schedule: {warmup: 2}
precision: {compute: fp64}
)";

int64_t draw(int64_t sample, int64_t index, int64_t below) {
  const auto bits = philox::bits64(11, static_cast<uint64_t>(sample), static_cast<uint64_t>(index));
  return static_cast<int64_t>(bits % static_cast<uint64_t>(below));
}

bool is_ignored(int64_t sample, int64_t t) {
  if (sample % 8 == 5) return true;
  if (sample % 3 == 1) return t > 3;
  return draw(sample, 1000 + t, 7) == 0;
}

// A document starts at position 0 and at every place drawn.
bool starts_document(int64_t sample, int64_t t) {
  return t == 0 || draw(sample, 2000 + t, 2 + sample % 9) == 0;
}

void fill_sample(MicroBatch& batch, int64_t row, int64_t sample, int64_t vocab) {
  auto ids = batch.ids_BT.accessor<int64_t, 2>(), targets = batch.targets_BT.accessor<int64_t, 2>();
  auto positions = batch.rows.positions_BT.accessor<int64_t, 2>();
  auto first_key = batch.rows.first_key_BT.accessor<int32_t, 2>();
  int64_t first = 0;
  for (int64_t t = 0; t < ids.size(1); ++t) {
    if (starts_document(sample, t)) first = t;
    ids[row][t] = draw(sample, t, vocab);
    targets[row][t] = is_ignored(sample, t) ? -100 : draw(sample, t + 1, vocab);
    positions[row][t] = t - first;
    first_key[row][t] = static_cast<int32_t>(first);
  }
}

void expect_same_report(const StepReport& a, const StepReport& b) {
  EXPECT_EQ(a.step, b.step);
  EXPECT_TRUE(a.loss == b.loss || (std::isnan(a.loss) && std::isnan(b.loss)));
  EXPECT_TRUE(a.grad_norm == b.grad_norm || std::isnan(a.grad_norm));
  EXPECT_EQ(a.skipped, b.skipped);
  EXPECT_EQ(a.loss_scale, b.loss_scale);
}

void expect_close(double a, double b, double tolerance, const std::string& what) {
  if (a == b || (std::isnan(a) && std::isnan(b))) return;  // what a skipped step reports
  EXPECT_LE(std::fabs(a - b), tolerance * std::max(1.0, std::fabs(b))) << what;
}

}  // namespace

plan::Plan make_tiny_plan(const TinyRun& run) {
  plan::Topology topology;
  topology.world_size = topology.local_size = run.ranks;
  topology.physical_cores = 2;
  const auto recipe = recipe::parse_recipe(kRecipe, "tiny.yaml", run.overrides);
  plan::Plan plan = plan::make_plan(recipe, topology, {.tokenizer_vocab_size = 61});
  if (run.bucket_bytes > 0) plan.bucket_bytes = run.bucket_bytes;
  plan.resolved.run.graphs = run.graphs;
  plan.resolved.run.gemm = run.gemm;
  if (!run.frozen_blocks.empty()) {
    auto& model = plan.models.at("policy");
    model.layout = plan::Layout(model.shape, plan::freeze_blocks(model.table(), run.frozen_blocks),
                                model.layout.options());
  }
  return plan;
}

std::vector<MicroBatch> make_batches(const plan::Plan& plan, int rank, int64_t step) {
  const auto& p = plan.batch;
  const std::vector<int64_t> shape{p.micro_samples, p.sequence_length};
  int64_t sample = step * p.global_samples + rank * p.samples_per_rank;
  std::vector<MicroBatch> batches;
  for (int64_t m = 0; m < p.micro_batches; ++m) {
    MicroBatch batch;
    batch.ids_BT = at::empty(shape, at::kLong);
    batch.targets_BT = at::empty(shape, at::kLong);
    batch.rows.positions_BT = at::empty(shape, at::kLong);
    batch.rows.first_key_BT = at::empty(shape, at::kInt);
    batch.rows.positions_are_rows = false;
    for (int64_t row = 0; row < p.micro_samples; ++row, ++sample) {
      batch.rows.samples.push_back(sample);
      fill_sample(batch, row, sample, plan.model().shape.vocab_size);
    }
    batches.push_back(std::move(batch));
  }
  return batches;
}

Weights copy_weights(Engine& engine) {
  Weights weights;
  for (const auto& entry : engine.state_entries())
    if (entry.kind == "model") weights[entry.name] = entry.tensor.cpu().clone();
  return weights;
}

void with_engines(const TinyRun& run, const std::function<void(int, Engine&)>& fn,
                  const TinyHooks& hooks) {
  const plan::Plan plan = make_tiny_plan(run);
  test::run_ranks(run.ranks, [&](comm::Communicator world) {
    const int rank = world.rank();
    mesh::Mesh mesh(world, plan.grid);
    Engine engine(
        plan, mesh,
        {.hooks = hooks.hooks ? hooks.hooks(rank) : EngineHooks{}, .gemm_file = run.gemm_file});
    fn(rank, engine);
  });
}

TinyResult train(const TinyRun& run, const TinyHooks& hooks) {
  std::vector<std::vector<StepReport>> reports(static_cast<size_t>(run.ranks));
  TinyResult result;
  std::mutex mutex;
  with_engines(
      run,
      [&](int rank, Engine& engine) {
        const auto objective =
            hooks.objective ? hooks.objective(rank) : make_next_token_objective();
        for (int64_t step = 0; step < run.steps; ++step)
          reports[static_cast<size_t>(rank)].push_back(engine.step(
              make_batches(engine.plan(), engine.plan().grid.data_parallel_index(rank), step),
              *objective));
        const std::string hash = engine.weights_hash();
        const std::lock_guard lock(mutex);
        if (!result.hash.empty()) {
          EXPECT_EQ(hash, result.hash);
        }
        result.hash = hash;
        if (rank == 0) result.weights = copy_weights(engine);
      },
      hooks);
  for (const auto& of_rank : reports)
    for (size_t i = 0; i < of_rank.size(); ++i) expect_same_report(of_rank[i], reports[0][i]);
  result.reports = reports[0];
  return result;
}

void expect_same_run(const TinyResult& a, const TinyResult& b, double tolerance) {
  ASSERT_EQ(a.reports.size(), b.reports.size());
  for (size_t i = 0; i < a.reports.size(); ++i) {
    const std::string at = "step " + std::to_string(i);
    expect_close(a.reports[i].loss, b.reports[i].loss, tolerance, at + " loss");
    expect_close(a.reports[i].grad_norm, b.reports[i].grad_norm, tolerance, at + " norm");
    EXPECT_EQ(a.reports[i].target_tokens, b.reports[i].target_tokens);
    EXPECT_EQ(a.reports[i].skipped, b.reports[i].skipped);
    EXPECT_EQ(a.reports[i].lr, b.reports[i].lr);
  }
  ASSERT_EQ(a.weights.size(), b.weights.size());
  double worst = 0;
  for (const auto& [name, weight] : a.weights) {
    const Tensor other = b.weights.at(name).to(at::kDouble);
    const Tensor error =
        weight.to(at::kDouble).sub(other).abs().div(other.abs().clamp_min(1.0)).max();
    EXPECT_LE(error.item<double>(), tolerance) << name;
    worst = std::max(worst, error.item<double>());
  }
  ::testing::Test::RecordProperty("worst_weight_error", fmt::format("{:.2e}", worst));
}

}  // namespace capstan::engine::testing
