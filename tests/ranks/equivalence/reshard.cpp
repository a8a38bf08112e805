// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "ranks/equivalence/reshard.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <mutex>

#include "capstan/checkpoint/saver.h"
#include "ranks/engine_fixture.h"
#include "support/run_ranks.h"

namespace capstan::test {
namespace {

using engine::Engine;

constexpr int kSavedAt = 2;

std::vector<engine::MicroBatch> batches_of(const Engine& engine, int rank, int64_t step) {
  return engine::testing::make_batches(engine.plan(), engine.plan().grid.data_parallel_index(rank),
                                       step);
}

void run(const RankRunner& runner, int ranks,
         const std::function<void(comm::Communicator world)>& fn) {
  runner ? runner(ranks, fn) : run_ranks(ranks, fn);
}

}  // namespace

LayoutCase draw_like(std::mt19937_64& random, const LayoutCase& model, int most_ranks) {
  Fixed fixed;
  for (const LayoutAxis& axis : model_axes())
    fixed.emplace_back(axis.name, model.values.at(axis.name));
  return draw_case(random, fixed, 2000, most_ranks).value();
}

SavedRun train_and_save(const LayoutCase& layout, const std::filesystem::path& directory,
                        const RankRunner& runner) {
  SavedRun saved;
  const plan::Plan plan = make_case_plan(layout);
  std::mutex mutex;
  run(runner, layout.ranks(), [&](comm::Communicator world) {
    mesh::Mesh mesh(world, plan.grid);
    Engine engine(plan, mesh);
    const auto objective = engine::make_next_token_objective();
    for (int step = 0; step < kSavedAt; ++step)
      (void)engine.step(batches_of(engine, world.rank(), step), *objective);
    checkpoint::CommunicatorGroup group(world.control());
    checkpoint::SaveRequest request;
    request.directory = directory;
    request.step = kSavedAt;
    const checkpoint::HostState state(engine.state_entries());
    request.state = state.blobs();
    (void)checkpoint::save_step(request, group);
    const std::string hash = engine.weights_hash();
    const std::lock_guard lock(mutex);
    saved = {engine.scalars(), hash};
  });
  return saved;
}

void load_and_go_on(const LayoutCase& layout, const std::filesystem::path& directory,
                    const SavedRun& saved, const ReferenceRun& reference,
                    const RankRunner& runner) {
  const plan::Plan plan = make_case_plan(layout);
  std::mutex mutex;
  run(runner, layout.ranks(), [&](comm::Communicator world) {
    mesh::Mesh mesh(world, plan.grid);
    Engine engine(plan, mesh, {.initializes = false});
    checkpoint::CommunicatorGroup group(world.control());
    const auto step =
        checkpoint::find_newest_good_step(directory, checkpoint::Verify::kFull, group).value();
    const checkpoint::HostState state(engine.state_entries());
    auto blobs = state.blobs();
    int64_t held = 0;
    for (const auto& blob : blobs) held += static_cast<int64_t>(blob.bytes.size());
    const int64_t read = checkpoint::load_state(step, blobs);
    state.write_back();
    engine.restore(saved.scalars);
    const std::string hash = engine.weights_hash();
    const auto objective = engine::make_next_token_objective();
    std::vector<double> losses;
    const auto steps = static_cast<int64_t>(reference.reports.size());
    for (int64_t i = kSavedAt; i < steps; ++i)
      losses.push_back(engine.step(batches_of(engine, world.rank(), i), *objective).loss);
    const std::lock_guard lock(mutex);
    EXPECT_LE(read, held);
    EXPECT_EQ(hash, saved.hash);
    for (size_t i = 0; i < losses.size(); ++i) {
      const double expected = reference.reports[kSavedAt + i].loss;
      EXPECT_NEAR(losses[i] / expected, 1, 1e-9);
    }
    EXPECT_LE(state_error(engine, reference), 1e-9);
  });
}

}  // namespace capstan::test
