// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What goes wrong in NCCL or on the device ends the job with one message that names the operation,
// the axis and the ranks; no rank hangs and every communicator is aborted.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <latch>
#include <mutex>

#include "capstan/base/env.h"
#include "capstan/comm/threads.h"
#include "ranks/nccl_rank.h"

namespace capstan::test {
namespace {

using at::Tensor;
using comm::Communicator;
using comm::NcclResult;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

std::string failure_of(int n, const std::function<void(const NcclRank&)>& fn,
                       const NcclRankOptions& options) {
  try {
    run_nccl_ranks(n, fn, options);
  } catch (const comm::RankError& e) {
    return e.what();
  }
  return "no failure";
}

// Reads a result as a program does: waits for the device, then asks whether all went well.
void all_reduce(const NcclRank& rank, const Communicator& group, int64_t count = 8) {
  comm::Work work = group.all_reduce(rank.on_device(at::ones({count})));
  work.wait();
  rank.synchronize();
  group.all_reduce(rank.on_device(at::ones({1}))).wait();
}

class NcclFailure : public ::testing::TestWithParam<Kind> {
 protected:
  std::shared_ptr<FakeFabric> fabric_ = std::make_shared<FakeFabric>();
  NcclRankOptions options(double timeout_s = 60) {
    return {.fabric = fabric_, .control = GetParam(), .timeout_s = timeout_s};
  }
};

TEST_P(NcclFailure, CallThatFails_IsNamedWithCollectiveAxisAndRanks) {
  const std::string text = failure_of(
      3,
      [&](const NcclRank& rank) {
        const Communicator dp = rank.world.split("dp", {0, 1, 2});
        all_reduce(rank, dp);
        if (rank.world.rank() == 1)
          fabric_->fail_next(1, "ncclAllReduce", NcclResult::kSystemError);
        for (;;) all_reduce(rank, dp, 77);
      },
      options());
  EXPECT_THAT(text,
              AllOf(HasSubstr("rank 1:"), HasSubstr("all_reduce sum fp32 x 77 #"),
                    HasSubstr("on dp[0,1,2]"), HasSubstr("ncclAllReduce: unhandled system error")));
}

TEST_P(NcclFailure, FirstCallThatFails_SurfacesAtTheWait) {
  fabric_->fail_next(0, "ncclSend", NcclResult::kInvalidUsage);
  const std::string text = failure_of(
      2,
      [&](const NcclRank& rank) {
        const Tensor x = rank.on_device(at::ones({5}));
        comm::Work work = rank.world.rank() == 0 ? rank.world.send(x, 1) : rank.world.recv(x, 0);
        work.wait();
        for (;;) rank.world.barrier().wait();
      },
      options());
  EXPECT_THAT(text, AllOf(HasSubstr("rank 0:"), HasSubstr("send fp32 x 5 to rank 1 #0 on world"),
                          HasSubstr("ncclSend: invalid usage")));
}

TEST_P(NcclFailure, CommunicatorThatCannotBeMade_IsReported) {
  fabric_->fail_next(1, "ncclCommInitRankConfig", NcclResult::kUnhandledCudaError);
  const std::string text = failure_of(
      2, [&](const NcclRank& rank) { all_reduce(rank, rank.world); }, options());
  EXPECT_THAT(text,
              AllOf(HasSubstr("rank 1:"), HasSubstr("all_reduce sum fp32 x 8 #0 on world[0,1]"),
                    HasSubstr("ncclCommInitRankConfig: unhandled cuda error")));
}

TEST_P(NcclFailure, IdentifierThatCannotBeMade_EndsTheSplit) {
  const std::string text = failure_of(
      2,
      [&](const NcclRank& rank) {
        fabric_->fail_next(0, "ncclGetUniqueId", NcclResult::kSystemError);
        (void)rank.world.split("tp", {0, 1});
      },
      options());
  EXPECT_THAT(text, AllOf(HasSubstr("preparing NCCL for the ranks [0,1]"),
                          HasSubstr("ncclGetUniqueId: unhandled system error")));
}

TEST_P(NcclFailure, AsynchronousError_EndsTheOperationAndNamesIt) {
  std::mutex mutex;
  std::vector<std::string> others;
  const std::string text = failure_of(
      3,
      [&](const NcclRank& rank) {
        all_reduce(rank, rank.world);
        rank.synchronize();
        rank.world.barrier().wait();
        try {
          if (rank.world.rank() == 2) {
            fabric_->hang_next(2);
            fabric_->set_async_error(2, NcclResult::kRemoteError);
          }
          for (;;) all_reduce(rank, rank.world, 33);
        } catch (const comm::AbortedError& e) {
          std::lock_guard lock(mutex);
          others.push_back(e.what());
          throw;
        }
      },
      options());
  EXPECT_THAT(text, AllOf(HasSubstr("rank 2:"), HasSubstr("all_reduce sum fp32 x"),
                          HasSubstr("on world[0,1,2]"), HasSubstr("an asynchronous NCCL error"),
                          HasSubstr("remote process exited or there was a network error")));
  EXPECT_EQ(others.size(), 2U);
  for (const auto& other : others) EXPECT_THAT(other, HasSubstr("rank 2 failed first"));
}

TEST_P(NcclFailure, DeadlinePassesWhileTheHostIsFree_NextCallReportsIt) {
  std::latch over(1);
  const std::string text = failure_of(
      2,
      [&](const NcclRank& rank) {
        all_reduce(rank, rank.world);
        rank.synchronize();
        rank.world.barrier().wait();
        if (rank.world.rank() == 1) return over.wait();  // never issues again
        struct Over {
          std::latch& latch;
          ~Over() { latch.count_down(); }
        } guard{over};
        rank.world.set_timeout(0.3);
        comm::Work work = rank.world.all_reduce(rank.on_device(at::ones({9})));
        work.wait();         // returns at once
        rank.synchronize();  // ends with the abort
        (void)rank.world.all_reduce(rank.on_device(at::ones({1})));
      },
      options());
  EXPECT_THAT(
      text,
      AllOf(HasSubstr("rank 0: [comm] waiting in all_reduce sum fp32 x 9 #2 on world[0,1] failed"),
            HasSubstr("no arrival of rank 1 within 0.3 s")));
}

TEST_P(NcclFailure, DeviceThatDoesNotReachTheOperation_IsTheOneNamed) {
  std::latch over(1), gate(1);
  const std::string text = failure_of(
      2,
      [&](const NcclRank& rank) {
        all_reduce(rank, rank.world);
        rank.synchronize();
        rank.world.barrier().wait();
        struct Over {
          std::latch& latch;
          ~Over() { latch.count_down(); }
        };
        if (rank.world.rank() == 1) {  // issues in time, but its device is stuck in a kernel
          const Over guard{gate};
          rank.compute([&gate] { gate.wait(); });
          (void)rank.world.all_reduce(rank.on_device(at::ones({9})));
          return over.wait();
        }
        const Over guard{over};
        rank.world.set_timeout(0.3);
        comm::Work work = rank.world.all_reduce(rank.on_device(at::ones({9})));
        work.wait();
        rank.synchronize();
        work = rank.world.all_reduce(rank.on_device(at::ones({1})));
      },
      options());
  EXPECT_THAT(text, AllOf(HasSubstr("no arrival of rank 1"), HasSubstr("all_reduce sum fp32 x 9")));
}

TEST_P(NcclFailure, OperationThatHangsInside_SaysThatAllHaveCome) {
  fabric_->hang_next(1);
  const std::string text = failure_of(
      2, [&](const NcclRank& rank) { all_reduce(rank, rank.world); }, options(0.5));
  EXPECT_THAT(text, HasSubstr("all ranks but no end within 0.5 s"));
}

TEST_P(NcclFailure, RankThatThrows_FreesDevicesThatWait) {
  const int64_t begin = monotonic_ns();
  const std::string text = failure_of(
      4,
      [&](const NcclRank& rank) {
        all_reduce(rank, rank.world);
        rank.synchronize();
        rank.world.barrier().wait();
        if (rank.world.rank() == 3) throw DataError("the corpus ended too early");
        for (;;) all_reduce(rank, rank.world);
      },
      options());
  EXPECT_THAT(text,
              AllOf(HasSubstr("rank 3: the corpus ended too early"), Not(HasSubstr("no arrival"))));
  EXPECT_LT(monotonic_ns() - begin, int64_t{60'000'000'000}) << "the deadline was waited for";
  for (const int rank : {0, 1, 2, 3}) EXPECT_EQ(fabric_->calls(rank, "ncclCommDestroy"), 0);
}

TEST_P(NcclFailure, DifferentCalls_AreFoundByNccl) {
  const std::string text = failure_of(
      2, [&](const NcclRank& rank) { all_reduce(rank, rank.world, 4 + rank.world.rank()); },
      options());
  EXPECT_THAT(text, AllOf(HasSubstr("an asynchronous NCCL error: invalid usage"),
                          HasSubstr("all_reduce sum fp32 x"), HasSubstr("on world[0,1]")));
}

INSTANTIATE_TEST_SUITE_P(Control, NcclFailure, ::testing::Values(Kind::kThreads, Kind::kGloo),
                         [](const auto& parameter) { return name_of(parameter.param); });

TEST(NcclRestart, FiftyAbortedJobs_LeaveNothingOpen) {
  for (int i = 0; i < 50; ++i) {
    const auto fabric = std::make_shared<FakeFabric>();
    const std::string text = failure_of(2,
                                        [&](const NcclRank& rank) {
                                          all_reduce(rank, rank.world);
                                          if (rank.world.rank() == i % 2) throw DataError("stop");
                                          for (;;) all_reduce(rank, rank.world);
                                        },
                                        {.fabric = fabric});
    ASSERT_THAT(text, HasSubstr("stop"));
    ASSERT_EQ(fabric->open(), 0);
  }
}

}  // namespace
}  // namespace capstan::test
