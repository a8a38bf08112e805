// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/launch/run_folder.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <stdlib.h>

#include <fstream>

#include "capstan/base/error.h"
#include "capstan/base/json.h"

namespace capstan::launch {
namespace {

using testing::AllOf;
using testing::HasSubstr;
namespace fs = std::filesystem;

class RunFolderTest : public testing::Test {
 protected:
  RunFolderTest() {
    std::string name = (fs::temp_directory_path() / "capstan-run-XXXXXX").native();
    folder_ = ::mkdtemp(name.data());
  }
  ~RunFolderTest() override { fs::remove_all(folder_); }
  void put(const Path& file) const {
    fs::create_directories((folder_ / file).parent_path());
    std::ofstream(folder_ / file) << "x";
  }
  [[nodiscard]] std::string refusal(int own_attempt = -1) const {
    try {
      check_unused(folder_, own_attempt);
    } catch (const ConfigError& error) {
      return error.what();
    }
    return "unused";
  }
  Path folder_;
};

TEST_F(RunFolderTest, LocksAndEmptyFolders_AreNoUse) {
  EXPECT_NO_THROW(check_unused(folder_ / "missing", -1));
  EXPECT_EQ(refusal(), "unused");
  put("lock");
  fs::create_directories(folder_ / "logs/attempt_0/0");
  fs::create_directories(folder_ / "checkpoints");
  EXPECT_EQ(refusal(), "unused");
}

TEST_F(RunFolderTest, AnyFileOfARun_IsNamed) {
  for (const char* file : {"metrics.jsonl", "recipe.yaml", "tensorboard/events.out.tfevents.1",
                           "checkpoints/step-00000003.partial/a/model.safetensors",
                           "logs/attempt_10/0/stdout.log", "notes.txt"}) {
    put(file);
    EXPECT_THAT(refusal(1),
                AllOf(HasSubstr("--resume none"), HasSubstr(Path(file).begin()->native() + " in ")))
        << file;
    fs::remove_all(folder_ / *Path(file).begin());
  }
  fs::create_symlink("/", folder_ / "checkpoints");
  EXPECT_THAT(refusal(), HasSubstr("checkpoints")) << "a link is not followed";
}

TEST_F(RunFolderTest, LogsOfThisVeryAttempt_DoNotCount) {
  put("logs/attempt_1/0/stdout.log");
  EXPECT_EQ(refusal(1), "unused");
  EXPECT_THAT(refusal(), HasSubstr("logs in "));
  put("logs/attempt_0/0/stdout.log");
  EXPECT_THAT(refusal(1), HasSubstr("logs in "));
}

TEST_F(RunFolderTest, LastCommittedStep_IsTheHighestNumberWithAManifest) {
  EXPECT_EQ(last_committed_step(folder_), std::nullopt);
  for (const char* name : {"step-00000009", "step-00000010", "step-100000000"})
    put(Path("checkpoints") / name / "manifest.json");
  EXPECT_EQ(last_committed_step(folder_), 100000000);
  put("checkpoints/step-200000000/model.safetensors");
  put("checkpoints/step-00000300.abandoned-1/manifest.json");
  put("checkpoints/step-99999999999999999999/manifest.json");
  EXPECT_EQ(last_committed_step(folder_), 100000000);
}

TEST_F(RunFolderTest, ExitReport_HasEveryField) {
  put("checkpoints/step-00000012/manifest.json");
  write_exit_report(folder_, {.code = 91,
                              .cause = cause_of_error(""),
                              .rank = 1,
                              .signal = SIGKILL,
                              .message = "was ended \xff"});
  json::Json report = json::parse(read_file(folder_ / "exit.json"), "exit.json");
  EXPECT_EQ(report["code"], 91);
  EXPECT_EQ(report["class"], "worker");
  EXPECT_TRUE(report["error"].is_null());
  EXPECT_EQ(report["rank"], 1);
  EXPECT_EQ(report["signal"], "SIGKILL");
  EXPECT_TRUE(report["worker_exit_code"].is_null());
  EXPECT_EQ(report["last_committed_step"], 12);
  EXPECT_TRUE(report["host"].is_string() && report["time"].is_string());
  write_exit_report(folder_, {.code = 93,
                              .cause = cause_of_error("DivergenceError"),
                              .error = "DivergenceError",
                              .worker_exit_code = 93});
  report = json::parse(read_file(folder_ / "exit.json"), "exit.json");
  EXPECT_EQ(report["class"], "numerics");
  EXPECT_EQ(report["error"], "DivergenceError");
  EXPECT_EQ(report["worker_exit_code"], 93);
  EXPECT_TRUE(report["signal"].is_null());
}

TEST_F(RunFolderTest, ExitReport_NeedsADirectoryAndNeverThrows) {
  write_exit_report(folder_ / "missing", {});
  EXPECT_FALSE(fs::exists(folder_ / "missing"));
  fs::create_directories(folder_ / "exit.json");  // cannot be replaced by a file
  write_exit_report(folder_, {});
}

}  // namespace
}  // namespace capstan::launch
