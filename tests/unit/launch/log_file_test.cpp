// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "launch/log_file_internal.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <random>

#include "capstan/base/file.h"
#include "launch/cause_internal.h"

namespace capstan::launch::internal {
namespace {

namespace fs = std::filesystem;

class LogFileTest : public testing::Test {
 protected:
  LogFileTest() {
    std::string name = (fs::temp_directory_path() / "capstan-log-XXXXXX").native();
    folder_ = ::mkdtemp(name.data());
  }
  ~LogFileTest() override { fs::remove_all(folder_); }
  [[nodiscard]] std::string content(const char* name) const { return read_file(folder_ / name); }
  [[nodiscard]] Path path() const { return folder_ / "stdout.log"; }
  Path folder_;
};

std::string line(int number) { return fmt::format("line {:06}\n", number); }  // 12 bytes

TEST_F(LogFileTest, ShortOutput_IsOneFile) {
  LogFile log(path(), 4096);
  for (int i = 0; i < 100; ++i) log.write(line(i));
  EXPECT_EQ(log_parts(path()), std::vector<Path>{path()});
  EXPECT_EQ(content("stdout.log").size(), 1200U);
}

TEST_F(LogFileTest, LongOutput_KeepsHeadAndNewestInWholeLines) {
  constexpr int kLines = 100000;
  constexpr int64_t kLimit = 8192;
  LogFile log(path(), kLimit);
  std::string pending;
  std::mt19937 pick(3);
  for (int i = 0; i < kLines; ++i) {  // in chunks that end anywhere
    pending += line(i);
    const size_t count = pick() % (pending.size() + 1);
    log.write(std::string_view(pending).substr(0, count));
    pending.erase(0, count);
  }
  log.write(pending);
  const std::string head = content("stdout.log"), newest = content("stdout.newest.log"),
                    older = content("stdout.newest.log.1");
  EXPECT_EQ(log_parts(path()).size(), 3U);
  EXPECT_EQ(head.substr(0, 12), line(0));
  EXPECT_NEAR(static_cast<double>(head.size()), kLimit / 2, 12);
  EXPECT_NEAR(static_cast<double>(older.size()), kLimit / 4, 12);
  const std::string end = older + newest;
  EXPECT_EQ(end.size() % 12, 0U);
  EXPECT_EQ(head.size() % 12, 0U);
  const int lines = static_cast<int>(end.size() / 12);
  for (int i = 0; i < lines; ++i)
    ASSERT_EQ(end.substr(static_cast<size_t>(i) * 12, 12), line(kLines - lines + i));
}

TEST_F(LogFileTest, OneEndlessLine_StaysBelowTheLimit) {
  LogFile log(path(), 8192);
  const std::string block(5000, 'x');
  for (int i = 0; i < 200; ++i) log.write(block);
  int64_t bytes = 0;
  for (const Path& part : log_parts(path())) bytes += static_cast<int64_t>(fs::file_size(part));
  EXPECT_LE(bytes, 2 * 8192);
  EXPECT_GT(bytes, 8192 / 2);
}

TEST_F(LogFileTest, AnotherStart_GoesOnWhereTheLastEnded) {
  { LogFile(path(), 4096).write(std::string(200, '\n')); }
  { LogFile(path(), 4096).write(line(1)); }
  EXPECT_THAT(content("stdout.log"), testing::EndsWith(line(1)));
  { LogFile(path(), 4096).write(std::string(1900, '\n')); }
  for (int i = 0; i < 300; ++i) LogFile(path(), 4096).write(line(i));
  EXPECT_THAT(content("stdout.newest.log"), testing::EndsWith(line(299)));
  EXPECT_EQ(fs::file_size(path()), 2048U) << "the head stays as it was";
}

TEST_F(LogFileTest, AFullDisk_LosesOutputAndGoesOn) {
  LogFile log("/dev/full", 4096);
  for (int i = 0; i < 1000; ++i) log.write(line(i));
  SUCCEED() << "nothing was thrown, nothing written beside /dev/full";
  EXPECT_FALSE(fs::exists("/dev/full.newest"));
}

TEST_F(LogFileTest, LastLines_ReachBackOverTheParts) {
  {
    LogFile log(folder_ / "stderr.log", 4096);
    for (int i = 0; i < 1000; ++i) log.write(line(i));
  }
  const std::vector<std::string> lines = last_lines(folder_, 120);
  ASSERT_EQ(lines.size(), 120U);
  for (int i = 0; i < 120; ++i)
    EXPECT_EQ(lines[static_cast<size_t>(i)] + "\n", line(1000 - 120 + i));
}

}  // namespace
}  // namespace capstan::launch::internal
