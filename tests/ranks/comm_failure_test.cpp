// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Nobody waits for ever, and the message names the culprit.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <latch>
#include <mutex>

#include "capstan/base/env.h"
#include "capstan/comm/threads.h"
#include "ranks/comm_backends.h"
#include "support/run_ranks.h"

namespace capstan::test {
namespace {

using at::Tensor;
using comm::AbortedError;
using comm::Communicator;
using ::testing::AllOf;
using ::testing::AnyOf;
using ::testing::HasSubstr;
using ::testing::Not;

// What the first failing rank reported.
std::string failure_of(Kind kind, int n, const std::function<void(const Communicator&)>& fn,
                       double timeout_s = 60) {
  try {
    run_on(
        kind, n, [&](const Communicator& world) { fn(world); }, timeout_s);
  } catch (const comm::RankError& e) {
    return e.what();
  }
  return "no failure";
}

class Failure : public ::testing::TestWithParam<Kind> {};

TEST_P(Failure, MissingRank_IsNamedAtTheDeadline) {
  std::latch reported(3);
  const std::string text = failure_of(
      GetParam(), 4,
      [&](const Communicator& world) {
        if (world.rank() == 2) return reported.wait();  // busy elsewhere
        struct Report {
          std::latch& latch;
          ~Report() { latch.count_down(); }
        } report{reported};
        world.all_reduce(at::ones({4096}, at::kFloat)).wait();
      },
      0.5);
  EXPECT_THAT(text,
              AllOf(HasSubstr("all_reduce sum fp32 x 4,096 #0 on world[0,1,2,3]"),
                    HasSubstr("no arrival of rank 2"), HasSubstr("0.5 s"),
                    HasSubstr("rank 2 waits for nobody"), Not(HasSubstr("no arrival of rank 1"))));
}

TEST_P(Failure, ChainOfWaits_IsFollowedToItsEnd) {
  // Rank 0 waits for 1 on a, rank 1 for 2 on b, rank 2 is busy: the message must name 2, not 1.
  std::latch reported(2);
  const std::string text = failure_of(
      GetParam(), 3,
      [&](const Communicator& world) {
        const Communicator a =
            world.split("a", world.rank() < 2 ? std::vector{0, 1} : std::vector{2});
        const Communicator b =
            world.split("b", world.rank() > 0 ? std::vector{1, 2} : std::vector{0});
        world.barrier().wait();
        if (world.rank() == 2) return reported.wait();
        struct Report {
          std::latch& latch;
          ~Report() { latch.count_down(); }
        } report{reported};
        world.set_timeout(world.rank() == 0 ? 0.6 : 5);  // rank 0 reports
        const Tensor x = at::ones({8}, at::kFloat);
        (world.rank() == 0 ? a : b).all_reduce(x).wait();
      },
      5);
  EXPECT_THAT(text,
              AllOf(HasSubstr("rank 0:"), HasSubstr("on a[0,1]"), HasSubstr("no arrival of rank 2"),
                    HasSubstr("rank 1 waits in all_reduce sum fp32 x 8 #0 on b[1,2] for rank 2")));
}

TEST_P(Failure, RankThatThrows_EndsAllWaitsAndIsTheOneReported) {
  const int64_t begin = monotonic_ns();
  std::mutex mutex;
  std::vector<std::string> others;
  const std::string text = failure_of(GetParam(), 4, [&](const Communicator& world) {
    try {
      world.barrier()
          .wait();  // may end early as well: the others need not be through when rank 1 is
      if (world.rank() == 1) throw DataError("the corpus ended too early");
      world.all_reduce(at::ones({70000}, at::kFloat)).wait();
    } catch (const AbortedError& e) {
      std::lock_guard lock(mutex);
      others.push_back(e.what());
      throw;
    }
  });
  EXPECT_THAT(text, HasSubstr("rank 1: the corpus ended too early"));
  ASSERT_EQ(others.size(), 3U);
  for (const auto& other : others)
    EXPECT_THAT(other,
                AllOf(HasSubstr("rank 1 failed first"), HasSubstr("the corpus ended too early")));
  EXPECT_LT(monotonic_ns() - begin, int64_t{60'000'000'000}) << "the deadline was waited for";
}

TEST_P(Failure, AfterAnAbort_EveryCallFailsAtOnce) {
  const std::string text = failure_of(GetParam(), 2, [](const Communicator& world) {
    if (world.rank() == 0) world.abort("enough");
    for (;;) world.barrier().wait();
  });
  EXPECT_THAT(text, AllOf(HasSubstr("rank 0 failed first: "), HasSubstr("enough")));
}

TEST_P(Failure, SplitWithDifferentMembers_IsRefused) {
  const std::string text = failure_of(GetParam(), 3, [](const Communicator& world) {
    const std::vector<int> members = world.rank() == 1   ? std::vector{1, 2}
                                     : world.rank() == 0 ? std::vector{0, 1}
                                                         : std::vector{2};
    (void)world.split("tp", members);
  });
  EXPECT_THAT(text, AllOf(HasSubstr("splitting"), HasSubstr("tp"),
                          AnyOf(HasSubstr("[0,1] on rank 0 and [1,2] on rank 1"),
                                HasSubstr("[1,2] on rank 1 and [2] on rank 2"))));
}

INSTANTIATE_TEST_SUITE_P(Backends, Failure,
                         ::testing::Values(Kind::kThreads, Kind::kGloo, Kind::kNccl,
                                           Kind::kNcclOverGloo),
                         [](const auto& parameter) { return name_of(parameter.param); });

std::string mismatch_of(const std::function<void(const Communicator&)>& fn, int n = 2) {
  return failure_of(Kind::kThreads, n, fn);
}

TEST(Mismatch, DifferentOperations_NameBothRanks) {
  const std::string text = mismatch_of([](const Communicator& world) {
    const Tensor x = at::ones({4}, at::kFloat), all = at::ones({8}, at::kFloat);
    (world.rank() == 0 ? world.all_reduce(x) : world.all_gather(all, x)).wait();
  });
  EXPECT_THAT(text, AllOf(HasSubstr("#0 on world[0,1]"), HasSubstr("different calls"),
                          HasSubstr("rank 0"), HasSubstr("rank 1"),
                          HasSubstr("all_reduce sum fp32 x 4"), HasSubstr("all_gather fp32 x 4")));
}

TEST(Mismatch, DifferentSizes_AreFound) {
  const std::string text = mismatch_of([](const Communicator& world) {
    world.all_reduce(at::ones({4 + world.rank()}, at::kFloat)).wait();
  });
  EXPECT_THAT(text, AllOf(HasSubstr("fp32 x 4"), HasSubstr("fp32 x 5")));
}

TEST(Mismatch, DifferentTypes_AreFound) {
  const std::string text = mismatch_of([](const Communicator& world) {
    world.all_reduce(at::ones({4}, world.rank() == 0 ? at::kFloat : at::kDouble)).wait();
  });
  EXPECT_THAT(text, AllOf(HasSubstr("fp32 x 4"), HasSubstr("fp64 x 4")));
}

TEST(Mismatch, DifferentReductionsAndRoots_AreFound) {
  EXPECT_THAT(mismatch_of([](const Communicator& world) {
                const auto op = world.rank() == 0 ? comm::ReduceOp::kSum : comm::ReduceOp::kMax;
                world.all_reduce(at::ones({4}, at::kFloat), op).wait();
              }),
              AllOf(HasSubstr("all_reduce sum"), HasSubstr("all_reduce max")));
  EXPECT_THAT(mismatch_of([](const Communicator& world) {
                world.broadcast(at::ones({4}, at::kFloat), world.rank()).wait();
              }),
              AllOf(HasSubstr("from 0"), HasSubstr("from 1")));
}

TEST(Mismatch, AllToAllVCounts_NameThePair) {
  const std::string text = mismatch_of([](const Communicator& world) {
    const Tensor in = at::ones({4, 2}, at::kFloat),
                 out = at::ones({world.rank() == 0 ? 4 : 5, 2}, at::kFloat);
    const std::vector<int64_t> out_rows =
        world.rank() == 0 ? std::vector<int64_t>{2, 2} : std::vector<int64_t>{3, 2};
    world.all_to_all_v(out, in, out_rows, {2, 2}).wait();
  });
  EXPECT_THAT(text, HasSubstr("rank 0 sends 2 rows of 2 elements to rank 1, which expects 3 of 2"));
}

TEST(Mismatch, MessageOfAnotherSize_IsFound) {
  const std::string text = mismatch_of([](const Communicator& world) {
    (world.rank() == 0 ? world.send(at::ones({4}, at::kFloat), 1)
                       : world.recv(at::ones({5}, at::kFloat), 0))
        .wait();
  });
  EXPECT_THAT(text, AllOf(HasSubstr("send fp32 x 4"), HasSubstr("recv fp32 x 5")));
}

TEST(ThreadsBackend, SendsInACircle_AreReportedAsWaitingForEachOther) {
  const std::string text = failure_of(
      Kind::kThreads, 2,
      [](const Communicator& world) {
        const Tensor x = at::ones({4}, at::kFloat);
        world.send(x, 1 - world.rank()).wait();
        world.recv(x, 1 - world.rank()).wait();
      },
      0.4);
  EXPECT_THAT(text, HasSubstr("ranks that wait for each other"));
}

TEST(ThreadsBackend, RankThatEndedEarly_IsNamed) {
  const std::string text = failure_of(
      Kind::kThreads, 2,
      [](const Communicator& world) {
        if (world.rank() == 0) world.barrier().wait();
      },
      0.4);
  EXPECT_THAT(text, AllOf(HasSubstr("no arrival of rank 1"), HasSubstr("its thread has ended")));
}

TEST(ThreadRanks, FailureKeepsItsExitCodesAndCause) {
  try {
    comm::run_thread_ranks(3, [](const Communicator& world) {
      if (world.rank() == 2) throw DivergenceError("too many non-finite steps");
      world.barrier().wait();
    });
    FAIL() << "no failure";
  } catch (const comm::RankError& e) {
    EXPECT_EQ(e.rank(), 2);
    EXPECT_EQ(e.run_exit_code(), 93);
    EXPECT_THROW(std::rethrow_exception(e.cause()), DivergenceError);
  }
}

TEST(ThreadRanks, ForeignExceptions_PassAsTheyAre) {
  struct Stop {
    int code;
  };
  try {
    comm::run_thread_ranks(2, [](const Communicator&) { throw Stop{90}; });
    FAIL() << "no failure";
  } catch (const Stop& stop) {
    EXPECT_EQ(stop.code, 90);
  }
}

TEST(RunRanks, RankThatHangsOutsideOfComm_EndsTheProgramWithAReport) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(run_ranks(
                  2,
                  [](const Communicator& world) {
                    world.barrier().wait();
                    std::latch never(1);
                    if (world.rank() == 1) never.wait();
                  },
                  0.5),
              ::testing::ExitedWithCode(1),
              "rank 1 is late; operations: barrier #0 on world\\[0,1\\]: done");
}

}  // namespace
}  // namespace capstan::test
