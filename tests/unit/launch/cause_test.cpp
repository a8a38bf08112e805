// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <stdlib.h>

#include <fstream>

#include "capstan/launch/local.h"
#include "launch/cause_internal.h"

namespace capstan::launch {
namespace {

using internal::find_cause;
using internal::RankRecord;
using testing::ElementsAre;
using testing::HasSubstr;
namespace fs = std::filesystem;

class Cause : public testing::Test {
 protected:
  Cause() {
    std::string name = (fs::temp_directory_path() / "capstan-cause-XXXXXX").native();
    folder_ = ::mkdtemp(name.data());
    for (int rank = 0; rank < 3; ++rank) {
      records_.push_back({.rank = rank, .log_directory = folder_ / std::to_string(rank)});
      fs::create_directory(records_.back().log_directory);
    }
  }
  ~Cause() override { fs::remove_all(folder_); }

  RankRecord& ended(int rank, int exit_code, int signal, int64_t time_ns,
                    int64_t signalled_ns = 0) {
    RankRecord& record = records_[static_cast<size_t>(rank)];
    record.outcome = {exit_code, signal, time_ns};
    record.signalled_ns = signalled_ns;
    record.last_signal = signalled_ns > 0 ? SIGTERM : 0;
    return record;
  }
  void error_file(int rank, int64_t time_ns, bool cascade) {
    std::ofstream(folder_ / std::to_string(rank) / "error.json")
        << R"({"rank":)" << rank << R"(,"class":"EnvError","message":"m)" << rank
        << R"(","exit_code":91,"monotonic_ns":)" << time_ns << R"(,"cascade":)"
        << (cascade ? "true" : "false") << "}";
  }
  int cause() { return find_cause(records_).value_or(RankFailure{.rank = -1}).rank; }

  Path folder_;
  std::vector<RankRecord> records_;
};

TEST_F(Cause, AllClean_IsNone) { EXPECT_EQ(cause(), -1); }

TEST_F(Cause, EarliestOwnFailure_Wins) {
  ended(0, 91, 0, 300, 200);
  ended(1, 3, 0, 150);
  ended(2, 0, SIGSEGV, 100);
  EXPECT_EQ(cause(), 2);
  EXPECT_THAT(find_cause(records_)->reason, HasSubstr("signal 11"));
}

TEST_F(Cause, RanksWeStopped_AreNeverTheCause) {
  ended(0, 0, SIGTERM, 300, 200);
  ended(1, 3, 0, 199);
  ended(2, 91, 0, 250, 200);
  EXPECT_EQ(cause(), 1);
}

TEST_F(Cause, LostConnections_StandBehindACrash) {
  ended(0, 91, 0, 100);
  error_file(0, 90, true);
  ended(1, 0, SIGKILL, 110);
  EXPECT_EQ(cause(), 1);
  EXPECT_THAT(find_cause(records_)->reason, HasSubstr("lack of memory"));
}

TEST_F(Cause, OnlyLostConnections_GiveTheFirst) {
  ended(0, 91, 0, 100);
  error_file(0, 95, true);
  ended(1, 91, 0, 120);
  error_file(1, 90, true);
  EXPECT_EQ(cause(), 1) << "by the time in the error file";
  EXPECT_EQ(find_cause(records_)->message, "m1");
  EXPECT_EQ(find_cause(records_)->class_name, "EnvError");
}

TEST_F(Cause, ErrorWrittenBeforeOurSignal_Counts) {
  ended(0, 91, 0, 210);
  error_file(0, 205, true);
  ended(1, 94, 0, 300, 220);
  error_file(1, 200, false);
  EXPECT_EQ(cause(), 1) << "it was slow to end, but failed before we told it to stop";
}

TEST_F(Cause, EarlyExit_CountsUnlessDeclared) {
  ended(0, 0, 0, 100).left_early = true;
  ended(1, 0, SIGTERM, 300, 200);
  EXPECT_EQ(cause(), 0);
  EXPECT_EQ(find_cause(records_)->reason, "exited with code 0 before the run had ended");
  records_[0].declared_done = true;
  EXPECT_EQ(cause(), -1);
}

TEST_F(Cause, StoppedFromOutside_ReportsFailedSavesAndKills) {
  ended(0, 90, 0, 300, 200);
  ended(1, 0, SIGTERM, 300, 200);
  EXPECT_EQ(cause(), -1) << "preempted, or ended by the signal itself";
  ended(2, 91, 0, 310, 200);
  EXPECT_EQ(cause(), 2);
  ended(2, 0, SIGKILL, 310, 200).last_signal = SIGKILL;
  EXPECT_EQ(cause(), -1) << "a hard stop asked for it";
  records_[2].killed = true;
  EXPECT_EQ(cause(), 2);
  EXPECT_THAT(find_cause(records_)->reason, HasSubstr("did not stop within the grace"));
}

TEST_F(Cause, LastLines_AreTwentyAndPrintable) {
  const Path folder = folder_ / "0";
  std::ofstream(folder / "stdout.log") << "only output\n";
  std::ofstream(folder / "stderr.log") << "\n";
  EXPECT_THAT(internal::last_lines(folder, 20), ElementsAre("only output"));
  std::ofstream err(folder / "stderr.log");
  for (int i = 0; i < 30; ++i) err << "line " << i << "\n";
  err << "it's \x1b[31m a \\ \xff" << std::string(5000, 'x');
  err.close();
  const auto lines = internal::last_lines(folder, 20);
  ASSERT_EQ(lines.size(), 20u);
  EXPECT_EQ(lines[0], "line 11");
  EXPECT_THAT(lines[19], testing::StartsWith("it's \\x1b[31m a \\ \\xffxxx"));
  EXPECT_LT(lines[19].size(), 1100u);
}

TEST_F(Cause, LastLines_OfAHugeFileComeFromItsEnd) {
  std::ofstream err(folder_ / "0" / "stderr.log");
  err << std::string(1 << 20, 'y') << "\nlast\n\n";
  err.close();
  const auto lines = internal::last_lines(folder_ / "0", 1);
  EXPECT_THAT(lines, ElementsAre("last"));
}

TEST_F(Cause, Attempts_GetTheNextFolder) {
  const Path logs = folder_ / "logs";
  EXPECT_EQ(make_attempt_directory(logs), logs / "attempt_0");
  fs::create_directory(logs / "attempt_12");
  fs::create_directory(logs / "attempt_x");
  EXPECT_EQ(make_attempt_directory(logs), logs / "attempt_13");
}

TEST(Describe, PrefixesTheLastLines) {
  EXPECT_EQ(describe({}), "");
  const LaunchResult result = {.exit_code = 3,
                               .failure = RankFailure{.rank = 1,
                                                      .exit_code = 3,
                                                      .message = "no such file",
                                                      .reason = "exited with code 3",
                                                      .log_directory = "runs/x/logs/attempt_0/1",
                                                      .last_lines = {"a", "b"}}};
  EXPECT_EQ(describe(result),
            "rank 1 exited with code 3: no such file\nits last lines:\n[rank 1] a\n[rank 1] b\n"
            "its logs: runs/x/logs/attempt_0/1\n");
}

}  // namespace
}  // namespace capstan::launch
