// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Graphs of several ranks: launched steps are ordinary ones to the last bit in every layout, they
// are counted and watched like them, and what cannot be part of a graph is refused while it is
// recorded.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <mutex>
#include <optional>

#include "capstan/base/error.h"
#include "capstan/comm/threads.h"
#include "capstan/device/accelerator.h"
#include "capstan/ops/device_kernels.h"
#include "ranks/engine_fixture.h"
#include "support/fake_device/device_ranks.h"
#include "support/fake_device/fake_device.h"
#include "support/fake_device/fake_kernels.h"

namespace capstan::engine {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::make_batches;
using testing::TinyResult;
using testing::TinyRun;

constexpr int kSteps = 6, kWatched = 2;

// As on devices of their own, ranks do not share a stream.
void run_device_ranks(int n, const std::function<void(const comm::Communicator&)>& fn,
                      std::shared_ptr<test::FakeFabric> fabric = nullptr) {
  if (!fabric) fabric = std::make_shared<test::FakeFabric>();
  const auto on_own_stream = [&](const comm::Communicator& world) {
    device::Accelerator& accelerator = *device::accelerator();
    const device::StreamGuard guard(accelerator, accelerator.create_stream(false));
    fn(world);
  };
  test::run_device_ranks(n, on_own_stream, 60, fabric);
  EXPECT_THAT(fabric->misuses(), IsEmpty());
}

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
  run_device_ranks(
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

std::string failure_of(const std::function<void()>& fn) {
  try {
    fn();
  } catch (const comm::RankError& e) {
    return e.what();
  }
  return "no failure";
}

class Device : public ::testing::Environment {
  void SetUp() override { test::install_fake_device(); }
};
const auto* const device = ::testing::AddGlobalTestEnvironment(new Device);

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
    const Trained plain = train_by(run);
    run.graphs = true;
    const Trained graph = train_by(run);
    testing::expect_same_run(graph.run, plain.run, 0);
    EXPECT_EQ(graph.run.hash, plain.run.hash);
    EXPECT_EQ(graph.traffic, plain.traffic);
    EXPECT_EQ(graph.launches, kWatched * 3);
    EXPECT_EQ(graph.waits, 0) << test::last_host_syncs(8);
  }
}

