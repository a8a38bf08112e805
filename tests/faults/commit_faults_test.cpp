// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Kills and starves a save at every file system call. After each: the newest committed step is
// whole, it is the old or the new one, and the next save works. Faults F19 and F20.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "capstan/base/file.h"
#include "capstan/checkpoint/load.h"
#include "support/temp_dir.h"

namespace capstan::checkpoint {
namespace {

struct Outcome {
  int exit_code = -1;  // 128 + signal when killed
};

Outcome run_driver(const Path& directory, int64_t step,
                   const std::vector<std::string>& environment) {
  const pid_t child = fork();
  if (child == 0) {
    for (const std::string& pair : environment) {
      const size_t equals = pair.find('=');
      setenv(pair.substr(0, equals).c_str(), pair.substr(equals + 1).c_str(), 1);
    }
    const int quiet = ::open("/dev/null", O_WRONLY | O_CLOEXEC);
    dup2(quiet, 2);
    execl(CAPSTAN_COMMIT_DRIVER, "commit_driver", directory.c_str(), std::to_string(step).c_str(),
          nullptr);
    _exit(127);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return {WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status)};
}

// The loader cuts LD_PRELOAD at spaces, which the path of the build tree may contain.
const std::string& preload() {
  static const test::TempDir folder;
  static const std::string setting = [] {
    const Path copy = folder.path() / "syscall_shim.so";
    std::filesystem::copy_file(CAPSTAN_SYSCALL_SHIM, copy);
    return "LD_PRELOAD=" + copy.string();
  }();
  return setting;
}

std::vector<std::string> with_fault(const std::string& kind, long at) {
  return {preload(), "CAPSTAN_FAULT=" + kind, "CAPSTAN_FAULT_AT=" + std::to_string(at)};
}

long count_calls(const Path& scratch) {
  const Path directory = scratch / "count";
  std::filesystem::create_directories(directory);
  const Path file = scratch / "calls";
  EXPECT_EQ(run_driver(directory, 100, {}).exit_code, 0);
  EXPECT_EQ(run_driver(directory, 200, {preload(), "CAPSTAN_FAULT_COUNT_FILE=" + file.string()})
                .exit_code,
            0);
  return std::stol(read_file(file));
}

void expect_good(const Path& directory, const std::string& where) {
  SCOPED_TRACE(where);
  SoloGroup solo;
  const auto found = find_newest_good_step(directory, Verify::kFull, solo);
  ASSERT_TRUE(found);
  EXPECT_TRUE(found->manifest.step == 100 || found->manifest.step == 200) << found->manifest.step;
  std::vector<float> values(1024);
  std::vector<StateBlob> blobs = {{"policy",
                                   "model",
                                   "w",
                                   {1024},
                                   {{0}, {1024}},
                                   DType::kFp32,
                                   std::as_writable_bytes(std::span(values)),
                                   true}};
  (void)load_state(*found, blobs);
  for (size_t i = 0; i < values.size(); ++i)
    ASSERT_EQ(values[i], static_cast<float>(i) + static_cast<float>(found->manifest.step));
}

void try_every_call(const std::string& kind, int expected_exit) {
  const test::TempDir scratch;
  const long calls = count_calls(scratch.path());
  ASSERT_GT(calls, 40);
  int committed = 0, stopped = 0;
  for (long k = 1; k <= calls; ++k) {
    const Path directory = scratch.path() / "run";
    std::filesystem::remove_all(directory);
    std::filesystem::create_directories(directory);
    ASSERT_EQ(run_driver(directory, 100, {}).exit_code, 0);
    const Outcome outcome = run_driver(directory, 200, with_fault(kind, k));
    EXPECT_TRUE(outcome.exit_code == 0 || outcome.exit_code == expected_exit)
        << kind << " at call " << k << ": exit " << outcome.exit_code;
    (outcome.exit_code == 0 ? committed : stopped) += 1;
    expect_good(directory, kind + " at call " + std::to_string(k));
    if (outcome.exit_code == 0) {
      EXPECT_TRUE(std::filesystem::exists(directory / "step-00000200" / "manifest.json"))
          << k;  // 0 means committed
    }
    ASSERT_EQ(run_driver(directory, 300, {}).exit_code, 0);  // the next interval saves again
    EXPECT_FALSE(std::filesystem::exists(directory / "step-00000200.partial"))
        << "leftovers stay after call " << k;
    std::filesystem::remove_all(directory / "step-00000300");
  }
  EXPECT_GT(stopped, 20);
  std::printf("%s: %ld calls, %d stopped the save, %d did not matter\n", kind.c_str(), calls,
              stopped, committed);
}

TEST(CommitFaults, KilledAtEveryCall_NeverLosesAStep) { try_every_call("kill", 128 + SIGKILL); }
TEST(CommitFaults, FullDiskFromEveryCall_FailsCleanly) { try_every_call("ENOSPC", 3); }
TEST(CommitFaults, IoErrorFromEveryCall_FailsCleanly) { try_every_call("EIO", 3); }

TEST(CommitFaults, ShortWrites_AreCompleted) {
  const test::TempDir scratch;
  const long calls = count_calls(scratch.path());
  for (long k = 1; k <= calls; ++k) {
    const Path directory = scratch.path() / "run";
    std::filesystem::remove_all(directory);
    std::filesystem::create_directories(directory);
    ASSERT_EQ(run_driver(directory, 200, with_fault("short", k)).exit_code, 0) << k;
    expect_good(directory, "short write at call " + std::to_string(k));
  }
}

}  // namespace
}  // namespace capstan::checkpoint
