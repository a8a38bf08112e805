// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Asynchrony: issuing does not wait for other ranks, operations run in the order of issue, tensors
// live long enough.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <atomic>
#include <latch>

#include "ranks/comm_backends.h"
#include "support/run_ranks.h"

namespace capstan::test {
namespace {

using at::Tensor;
using comm::Communicator;

class Order : public ::testing::TestWithParam<Kind> {};

TEST_P(Order, Issue_DoesNotWaitForTheOtherRank) {
  std::latch issued(1);
  run_on(GetParam(), 2, [&](const Communicator& world) {
    Tensor x = at::ones({100000}, at::kFloat), y = at::ones({3}, at::kFloat);
    if (world.rank() == 0) {
      comm::Work first = world.all_reduce(x), second = world.all_reduce(y);
      EXPECT_FALSE(first.is_done());  // rank 1 comes only after the latch
      EXPECT_FALSE(second.is_done());
      issued.count_down();
      first.wait();
      second.wait();
    } else {
      issued.wait();
      world.all_reduce(x).wait();
      world.all_reduce(y).wait();
    }
    EXPECT_EQ(x[99999].item<float>(), 2);
    EXPECT_EQ(y[2].item<float>(), 2);
  });
}

TEST_P(Order, WorksWaitedInReverse_GiveTheResultsOfTheirOwnCalls) {
  run_on(GetParam(), 4, [](const Communicator& world) {
    std::vector<Tensor> tensors;
    std::vector<comm::Work> works;
    for (int i = 0; i < 20; ++i) {
      tensors.push_back(at::full({1 + 5000 * i}, world.rank() + 100.0 * i, at::kDouble));
      works.push_back(world.all_reduce(tensors.back()));
    }
    for (int i = 19; i >= 0; --i) {
      works[static_cast<size_t>(i)].wait();
      EXPECT_EQ(tensors[static_cast<size_t>(i)].min().item<double>(), 6 + 400.0 * i);
      EXPECT_EQ(tensors[static_cast<size_t>(i)].max().item<double>(), 6 + 400.0 * i);
    }
  });
}

TEST_P(Order, CommunicatorsAreIndependent) {
  // Rank 0 issues on a before b, rank 1 on b before a, neither waits in between.
  run_on(GetParam(), 2, [](const Communicator& world) {
    const Communicator a = world.split("a", {0, 1}), b = world.split("b", {0, 1});
    Tensor x = at::ones({50000}, at::kFloat), y = at::ones({50000}, at::kFloat);
    comm::Work first = world.rank() == 0 ? a.all_reduce(x) : b.all_reduce(y);
    comm::Work second = world.rank() == 0 ? b.all_reduce(y) : a.all_reduce(x);
    second.wait();
    first.wait();
    EXPECT_EQ((x + y).sum().item<float>(), 200000);
  });
}

TEST_P(Order, TensorsDroppedBeforeWait_StayAliveForTheOperation) {
  run_on(GetParam(), 2, [](const Communicator& world) {
    const Tensor out = at::empty({2, 30000}, at::kFloat);
    comm::Work work = world.all_gather(out, at::full({30000}, world.rank() + 1, at::kFloat));
    const Tensor other = at::zeros({30000}, at::kFloat);  // would reuse the memory
    work.wait();
    EXPECT_EQ(out.sum().item<float>(), 90000);
    EXPECT_EQ(other.sum().item<float>(), 0);
  });
}

TEST_P(Order, BothDirectionsIssuedTogether_ExchangeWithoutDeadlock) {
  run_on(GetParam(), 2, [](const Communicator& world) {
    const int peer = 1 - world.rank();
    const Tensor mine = at::full({int64_t{1} << 20}, world.rank(), at::kFloat),
                 theirs = at::empty_like(mine);
    comm::Work receive = world.recv(theirs, peer), send = world.send(mine, peer);
    receive.wait();
    send.wait();
    EXPECT_EQ(theirs.mean().item<float>(), peer);
  });
}

TEST_P(Order, FlightRecorder_TellsWhatRan) {
  run_on(GetParam(), 2, [](const Communicator& world) {
    const Communicator dp = world.split("dp", {0, 1});
    dp.all_reduce(at::ones({1234}, at::kBFloat16)).wait();
    const auto flight = world.flight_recorder().last();
    ASSERT_TRUE(flight.has_value());
    EXPECT_EQ(flight->what, "all_reduce sum bf16 x 1,234");
    EXPECT_EQ(flight->axis, "dp[0,1]");
    EXPECT_EQ(flight->sequence, 0);
    EXPECT_EQ(flight->state, comm::Flight::State::kDone);
    EXPECT_GE(flight->end_ns, flight->issued_ns);
  });
}

INSTANTIATE_TEST_SUITE_P(Backends, Order,
                         ::testing::Values(Kind::kThreads, Kind::kGloo, Kind::kNccl,
                                           Kind::kNcclOverGloo),
                         [](const auto& parameter) { return name_of(parameter.param); });

INSTANTIATE_TEST_SUITE_P(DISABLED_Rank, Order, ::testing::Values(Kind::kProcess),
                         [](const auto& parameter) { return name_of(parameter.param); });

TEST(ThreadsBackend, SixteenRanksManyOperations_StayInStep) {
  run_ranks(16, [](const Communicator& world) {
    const int row = world.rank() / 4, column = world.rank() % 4;
    const Communicator a = world.split("a", {4 * row, 4 * row + 1, 4 * row + 2, 4 * row + 3});
    const Communicator b = world.split("b", {column, column + 4, column + 8, column + 12});
    for (int i = 0; i < 100; ++i) {
      Tensor x = at::full({257}, world.rank(), at::kDouble);
      a.all_reduce(x).wait();
      b.all_reduce(x).wait();
      ASSERT_EQ(x[256].item<double>(), 120) << "round " << i;
    }
  });
}

}  // namespace
}  // namespace capstan::test
