// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// A checkpoint of one layout goes on under another, and the run is that of one rank. Every rank
// reads what it holds and no more. CAPSTAN_LAYOUTS sets the number of pairs.
#include <ATen/ATen.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <map>
#include <mutex>

#include "capstan/checkpoint/saver.h"
#include "ranks/engine_fixture.h"
#include "ranks/equivalence/equivalence.h"
#include "support/run_ranks.h"
#include "support/temp_dir.h"

namespace capstan::test {
namespace {

using engine::Engine;

constexpr int kSavedAt = 2, kSteps = 4;

std::vector<engine::MicroBatch> batches_of(const Engine& engine, int rank, int64_t step) {
  return engine::testing::make_batches(engine.plan(), engine.plan().grid.data_parallel_index(rank),
                                       step);
}

struct Saved {
  engine::EngineScalars scalars;
  std::string hash;
};

Saved train_and_save(const LayoutCase& layout, const std::filesystem::path& directory) {
  Saved saved;
  const plan::Plan plan = make_case_plan(layout);
  std::mutex mutex;
  run_ranks(layout.ranks(), [&](comm::Communicator world) {
    mesh::Mesh mesh(world, plan.grid);
    Engine engine(plan, mesh);
    const auto objective = engine::make_next_token_objective();
    for (int step = 0; step < kSavedAt; ++step)
      (void)engine.step(batches_of(engine, world.rank(), step), *objective);
    checkpoint::CommunicatorGroup group(world.control());
    checkpoint::SaveRequest request;
    request.directory = directory;
    request.step = kSavedAt;
    request.state = checkpoint::blobs_of(engine.state_entries());
    (void)checkpoint::save_step(request, group);
    const std::string hash = engine.weights_hash();
    const std::lock_guard lock(mutex);
    saved = {engine.scalars(), hash};
  });
  return saved;
}

void load_and_go_on(const LayoutCase& layout, const std::filesystem::path& directory,
                    const Saved& saved, const ReferenceRun& reference) {
  const plan::Plan plan = make_case_plan(layout);
  std::mutex mutex;
  run_ranks(layout.ranks(), [&](comm::Communicator world) {
    mesh::Mesh mesh(world, plan.grid);
    Engine engine(plan, mesh, {.initializes = false});
    checkpoint::CommunicatorGroup group(world.control());
    const auto step =
        checkpoint::find_newest_good_step(directory, checkpoint::Verify::kFull, group).value();
    auto blobs = checkpoint::blobs_of(engine.state_entries());
    int64_t held = 0;
    for (const auto& blob : blobs) held += static_cast<int64_t>(blob.bytes.size());
    const int64_t read = checkpoint::load_state(step, blobs);
    engine.restore(saved.scalars);
    const std::string hash = engine.weights_hash();
    const auto objective = engine::make_next_token_objective();
    std::vector<double> losses;
    for (int64_t i = kSavedAt; i < kSteps; ++i)
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

TEST(Reshard, AnyLayoutGoesOnFromAnyOther) {
  const char* wanted = std::getenv("CAPSTAN_LAYOUTS");
  const int count = wanted ? std::stoi(wanted) : 40;
  std::mt19937_64 random(7);
  std::map<std::string, ReferenceRun> references;
  for (int i = 0; i < count; ++i) {
    Fixed model;  // that of any legal case
    const LayoutCase any = draw_case(random, {}, 1000, 8).value();
    for (const LayoutAxis& axis : model_axes())
      model.emplace_back(axis.name, any.values.at(axis.name));
    const LayoutCase first = draw_case(random, model, 2000, 8).value();
    const LayoutCase second = draw_case(random, model, 2000, 8).value();
    // Every fourth pair goes to or comes from one rank.
    const LayoutCase from = i % 8 == 3 ? first.one_rank() : first;
    const LayoutCase to = i % 8 == 7 ? second.one_rank() : second;
    SCOPED_TRACE(fmt::format("{}  ->  {}", from.describe(), to.describe()));
    auto found = references.find(from.model_key());
    if (found == references.end())
      found = references.emplace(from.model_key(), run_reference(from, kSteps)).first;
    const TempDir folder("reshard");
    const Saved saved = train_and_save(from, folder.path());
    load_and_go_on(to, folder.path(), saved, found->second);
    if (HasFailure()) return;
  }
}

}  // namespace
}  // namespace capstan::test
