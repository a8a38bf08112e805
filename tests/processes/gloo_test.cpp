// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// World over real processes. The ranks are this program again, running one of the DISABLED_ tests
// below.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include "capstan/base/env.h"
#include "capstan/comm/world.h"
#include "support/run_processes.h"

namespace capstan::test {
namespace {

using at::Tensor;
using comm::Communicator;
using comm::World;
using ::testing::AllOf;
using ::testing::AnyOf;
using ::testing::HasSubstr;
using ::testing::Not;

ProcessResults run_rank_test(const std::string& name, int n, ProcessOptions options = {}) {
  options.program = "/proc/self/exe";
  return run_processes(
      n, {"--gtest_also_run_disabled_tests", "--gtest_filter=DISABLED_Rank." + name}, options);
}

// What a rank's program does: run, and tell the others of a failure before the connections close.
void as_rank(double timeout_s, const std::function<void(const Communicator&)>& fn) {
  at::set_num_threads(1);
  World world(comm::read_rank_env(), timeout_s);
  try {
    fn(world.communicator());
    world.close();
  } catch (const std::exception& e) {
    world.communicator().abort(e.what());
    ADD_FAILURE() << "rank " << world.rank() << ": " << e.what();
  }
}

TEST(DISABLED_Rank, Collectives) {
  as_rank(60, [](const Communicator& world) {
    ASSERT_EQ(world.backend_name(), "gloo");
    const int n = world.size();
    for (const auto type : {at::kFloat, at::kBFloat16, at::kDouble}) {
      Tensor x = at::ones({1000003}, type).mul_(world.rank() + 1);
      world.all_reduce(x).wait();
      EXPECT_EQ(x.to(at::kDouble).min().item<double>(), n * (n + 1) / 2);
      EXPECT_EQ(x.to(at::kDouble).max().item<double>(), n * (n + 1) / 2);
    }
    const Communicator pair = world.split("dp", {0, 1});
    const Tensor mine = at::full({100000}, world.rank(), at::kFloat), theirs = at::empty_like(mine);
    comm::Work receive = pair.recv(theirs, 1 - pair.rank()),
               send = pair.send(mine, 1 - pair.rank());
    receive.wait();
    send.wait();
    EXPECT_EQ(theirs.mean().item<float>(), 1 - world.rank());
    EXPECT_EQ(world.ledger().of("world", "all_reduce").calls, 3);
  });
}

TEST(GlooProcesses, TwoRanks_ReduceAndExchange) {
  const ProcessResults results = run_rank_test("Collectives", 2);
  EXPECT_TRUE(results.all_succeeded()) << results.text();
}

TEST(DISABLED_Rank, SecondThrows) {
  as_rank(60, [](const Communicator& world) {
    world.barrier().wait();
    if (world.rank() == 1) throw std::runtime_error("shard 7 is damaged");
    world.all_reduce(at::ones({300000}, at::kFloat)).wait();
  });
}

TEST(GlooProcesses, RankThatThrows_IsNamedByTheOther) {
  const ProcessResults results = run_rank_test("SecondThrows", 2);
  EXPECT_FALSE(results.timed_out) << results.text();
  EXPECT_EQ(results.ranks[0].exit_code, 1);
  EXPECT_THAT(results.ranks[0].text(),
              AllOf(HasSubstr("rank 1 failed first"), HasSubstr("shard 7 is damaged")));
}

TEST(DISABLED_Rank, SecondDies) {
  as_rank(60, [](const Communicator& world) {
    world.barrier().wait();
    if (world.rank() == 1) ::raise(SIGKILL);
    world.all_reduce(at::ones({300000}, at::kFloat)).wait();
  });
}

TEST(GlooProcesses, RankThatIsKilled_IsTheOneWithoutASignOfLife) {
  const ProcessResults results = run_rank_test("SecondDies", 2);
  EXPECT_FALSE(results.timed_out) << results.text();
  EXPECT_EQ(results.ranks[1].signal, SIGKILL);
  EXPECT_EQ(results.ranks[0].exit_code, 1);
  EXPECT_THAT(results.ranks[0].text(),
              AllOf(HasSubstr("all_reduce sum fp32 x 300,000 #1 on world[0,1]"),
                    HasSubstr("a broken connection"), HasSubstr("rank 1 gives no sign of life")));
}

TEST(DISABLED_Rank, FirstDies) {
  as_rank(60, [](const Communicator& world) {
    world.barrier().wait();
    if (world.rank() == 0) ::raise(SIGKILL);
    world.all_reduce(at::ones({300000}, at::kFloat)).wait();
  });
}

TEST(GlooProcesses, EndOfTheRankWithTheStore_EndsTheOthers) {
  const ProcessResults results = run_rank_test("FirstDies", 2);
  EXPECT_FALSE(results.timed_out) << results.text();
  EXPECT_EQ(results.ranks[1].exit_code, 1);
  EXPECT_THAT(results.ranks[1].text(), HasSubstr("rank 0 has ended, or the network to it failed"));
}

TEST(DISABLED_Rank, SecondStops) {
  as_rank(60, [](const Communicator& world) {
    Tensor pids = at::zeros({2}, at::kLong);
    pids[world.rank()] = ::getpid();
    world.all_reduce(pids).wait();
    world.set_timeout(1);
    if (world.rank() == 1) ::raise(SIGSTOP);
    try {
      world.all_reduce(at::ones({8}, at::kFloat)).wait();
    } catch (...) {
      ::kill(static_cast<pid_t>(pids[1].item<int64_t>()), SIGKILL);
      throw;
    }
  });
}

TEST(GlooProcesses, RankThatIsStopped_IsNamedAtTheDeadline) {
  const ProcessResults results = run_rank_test("SecondStops", 2);
  EXPECT_FALSE(results.timed_out) << results.text();
  EXPECT_THAT(results.ranks[0].text(), AllOf(HasSubstr("no arrival of rank 1 within 1 s"),
                                             HasSubstr("rank 1 gives no sign of life")));
}

TEST(DISABLED_Rank, MeetsNobody) {
  try {
    World world(comm::read_rank_env(), 0.5);
    ADD_FAILURE() << "met nobody";
  } catch (const EnvError& e) {
    std::puts(e.what());
  }
}

TEST(GlooProcesses, RankThatNeverStarts_IsNamed) {
  const ProcessResults results =
      run_rank_test("MeetsNobody", 1, {.env = {{"WORLD_SIZE", "3"}, {"LOCAL_WORLD_SIZE", "3"}}});
  EXPECT_TRUE(results.all_succeeded()) << results.text();
  EXPECT_THAT(results.ranks[0].out, HasSubstr("no sign of ranks 1, 2 within 0.5 s"));
}

TEST(GlooProcesses, StoreSocketOfAnotherPort_IsRefused) {
  const ProcessResults results = run_rank_test(
      "MeetsNobody", 1,
      {.env = {{"WORLD_SIZE", "2"}, {"LOCAL_WORLD_SIZE", "2"}, {"MASTER_PORT", "1"}}});
  EXPECT_THAT(results.ranks[0].out,
              AllOf(HasSubstr("CAPSTAN_STORE_FD"), HasSubstr("MASTER_PORT 1")));
}

TEST(RunProcesses, CollectsOutputCodesAndSignals) {
  const ProcessResults results = run_processes(
      2, {"-c", "echo out $RANK {rank}; echo err >&2; [ $RANK = 0 ] && exit 3; kill -9 $$"},
      {.program = "/bin/sh"});
  EXPECT_EQ(results.ranks[0].out, "out 0 0\n");
  EXPECT_EQ(results.ranks[1].err, "err\n");
  EXPECT_EQ(results.ranks[0].exit_code, 3);
  EXPECT_EQ(results.ranks[1].signal, SIGKILL);
  EXPECT_FALSE(results.all_succeeded());
}

TEST(RunProcesses, DescendantThatStays_IsReportedAndKilled) {
  const ProcessResults results =
      run_processes(1, {"-c", "setsid sleep 100 >/dev/null 2>&1 & exit 0"}, {.program = "/bin/sh"});
  ASSERT_EQ(results.survivors.size(), 1U);
  EXPECT_EQ(::kill(results.survivors[0], 0), -1);
  EXPECT_FALSE(results.all_succeeded());
}

TEST(RunProcesses, Deadline_EndsEverything) {
  const ProcessResults results = run_processes(2, {"100"}, {.program = "sleep", .deadline_s = 0.3});
  EXPECT_TRUE(results.timed_out);
  EXPECT_EQ(results.ranks[1].signal, SIGKILL);
}

TEST(RunProcesses, OneFailure_EndsTheOthersWhenAsked) {
  const ProcessResults results = run_processes(2, {"-c", "[ $RANK = 0 ] && exit 5; exec sleep 100"},
                                               {.program = "/bin/sh", .one_fails_all_end = true});
  EXPECT_FALSE(results.timed_out);
  EXPECT_EQ(results.ranks[1].signal, SIGTERM);
}

}  // namespace
}  // namespace capstan::test
