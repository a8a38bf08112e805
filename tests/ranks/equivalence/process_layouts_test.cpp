// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Layouts over real processes against the run of one rank: on CPUs over gloo, and several processes
// on one GPU over NCCL. The ranks are this program again, running the DISABLED_ tests below.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <random>

#include "capstan/base/env.h"
#include "ranks/equivalence/references.h"
#include "ranks/equivalence/reshard.h"
#include "support/gpu_ranks.h"
#include "support/run_processes.h"

namespace capstan::test {
namespace {

constexpr double kTimeout = 120;

// One layout per line that has what it says on as many ranks as there are processes; the rest of it
// is drawn, the same on every rank.
std::vector<LayoutCase> layouts_of(int ranks) {
  const std::vector<Fixed> wanted = {
      {{"tp", "2"}, {"sp", "false"}, {"qwen", "3"}, {"frozen", "none"}},
      {{"dp_replicate", "2"}},
      {{"zero", "1"}, {"dp_shard", "2"}},
      {{"zero", "2"}, {"dp_shard", "2"}},
      {{"zero", "3"}, {"dp_shard", "2"}},
      {{"tp", "2"}, {"sp", "false"}},
      {{"tp", "2"}, {"sp", "true"}},
      {{"pp", "2"}, {"schedule", "1f1b"}},
      {{"pp", "2"}, {"schedule", "zero_bubble"}},
      {{"cp", "2"}, {"method", "ring"}},
      {{"cp", "2"}, {"method", "all_to_all"}},
      {{"ep", "2"}},
      {{"family", "gpt2"}, {"tp", "2"}}};
  std::mt19937_64 random(17 + static_cast<uint64_t>(ranks));
  std::vector<LayoutCase> layouts;
  const auto most = read_env_int("CAPSTAN_PROCESS_LAYOUTS", 1, 1000).value_or(1000);
  for (size_t i = 0; i < wanted.size() && static_cast<int64_t>(layouts.size()) < most; ++i)
    for (;;) {
      const auto drawn = draw_case(random, wanted[i], 1000, ranks);
      if (!drawn || drawn->ranks() != ranks) continue;
      layouts.push_back(*drawn);
      break;
    }
  return layouts;
}

// Whether it is so on every rank.
bool all_agree(const comm::Communicator& world, bool here) {
  const at::Tensor count = at::full({1}, here ? 1 : 0, at::kLong);
  world.all_reduce(count).wait();
  return count.item<int64_t>() == world.size();
}

TEST(DISABLED_Rank, ComparesLayouts) {
  comm::World world = meet_ranks(kTimeout);
  at::set_num_threads(1);
  References references;
  double worst = 0;
  int compared = 0;
  for (const LayoutCase& layout : layouts_of(world.size())) {
    const ReferenceRun& reference = references.of(layout);
    if (!all_agree(world.communicator(), !is_on_edge(reference))) continue;
    const Comparison result =
        compare_layout(layout, reference, kDeviceSteps,
                       [&](int, const auto& fn) { run_here(world.communicator(), fn); });
    EXPECT_EQ(complaint_of(layout, result), "") << "rank " << world.rank();
    if (!result.failure.empty()) return;  // the job is over
    worst = std::max(worst, result.error());
    ++compared;
  }
  EXPECT_GT(compared, 0);
  world.close();
  fmt::print("rank {}: {} layouts on {}, worst error {:.1e}\n", world.rank(), compared,
             is_gpu_rank() ? "a GPU" : "CPUs", worst);
}

// The second layout has as many ranks as the first.
TEST(DISABLED_Rank, Reshards) {
  comm::World world = meet_ranks(kTimeout);
  at::set_num_threads(1);
  const RankRunner runner = [&](int, const auto& fn) { run_here(world.communicator(), fn); };
  std::mt19937_64 random(31);
  References references;
  int pairs = 0;
  for (const LayoutCase& first : layouts_of(world.size())) {
    LayoutCase second = draw_like(random, first, world.size());
    while (second.ranks() != world.size()) second = draw_like(random, first, world.size());
    const ReferenceRun& reference = references.of(first);
    if (!all_agree(world.communicator(), !is_on_edge(reference))) continue;
    SCOPED_TRACE(fmt::format("{}  ->  {}", first.describe(), second.describe()));
    const std::string directory = fmt::format("pair-{}", pairs++);
    load_and_go_on(second, directory, train_and_save(first, directory, runner), reference, runner);
    if (!all_agree(world.communicator(), !HasFailure())) break;
  }
  EXPECT_GT(pairs, 0);
  world.close();
}

void expect_on_ranks(const std::string& test, int ranks,
                     const std::map<std::string, std::string>& variables) {
  ProcessOptions options{.program = "/proc/self/exe", .env = variables, .deadline_s = 400};
  const ProcessResults results = run_processes(
      ranks, {"--gtest_also_run_disabled_tests", "--gtest_filter=DISABLED_Rank." + test}, options);
  EXPECT_TRUE(results.all_succeeded()) << results.text();
  if (!results.ranks.empty()) std::fputs(results.ranks.front().out.c_str(), stdout);
}

const std::map<std::string, std::string> kSomeLayouts = {{"CAPSTAN_PROCESS_LAYOUTS", "6"}};

TEST(ProcessLayouts, TwoOverGloo) { expect_on_ranks("ComparesLayouts", 2, kSomeLayouts); }
TEST(ProcessLayouts, TwoReshardOverGloo) { expect_on_ranks("Reshards", 2, kSomeLayouts); }

class GpuLayouts : public ::testing::Test {
 protected:
  void SetUp() override {
    if (const auto why = missing_gpu()) GTEST_SKIP() << *why;
  }
};

TEST_F(GpuLayouts, TwoProcessesOnOneGpu) {
  expect_on_ranks("ComparesLayouts", 2, one_gpu_variables());
}
TEST_F(GpuLayouts, FourProcessesOnOneGpu) {
  expect_on_ranks("ComparesLayouts", 4, one_gpu_variables());
}
TEST_F(GpuLayouts, TwoReshardOnOneGpu) { expect_on_ranks("Reshards", 2, one_gpu_variables()); }

}  // namespace
}  // namespace capstan::test
