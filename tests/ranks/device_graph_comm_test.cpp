// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Graphs of communication alone: what a launch does, and what cannot be part of a graph is refused
// while it is recorded.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <mutex>

#include "capstan/comm/threads.h"
#include "ranks/graph_ranks.h"
#include "support/fake_device/fake_device.h"

namespace capstan::test {
namespace {

using at::Tensor;
using ::testing::HasSubstr;

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
  Tensor x = at::ones({1}, at::TensorOptions().device(fake_device()).dtype(at::kDouble));
  device::Stream stream = accelerator.create_stream(false);
  device::Event event = accelerator.create_event();
  device::Pool pool = accelerator.create_pool();
  device::Graph graph;
};

std::string refusal_of(const std::function<void(const comm::Communicator&, Recorded&)>& fn) {
  std::string text = "none";
  std::mutex mutex;
  try {
    run_ranks_on_streams(2, [&](const comm::Communicator& world) {
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

TEST(GraphOfRanks, LaunchDoesWhatWasRecorded) {
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

TEST(GraphOfRanks, WhatAGraphCannotHold_IsRefusedWhileItIsRecorded) {
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

TEST(GraphOfRanks, OperationsStayOnTheirSideOfACapture) {
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

TEST(GraphOfRanks, MemoryOfALaunchIsStillThere) {
  EXPECT_THAT(refusal_of([](const comm::Communicator& world, Recorded& graph) {
                graph.record([&] { world.all_reduce(graph.x).wait(); });
                graph.x = Tensor();
                graph.launch(world);
              }),
              HasSubstr("freed memory"));
}

// NCCL may choose another way for what a graph repeats.
TEST(GraphOfRanks, PeerWithoutAGraph_IsAnErrorOfNccl) {
  EXPECT_THAT(failure_of([] {
                run_ranks_on_streams(2, [](const comm::Communicator& world) {
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
}  // namespace capstan::test