TEST(DeviceGraphRanks, StepsAreThoseWithoutIt) {
  for (TinyRun run : layouts()) {
    SCOPED_TRACE(::testing::PrintToString(run.overrides));
    const Trained plain = train_by(run);
    run.graphs = true;
    const Trained graph = train_by(run);
    testing::expect_same_run(graph.run, plain.run, 0);
    EXPECT_EQ(graph.run.hash, plain.run.hash);
    EXPECT_EQ(graph.traffic, plain.traffic);
    EXPECT_EQ(plain.launches, 0);
    EXPECT_EQ(graph.launches, kWatched * 2);
    EXPECT_EQ(graph.waits, 0) << test::last_host_syncs(8);
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
    const Trained plain = train_by(run);
    run.graphs = true;
    const Trained graph = train_by(run);
    testing::expect_same_run(graph.run, plain.run, 0);
    EXPECT_EQ(graph.run.hash, plain.run.hash);
    EXPECT_EQ(graph.traffic, plain.traffic);
    EXPECT_EQ(graph.launches, kWatched * 2);
    EXPECT_EQ(graph.waits, 0) << test::last_host_syncs(8);
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
  run_device_ranks(2, [&](const comm::Communicator& world) {
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
  const std::string text = failure_of([&] { run_device_ranks(2, train, fabric); });
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

// One rank's part of a graph made of what `work` does, with communicators that have been used.
struct Recorded {
  explicit Recorded(const comm::Communicator& world) {
    world.all_reduce(x).wait();
    accelerator.record(event, accelerator.current_stream());
    accelerator.wait(stream, event);
  }
  ~Recorded() {
    if (graph.handle) accelerator.destroy(graph);
    accelerator.destroy(event);
  }
  void record(const std::function<void()>& work) {
    const device::StreamGuard guard(accelerator, stream);
    accelerator.begin_capture(pool);
    try {
      work();
    } catch (...) {
      accelerator.destroy(accelerator.end_capture());
      throw;
    }
    graph = accelerator.end_capture();
  }
  void launch(const comm::Communicator& world) {
    world.launch({{"world/all_reduce", {1, 8}}}, [this] { accelerator.launch(graph); });
  }

  device::Accelerator& accelerator = *device::accelerator();
  Tensor x = at::ones({1}, at::TensorOptions().device(test::fake_device()).dtype(at::kDouble));
  device::Stream stream = accelerator.create_stream(false);
  device::Event event = accelerator.create_event();
  device::Pool pool = accelerator.create_pool();
  device::Graph graph;
};

std::string refusal_of(const std::function<void(const comm::Communicator&, Recorded&)>& fn) {
  std::string text = "none";
  std::mutex mutex;
  try {
    run_device_ranks(2, [&](const comm::Communicator& world) {
      Recorded graph(world);
      try {
        fn(world, graph);
      } catch (const std::exception& e) {
        const std::lock_guard lock(mutex);
        if (world.rank() == 0) text = e.what();
      }
    });
  } catch (const comm::RankError& e) {
    text += e.what();
  }
  return text;
}

TEST(DeviceGraphRanks, LaunchDoesWhatWasRecorded) {
  EXPECT_EQ(refusal_of([](const comm::Communicator& world, Recorded& graph) {
              graph.record([&] { world.all_reduce(graph.x).wait(); });
              const auto before = world.ledger().of("world", "all_reduce");
              for (int i = 0; i < 2; ++i) graph.launch(world);
              EXPECT_EQ(graph.x.item<double>(), 8);  // 2 before the capture, then twice as much
              EXPECT_EQ(world.ledger().of("world", "all_reduce").calls, before.calls + 2);
              EXPECT_EQ(world.flight_recorder().last()->what,
                        "a launched graph of world/all_reduce x 1");
            }),
            "none");
}

TEST(DeviceGraphRanks, WhatAGraphCannotHold_IsRefusedWhileItIsRecorded) {
  EXPECT_THAT(refusal_of([](const comm::Communicator& world, Recorded& graph) {
                graph.record([&] { world.all_reduce(at::ones({1})).wait(); });
              }),
              HasSubstr("waits for the host while a graph is recorded"));
  EXPECT_THAT(refusal_of([](const comm::Communicator& world, Recorded& graph) {
                graph.record([&] { world.barrier().wait(); });
              }),
              HasSubstr("waits for the host while a graph is recorded"));
  EXPECT_THAT(refusal_of([](const comm::Communicator& world, Recorded& graph) {
                const auto group = world.split("dp", {0, 1});
                graph.record([&] { group.all_reduce(graph.x).wait(); });
              }),
              HasSubstr("is one of a graph"));
  EXPECT_THAT(refusal_of([](const comm::Communicator& world, Recorded& graph) {
                graph.record([&] { graph.accelerator.synchronize(graph.stream); });
                (void)world;
              }),
              HasSubstr("the host waits during a capture"));
}

TEST(DeviceGraphRanks, OperationsStayOnTheirSideOfACapture) {
  EXPECT_THAT(refusal_of([](const comm::Communicator& world, Recorded& graph) {
                comm::Work work;
                graph.record([&] { work = world.all_reduce(graph.x); });
              }),
              HasSubstr("before a stream was joined"));
  EXPECT_THAT(refusal_of([](const comm::Communicator& world, Recorded& graph) {
                comm::Work work = world.all_reduce(graph.x);
                try {
                  graph.record([&] { work.wait(); });
                } catch (...) {
                  world.all_reduce(graph.x).wait();
                  throw;
                }
              }),
              HasSubstr("came before the recording that waits for it"));
  EXPECT_THAT(refusal_of([](const comm::Communicator& world, Recorded& graph) {
                comm::Work kept;
                graph.record([&] {
                  kept = world.all_reduce(graph.x);
                  world.all_reduce(graph.x).wait();
                });
                kept.wait();
              }),
              HasSubstr("is part of a graph and waited for outside"));
}

TEST(DeviceGraphRanks, MemoryOfALaunchIsStillThere) {
  EXPECT_THAT(refusal_of([](const comm::Communicator& world, Recorded& graph) {
                graph.record([&] { world.all_reduce(graph.x).wait(); });
                graph.x = Tensor();
                graph.launch(world);
              }),
              HasSubstr("freed memory"));
}

// NCCL may choose another way for what a graph repeats.
TEST(DeviceGraphRanks, PeerWithoutAGraph_IsAnErrorOfNccl) {
  EXPECT_THAT(failure_of([] {
                run_device_ranks(2, [](const comm::Communicator& world) {
                  Recorded graph(world);
                  if (world.rank() == 0) {
                    graph.record([&] { world.all_reduce(graph.x).wait(); });
                    graph.launch(world);
                  } else {
                    world.all_reduce(graph.x).wait();
                  }
                  for (;;) world.barrier().wait();
                });
              }),
              HasSubstr("invalid usage"));
}

}  // namespace
}  // namespace capstan::engine
