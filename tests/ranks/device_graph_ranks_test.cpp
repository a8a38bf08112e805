// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Graphs of several ranks: launched steps are ordinary ones to the last bit in every layout, they
// are counted and watched like them.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <mutex>
#include <optional>
#include <utility>

#include "capstan/base/error.h"
#include "capstan/comm/threads.h"
#include "capstan/ops/device_kernels.h"
#include "ranks/engine_fixture.h"
#include "ranks/graph_ranks.h"
#include "support/fake_device/device_ranks.h"
#include "support/fake_device/fake_device.h"
#include "support/fake_device/fake_kernels.h"

namespace capstan::engine {
namespace {

using test::failure_of;
using test::run_ranks_on_streams;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::make_batches;
using testing::TinyResult;
using testing::TinyRun;

constexpr int kSteps = 6, kWatched = 2;

// Rows of joined documents have no first keys.
std::vector<MicroBatch> batches_of(const plan::Plan& plan, int rank, int step) {
  auto batches = make_batches(plan, plan.grid.data_parallel_index(rank), step);
  if (plan.resolved.data.documents == "joined")
    for (MicroBatch& batch : batches) batch.rows.first_key_BT = Tensor();
  return batches;
}

struct Trained {
  TinyResult run;
  comm::Ledger::Table traffic;  // of rank 0, the last kWatched steps
  int64_t waits = 0, launches = 0;
  std::vector<Tensor> histories;  // of fp8, of all ranks
};

// What the last steps do beside training.
struct Counts {
  int64_t waits = test::host_syncs_of_thread(), launches = test::graph_launches_of_thread();
};

Trained train_by(const TinyRun& run, const std::shared_ptr<test::FakeFabric>& fabric = nullptr,
                 const std::function<void(const comm::Communicator&, int step)>& before_step = {}) {
  const plan::Plan plan = testing::make_tiny_plan(run);
  Trained out;
  std::mutex mutex;
  run_ranks_on_streams(
      run.ranks,
      [&](const comm::Communicator& world) {
        mesh::Mesh mesh(world, plan.grid);
        Engine engine(plan, mesh);
        const auto objective = make_next_token_objective();
        std::vector<StepReport> reports;
        comm::Ledger::Table traffic;
        std::optional<Counts> before;
        for (int step = 0; step < kSteps; ++step) {
          if (before_step) before_step(world, step);
          if (step == kSteps - kWatched) world.ledger().reset(), before = Counts();
          engine.start_step(batches_of(plan, world.rank(), step), *objective);
          if (engine.unreported_steps() > 1) reports.push_back(engine.finish_step());
        }
        traffic = world.ledger().table();
        const Counts after;
        while (engine.unreported_steps() > 0) reports.push_back(engine.finish_step());
        const auto weights = testing::copy_weights(engine);
        const std::string hash = engine.weights_hash();
        const std::lock_guard lock(mutex);
        for (const auto& entry : engine.state_entries())
          if (entry.kind == "fp8") out.histories.push_back(entry.tensor.cpu().clone());
        if (world.rank() != 0) return;
        out.run = {reports, weights, hash};
        out.traffic = traffic;
        out.waits = after.waits - before->waits;
        out.launches = after.launches - before->launches;
      },
      fabric);
  return out;
}

class Device : public ::testing::Environment {
  void SetUp() override { test::install_fake_device(); }
};
const auto* const device = ::testing::AddGlobalTestEnvironment(new Device);

// The run as it is and launched: the same to the last bit, in so many graphs per step, without a
// wait.
std::pair<Trained, Trained> expect_launched_steps(TinyRun run, int graphs) {
  const Trained plain = train_by(run);
  run.graphs = true;
  const Trained graph = train_by(run);
  testing::expect_same_run(graph.run, plain.run, 0);
  EXPECT_EQ(graph.run.hash, plain.run.hash);
  EXPECT_EQ(graph.traffic, plain.traffic);
  EXPECT_EQ(graph.launches, kWatched * graphs);
  EXPECT_EQ(graph.waits, 0) << test::last_host_syncs(8);
  return {plain, graph};
}

std::vector<TinyRun> layouts() {
  return {
      {.ranks = 2, .overrides = {"parallel.zero.stage=0"}},
      {.ranks = 2, .overrides = {"parallel.zero.stage=1"}},
      {.ranks = 2, .overrides = {"parallel.zero.stage=2", "data.documents=separate"}},
      {.ranks = 2, .overrides = {"parallel.zero.stage=3", "parallel.zero.prefetch=1"}},
      {.ranks = 2, .overrides = {"parallel.tensor=2"}},
      {.ranks = 2, .overrides = {"parallel.tensor=2", "parallel.sequence=true"}},
      {.ranks = 2, .overrides = {"parallel.context={size: 2, method: ring}"}},
      {.ranks = 2,
       .overrides = {"parallel.context={size: 2, method: ring}", "data.documents=separate"}},
      {.ranks = 2,
       .overrides = {"parallel.context={size: 2, method: ring}", "data.documents=separate",
                     "precision.compute=bf16", "model.head_dim=16"}},
      {.ranks = 4,
       .overrides = {"parallel.context={size: 4, method: ring}", "batch.sequence_length=48",
                     "data.documents=separate", "precision.compute=bf16", "model.head_dim=16"}},
      {.ranks = 2,
       .overrides = {"parallel.context={size: 2, method: all_to_all}", "data.documents=separate",
                     "precision.compute=bf16", "model.head_dim=16"}},
      {.ranks = 2,
       .overrides = {"parallel.context={size: 2, method: all_to_all}", "data.documents=separate"}},
      {.ranks = 2, .overrides = {"parallel.pipeline.size=2"}},
      {.ranks = 4,
       .overrides = {"parallel.tensor=2", "parallel.zero.stage=2",
                     "parallel.recompute.mode=block"}},
      {.ranks = 4,
       .overrides = {"parallel.zero={stage: 3, shard_size: 2}", "model.tie_word_embeddings=true"}}};
}

TEST(DeviceGraphRanks, PassesForTheCurvatureAreLaunchedToo) {
  for (const char* layout :
       {"parallel.zero.stage=3", "parallel.tensor=2", "parallel.pipeline.size=2"}) {
    SCOPED_TRACE(layout);
    TinyRun run{.ranks = 2,
                .overrides = {layout, "optimizer.name=sophia", "optimizer.sophia.interval=1"}};
    (void)expect_launched_steps(run, 3);
  }
}

// Of 8-bit moments: heads of 128 numbers, so that ranks of the tensor axis cut between blocks.
TEST(DeviceGraphRanks, EightBitCurvatureIsLaunchedToo) {
  ops::install_device_kernels(&test::fake_kernels());
  for (const std::vector<std::string>& layout : std::vector<std::vector<std::string>>{
           {"parallel.zero.stage=2"},
           {"parallel.zero.stage=3", "optimizer.in_backward=true", "optimizer.max_grad_norm=none",
            "batch.micro_samples=4"},
           {"parallel.tensor=2"}}) {
    SCOPED_TRACE(layout.front());
    TinyRun run{.ranks = 2, .overrides = layout};
    run.overrides.insert(
        run.overrides.end(),
        {"optimizer.name=sophia", "optimizer.sophia.interval=1", "optimizer.moments=int8",
         "precision.compute=fp32", "model.hidden_size=256", "model.intermediate_size=512",
         "model.num_hidden_layers=1", "model.head_dim=128", "model.initializer_range=0.05"});
    (void)expect_launched_steps(run, 3);
  }
  ops::install_device_kernels(nullptr);
}

TEST(DeviceGraphRanks, StepsAreThoseWithoutIt) {
  for (const TinyRun& run : layouts()) {
    SCOPED_TRACE(::testing::PrintToString(run.overrides));
    const Trained plain = expect_launched_steps(run, 2).first;
    EXPECT_EQ(plain.launches, 0);
  }
}

// Rows travel between experts in exchanges of the size of their capacity.
std::vector<TinyRun> layouts_of_experts() {
  const std::string capacity = "model.experts.capacity_factor=0.75";
  return {
      {.ranks = 2, .overrides = {"parallel.zero.stage=1"}},
      {.ranks = 2, .overrides = {"parallel.tensor=2"}},
      {.ranks = 2, .overrides = {"parallel.pipeline.size=2"}},
      {.ranks = 2, .overrides = {"parallel.context={size: 2, method: all_to_all}"}},
      {.ranks = 2, .overrides = {"parallel.expert=2", "parallel.zero.stage=1", capacity}},
      {.ranks = 2, .overrides = {"parallel.expert=2", "parallel.tensor=2", capacity}},
      {.ranks = 2,
       .overrides = {"parallel.expert=2", "parallel.tensor=2", "parallel.sequence=true", capacity}},
      {.ranks = 4,
       .overrides = {"parallel.expert=2", "parallel.zero.stage=2", "parallel.recompute.mode=block",
                     capacity}}};
}

// Choices, counts and the states of routers, which are summed over the ranks, stay on the devices.
TEST(DeviceGraphRanks, ExpertsAreLaunchedToo) {
  ops::install_device_kernels(&test::fake_kernels());
  for (const TinyRun& layout : layouts_of_experts()) {
    SCOPED_TRACE(::testing::PrintToString(layout.overrides));
    TinyRun run = layout;
    run.overrides.insert(run.overrides.end(),
                         {"model.family=moe", "model.experts.count=4", "model.experts.per_token=2",
                          "model.experts.router=sigmoid", "model.experts.bias_update_rate=0.01",
                          "model.experts.auxiliary_loss=0.02",
                          "model.experts.auxiliary_scope=global", "precision.compute=bf16"});
    const auto [plain, graph] = expect_launched_steps(run, 2);
    for (size_t step = 0; step < kSteps; ++step) {
      ASSERT_EQ(graph.run.reports[step].experts.size(), plain.run.reports[step].experts.size());
      EXPECT_EQ(graph.run.reports[step].experts[0].tokens,
                plain.run.reports[step].experts[0].tokens);
      EXPECT_EQ(graph.run.reports[step].experts[0].dropped,
                plain.run.reports[step].experts[0].dropped);
    }
  }
  ops::install_device_kernels(nullptr);
}

// Maxima of delayed fp8 scaling are joined and become scales within the graph.
TEST(DeviceGraphRanks, HistoriesOfMaximaAreLaunchedToo) {
  ops::install_device_kernels(&test::fake_kernels());
  for (const char* layout : {"parallel.zero.stage=1", "parallel.zero.stage=3", "parallel.tensor=2",
                             "parallel.pipeline.size=2"}) {
    SCOPED_TRACE(layout);
    TinyRun run{
        .ranks = 2,
        .overrides = {"precision.compute=bf16", "model.hidden_size=32",
                      "model.intermediate_size=64", "model.head_dim=16", "batch.sequence_length=32",
                      "precision.fp8.scaling=delayed", "precision.fp8.history=3", layout}};
    const Trained plain = train_by(run);
    run.graphs = true;
    const Trained graph = train_by(run);
    testing::expect_same_run(graph.run, plain.run, 0);
    EXPECT_EQ(graph.traffic, plain.traffic);
    EXPECT_EQ(graph.launches, kWatched * 2);
    EXPECT_EQ(graph.waits, 0) << test::last_host_syncs(8);
    for (const Trained* one : {&plain, &graph}) {
      ASSERT_EQ(one->histories.size(), 2U);
      EXPECT_TRUE(one->histories[0].equal(one->histories[1]));
      EXPECT_TRUE(one->histories[0].equal(plain.histories[0]));
    }
  }
  ops::install_device_kernels(nullptr);
}

// Documents of 12 tokens, and on rank 1 of two from step 4 on: rank 0 runs that step as it is, too.
std::vector<std::pair<double, int64_t>> losses_and_launches(
    bool graphs, const std::vector<std::string>& more = {}) {
  TinyRun run{
      .ranks = 2,
      .overrides = {"precision.compute=bf16", "model.head_dim=16", "data.documents=separate"},
      .graphs = graphs};
  run.overrides.insert(run.overrides.end(), more.begin(), more.end());
  const plan::Plan plan = testing::make_tiny_plan(run);
  std::vector<std::pair<double, int64_t>> made;
  run_ranks_on_streams(2, [&](const comm::Communicator& world) {
    mesh::Mesh mesh(world, plan.grid);
    Engine engine(plan, mesh);
    for (int step = 0; step < 7; ++step) {
      auto batches = make_batches(plan, world.rank(), step);
      const Tensor places_T = at::arange(plan.batch.sequence_length, at::kInt);
      const Tensor first_T = places_T.sub(places_T.remainder(world.rank() * step >= 4 ? 2 : 12));
      for (MicroBatch& batch : batches) {
        batch.rows.first_key_BT.copy_(first_T);
        batch.rows.positions_BT.copy_(places_T.sub(first_T));
      }
      const int64_t before = test::graph_launches_of_thread();
      const StepReport report = engine.step(batches, *make_next_token_objective());
      if (world.rank() == 0)
        made.emplace_back(report.loss, test::graph_launches_of_thread() - before);
    }
  });
  return made;
}

std::vector<int64_t> launches_of(const std::vector<std::string>& more) {
  const auto plain = losses_and_launches(false, more), graph = losses_and_launches(true, more);
  EXPECT_EQ(graph.size(), plain.size());
  std::vector<int64_t> launches;
  for (size_t i = 0; i < graph.size(); ++i) {
    EXPECT_EQ(graph[i].first, plain[i].first);
    launches.push_back(graph[i].second);
  }
  return launches;
}

TEST(DeviceGraphRanks, RecordAgainTogether) {
  EXPECT_THAT(launches_of({}), ElementsAre(0, 0, 2, 2, 0, 2, 2));
}

// The pass for the curvature in step 2 is no work of before, and in step 4 of another size.
TEST(DeviceGraphRanks, RecordThePassForTheCurvatureAgain) {
  EXPECT_THAT(launches_of({"optimizer.name=sophia", "optimizer.sophia.interval=2"}),
              ElementsAre(0, 0, 0, 2, 0, 2, 3));
}

TEST(DeviceGraphRanks, RankThatFails_EndsTheLaunchesOfTheOthers) {
  const std::string text = failure_of([] {
    (void)train_by({.ranks = 2, .overrides = {"parallel.zero.stage=2"}, .graphs = true}, nullptr,
                   [](const comm::Communicator& world, int step) {
                     if (world.rank() == 1 && step == 4)
                       throw DataError("the corpus ended too early");
                   });
  });
  EXPECT_THAT(text, HasSubstr("rank 1: the corpus ended too early"));
}

// In its first collective, or in the last one of the step, which nothing comes behind: it is not
// reported.
class Hanging : public ::testing::TestWithParam<bool> {};

TEST_P(Hanging, LaunchEndsByTheDeadline) {
  const auto fabric = std::make_shared<test::FakeFabric>();
  const TinyRun run{.ranks = 2, .overrides = {"parallel.zero.stage=0"}, .graphs = true};
  const plan::Plan plan = testing::make_tiny_plan(run);
  const auto train = [&](const comm::Communicator& world) {
    mesh::Mesh mesh(world, plan.grid);
    Engine engine(plan, mesh);
    for (int step = 0; step < kSteps; ++step) {
      if (step == 3) world.ledger().reset();
      if (step == 4) {
        const int64_t sums = world.ledger().total().calls;  // of gradients
        world.set_timeout(3);
        if (world.rank() == 0) fabric->hang_next(0, GetParam() ? sums : 0);
      }
      (void)engine.step(batches_of(plan, world.rank(), step), *make_next_token_objective());
      ASSERT_LT(step, 4) << "a step that hangs was reported";
    }
  };
  const std::string text = failure_of([&] { run_ranks_on_streams(2, train, fabric); });
  EXPECT_THAT(text, AllOf(HasSubstr("a launched graph #"), HasSubstr("all_reduce x"),
                          HasSubstr("on [0,1]"), HasSubstr("no end within")));
}

INSTANTIATE_TEST_SUITE_P(DeviceGraphRanks, Hanging, ::testing::Bool(),
                         [](const auto& one) { return one.param ? "InTheLast" : "InTheFirst"; });

TEST(DeviceGraphRanks, AsynchronousErrorOfALaunch_IsReported) {
  const auto fabric = std::make_shared<test::FakeFabric>();
  const std::string text = failure_of([&] {
    (void)train_by({.ranks = 2, .overrides = {"parallel.zero.stage=0"}, .graphs = true}, fabric,
                   [&](const comm::Communicator& world, int step) {
                     if (step != 4 || world.rank() != 1) return;
                     fabric->hang_next(1);
                     fabric->set_async_error(1, comm::NcclResult::kRemoteError);
                   });
  });
  EXPECT_THAT(text, AllOf(HasSubstr("rank 1:"), HasSubstr("a launched graph #"),
                          HasSubstr("remote process exited")));
}

}  // namespace
}  // namespace capstan::engine
