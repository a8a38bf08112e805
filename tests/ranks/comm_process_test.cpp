// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The conformance suite with a process per rank: over gloo, and on one GPU over NCCL. The ranks are
// this program again, running what is DISABLED_ here and in the files of the suite.
#include <ATen/ATen.h>
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <thread>

#include "ranks/process_rank.h"
#include "support/gpu_ranks.h"
#include "support/run_processes.h"

namespace capstan::test {
namespace {

using ::testing::HasSubstr;

// Rank 0 does not come to a sum. It stays until the others have said so, for it has the store.
TEST(DISABLED_Rank, LearnsWhoIsMissing) {
  const comm::Communicator world = process_world();
  EXPECT_EQ(world.backend_name(), is_gpu_rank() ? "nccl" : "gloo");
  const at::Tensor x = at::ones({4096}, at::kFloat);
  world.all_reduce(x).wait();
  world.barrier().wait();
  const auto said = [](int rank) { return std::filesystem::path(fmt::format("said-{}", rank)); };
  if (world.rank() == 0) {
    for (int rank = 1; rank < world.size(); ++rank)
      while (!exists(said(rank)) || !world.is_aborted())
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    return;
  }
  world.set_timeout(2);
  try {
    world.all_reduce(x).wait();
    ADD_FAILURE() << "a sum without rank 0";
  } catch (const EnvError& error) {
    EXPECT_THAT(error.what(), HasSubstr("all_reduce sum fp32 x 4,096"));
    EXPECT_THAT(error.what(), HasSubstr("no arrival of rank 0"));
  }
  std::ofstream{said(world.rank())};
}

void run(int ranks, const std::string& tests, const std::map<std::string, std::string>& variables) {
  SCOPED_TRACE(fmt::format("{} ranks: {}", ranks, tests));
  const ProcessOptions options{.program = "/proc/self/exe", .env = variables, .deadline_s = 400};
  const ProcessResults results = run_processes(
      ranks, {"--gtest_also_run_disabled_tests", "--gtest_brief=1", "--gtest_filter=" + tests},
      options);
  EXPECT_TRUE(results.all_succeeded()) << results.text();
  for (const ProcessResult& rank : results.ranks) EXPECT_THAT(rank.out, HasSubstr("[  PASSED  ]"));
}

// Issue_DoesNotWait* is left out: its ranks meet at a latch of one process.
void run_suite(const std::map<std::string, std::string>& variables) {
  run(4, "DISABLED_Rank/Collectives.*:DISABLED_Rank/Order.WorksWaited*", variables);
  run(2,
      "DISABLED_Rank/Order.Communicators*:DISABLED_Rank/Order.Tensors*:"
      "DISABLED_Rank/Order.BothDirections*:DISABLED_Rank/Order.FlightRecorder*",
      variables);
  run(4, "DISABLED_Rank.LearnsWhoIsMissing", variables);
}

TEST(ProcessConformance, Gloo) { run_suite({}); }

TEST(GpuConformance, Nccl) {
  if (const auto why = missing_gpu()) GTEST_SKIP() << *why;
  run_suite(one_gpu_variables());
}

}  // namespace
}  // namespace capstan::test
