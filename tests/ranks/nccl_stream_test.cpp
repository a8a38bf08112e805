// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The NCCL backend orders itself against the streams of its caller and never holds the host up.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <latch>

#include "capstan/comm/nccl.h"
#include "ranks/nccl_rank.h"

namespace capstan::test {
namespace {

using at::Tensor;
using comm::Work;
using ::testing::AllOf;
using ::testing::HasSubstr;

// Makes the communicator of a group, so that what follows is launched at once.
void warm_up(const NcclRank& rank, const comm::Communicator& group) {
  group.all_reduce(rank.on_device(at::zeros({1}))).wait();
  rank.synchronize();
}

// The channels of messages to and from `peer`.
void warm_up_messages(const NcclRank& rank, const comm::Communicator& group, int to, int from) {
  Work send = group.send(rank.on_device(at::zeros({1})), to);
  Work recv = group.recv(rank.on_device(at::zeros({1})), from);
  send.wait();
  recv.wait();
  rank.synchronize();
}

TEST(NcclStreams, OperationWaitsForComputeAndComputeForOperation) {
  run_nccl_ranks(3, [](const NcclRank& rank) {
    for (const bool is_warm : {false, true}) {
      const Tensor x = at::zeros({1000}), y = at::zeros({1000});
      std::latch gate(1);
      rank.compute([&gate, x, r = rank.world.rank()] {
        gate.wait();
        x.fill_(r + 1);
      });
      Work work = rank.world.all_reduce(rank.on_device(x));
      EXPECT_TRUE(!is_warm || !work.is_done());
      work.wait();  // returns although no rank has computed x yet
      rank.compute([x, y] { y.copy_(x); });
      gate.count_down();
      rank.synchronize();
      EXPECT_EQ(y.min().item<float>(), 6);
      EXPECT_EQ(y.max().item<float>(), 6);
    }
  });
}

TEST(NcclStreams, MessagesWaitForComputeAndComputeForMessages) {
  run_nccl_ranks(2, [](const NcclRank& rank) {
    const int peer = 1 - rank.world.rank();
    for (int round = 0; round < 3; ++round) {
      const Tensor sent = at::zeros({500}), got = at::zeros({500}), y = at::zeros({500});
      std::latch gate(1);
      rank.compute([&gate, sent, peer, round] {
        gate.wait();
        sent.fill_(10 * round + peer);
      });
      Work send = rank.world.send(rank.on_device(sent), peer);
      Work recv = rank.world.recv(rank.on_device(got), peer);
      recv.wait();
      rank.compute([got, y] { y.copy_(got); });
      send.wait();
      rank.compute([sent] { sent.fill_(-1); });  // the buffer is used again
      gate.count_down();
      rank.synchronize();
      EXPECT_EQ(y.min().item<float>(), static_cast<float>(10 * round + rank.world.rank()));
    }
  });
}

TEST(NcclStreams, MemoryDroppedAfterWait_LastsAsLongAsTheOperationNeedsIt) {
  run_nccl_ranks(2, [](const NcclRank& rank) {
    warm_up(rank, rank.world);
    const Tensor out = at::zeros({2, 1000});
    std::latch gate(1);
    rank.compute([&gate] { gate.wait(); });
    {
      const Tensor in = rank.on_device(at::full({1000}, rank.world.rank() + 1.0));
      rank.world.all_gather(rank.on_device(out), in).wait();
    }
    gate.count_down();
    rank.synchronize();
    EXPECT_EQ(out.sum().item<float>(), 3000);
  });
}

TEST(NcclStreams, WorkDroppedUnwaited_HoldsItsTensorsUntilItIsDone) {
  run_nccl_ranks(2, [](const NcclRank& rank) {
    const Tensor out = at::zeros({2, 1000});
    const Tensor shown = rank.on_device(out);
    // The tensors go away at once; only a later operation of the same order is waited for.
    (void)rank.world.all_gather(shown, rank.on_device(at::full({1000}, rank.world.rank() + 1.0)));
    rank.world.all_reduce(rank.on_device(at::zeros({1}))).wait();
    rank.synchronize();
    EXPECT_EQ(out.sum().item<float>(), 3000);
  });
}

TEST(NcclStreams, WaitOnAnotherStream_OrdersThatStream) {
  run_nccl_ranks(2, [](const NcclRank& rank) {
    warm_up(rank, rank.world);
    const Tensor x = at::ones({1000}), y = at::zeros({1000});
    const device::Stream other = rank.device->create_stream(false);
    std::latch gate(1);
    rank.compute([&gate] { gate.wait(); });
    Work work = rank.world.all_reduce(rank.on_device(x));
    {
      const device::StreamGuard guard(*rank.device, other);
      work.wait();
      rank.compute([x, y] { y.copy_(x); });
    }
    gate.count_down();
    rank.device->synchronize(other);
    EXPECT_EQ(y.sum().item<float>(), 2000);
  });
}

TEST(NcclOrder, RingOfSendsBeforeReceives_DoesNotDeadlock) {
  constexpr int kRanks = 4;
  run_nccl_ranks(kRanks, [](const NcclRank& rank) {
    const int r = rank.world.rank(), next = (r + 1) % kRanks, last = (r + kRanks - 1) % kRanks;
    for (int round = 0; round < 3; ++round) {
      const Tensor got = at::zeros({100});
      Work send = rank.world.send(rank.on_device(at::full({100}, r + 10.0 * round)), next);
      Work recv = rank.world.recv(rank.on_device(got), last);
      send.wait();
      recv.wait();
      rank.synchronize();
      EXPECT_EQ(got[99].item<float>(), static_cast<float>(last + 10 * round));
    }
  });
}

TEST(NcclOrder, MessagesOfTwoDirections_DoNotHoldEachOtherUp) {
  run_nccl_ranks(2, [](const NcclRank& rank) {
    const int peer = 1 - rank.world.rank();
    warm_up_messages(rank, rank.world, peer, peer);
    const Tensor sent = at::full({100}, rank.world.rank() + 1.0), got = at::zeros({100});
    // Rank 0 waits for its send before it has issued the receive that rank 1 sends to.
    Work first = rank.world.rank() == 0 ? rank.world.send(rank.on_device(sent), 1)
                                        : rank.world.send(rank.on_device(sent), 0);
    Work second = rank.world.recv(rank.on_device(got), peer);
    second.wait();
    first.wait();
    rank.synchronize();
    EXPECT_EQ(got[0].item<float>(), static_cast<float>(peer + 1));
  });
}

TEST(NcclOrder, MessagesOnHostAndDevice_KeepTheirOrder) {
  run_nccl_ranks(2, [](const NcclRank& rank) {
    const Tensor a = at::full({3}, 1.0), b = at::full({3}, 2.0), c = at::full({3}, 3.0);
    if (rank.world.rank() == 0) {
      Work x = rank.world.send(a, 1), y = rank.world.send(rank.on_device(b), 1),
           z = rank.world.send(c, 1);
      x.wait();
      y.wait();
      z.wait();
      rank.synchronize();
      return;
    }
    const Tensor ga = at::zeros({3}), gb = at::zeros({3}), gc = at::zeros({3});
    Work x = rank.world.recv(ga, 0), y = rank.world.recv(rank.on_device(gb), 0),
         z = rank.world.recv(gc, 0);
    x.wait();
    y.wait();
    z.wait();
    rank.synchronize();
    EXPECT_EQ(ga[0].item<float>(), 1);
    EXPECT_EQ(gb[0].item<float>(), 2);
    EXPECT_EQ(gc[0].item<float>(), 3);
  });
}

TEST(NcclOrder, LongChainOnThreeAxes_StaysExact) {
  run_nccl_ranks(4, [](const NcclRank& rank) {
    const int r = rank.world.rank();
    const comm::Communicator tp =
        rank.world.split("tp", r < 2 ? std::vector{0, 1} : std::vector{2, 3});
    const comm::Communicator dp =
        rank.world.split("dp", r % 2 == 0 ? std::vector{0, 2} : std::vector{1, 3});
    const Tensor x = at::full({257}, 1.0, at::kDouble);
    const Tensor shown = rank.on_device(x);
    for (int i = 0; i < 60; ++i) {
      for (const auto* group : {&tp, &dp, &rank.world}) group->all_reduce(shown).wait();
      rank.compute([x] { x.div_(16); });
    }
    rank.synchronize();
    EXPECT_EQ(x.min().item<double>(), 1);
    EXPECT_EQ(x.max().item<double>(), 1);
  });
}

TEST(NcclRouting, CpuTensorsAndBarriers_NeverReachNccl) {
  const auto fabric = std::make_shared<FakeFabric>();
  run_nccl_ranks(2,
                 [&](const NcclRank& rank) {
                   const Tensor x = at::full({4}, rank.world.rank() + 1.0);
                   rank.world.all_reduce(x).wait();
                   rank.world.barrier().wait();
                   EXPECT_EQ(x[0].item<float>(), 3);
                   EXPECT_EQ(rank.world.backend_name(), "nccl");
                   EXPECT_EQ(rank.world.ledger().of("world", "all_reduce"), (comm::Traffic{1, 16}));
                 },
                 {.fabric = fabric});
  EXPECT_EQ(fabric->made(), 0);
}

TEST(NcclRouting, AxesWithoutTrafficOnTheDevice_MakeNoCommunicator) {
  const auto fabric = std::make_shared<FakeFabric>();
  run_nccl_ranks(2,
                 [&](const NcclRank& rank) {
                   const comm::Communicator a = rank.world.split("a", {0, 1}),
                                            b = rank.world.split("b", {0, 1});
                   for (int i = 0; i < 5; ++i) warm_up(rank, a);
                   EXPECT_EQ(b.size(), 2);
                 },
                 {.fabric = fabric});
  EXPECT_EQ(fabric->made(), 2);  // one on each rank
  EXPECT_EQ(fabric->calls(1, "ncclCommDestroy"), 1);
  EXPECT_EQ(fabric->calls(1, "ncclCommAbort"), 0);
}

std::string refusal(const std::function<void()>& call) {
  try {
    call();
  } catch (const InternalError& e) {
    return e.what();
  }
  return "accepted";
}

TEST(NcclRouting, RequestsThatDoNotFit_AreRefusedByName) {
  run_nccl_ranks(2, [](const NcclRank& rank) {
    const Tensor cpu = at::zeros({4}), x = rank.on_device(at::zeros({4}));
    const Tensor flags = rank.on_device(at::zeros({4}, at::kLong));
    EXPECT_THAT(refusal([&] { (void)rank.world.all_gather(at::zeros({8}), x); }),
                AllOf(HasSubstr("all_gather on axis world"), HasSubstr("one device for both")));
    EXPECT_THAT(refusal([&] { (void)rank.world.all_reduce(flags, comm::ReduceOp::kOr); }),
                AllOf(HasSubstr("all_reduce or int64 x 4 on axis world"),
                      HasSubstr("a reduction that NCCL does not have")));
    const comm::Communicator alone;
    EXPECT_THAT(refusal([&] { (void)alone.all_reduce(x); }),
                AllOf(HasSubstr("all_reduce on axis single"), HasSubstr("need one on the CPU")));
  });
}

TEST(NcclLife, GroupDroppedWithWorkUnderWay_LetsItEnd) {
  const auto fabric = std::make_shared<FakeFabric>();
  run_nccl_ranks(2,
                 [&](const NcclRank& rank) {
                   const Tensor x = at::full({100}, rank.world.rank() + 1.0);
                   std::latch gate(1);
                   {
                     const comm::Communicator tp = rank.world.split("tp", {0, 1});
                     warm_up(rank, tp);
                     rank.compute([&gate] { gate.wait(); });
                     tp.all_reduce(rank.on_device(x)).wait();
                     gate.count_down();
                   }
                   rank.synchronize();
                   EXPECT_EQ(x[99].item<float>(), 3);
                 },
                 {.fabric = fabric});
  EXPECT_EQ(fabric->calls(0, "ncclCommAbort"), 0);
}

TEST(NcclLife, EventsAreUsedAgain) {
  run_nccl_ranks(2, [](const NcclRank& rank) {
    warm_up(rank, rank.world);
    const Tensor x = rank.on_device(at::zeros({8}));
    for (int i = 0; i < 200; ++i) {
      rank.world.all_reduce(x).wait();
      rank.synchronize();
    }
    EXPECT_LT(rank.device->live_events(), 10);
  });
}

}  // namespace
}  // namespace capstan::test
