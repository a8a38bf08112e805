// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/metrics/recorder.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <sstream>

#include "capstan/base/json.h"
#include "capstan/base/log.h"
#include "unit/metrics/temporary_folder.h"

namespace capstan::metrics {
namespace {

using json::Json;
using testing::ElementsAre;
using testing::HasSubstr;

class RecorderTest : public TemporaryFolder {
 protected:
  RecorderTest() : console_(std::fopen((folder_ / "console").c_str(), "w+")) {}
  ~RecorderTest() override { std::fclose(console_); }
  RecorderOptions options() {
    return {.run_directory = folder_ / "run",
            .interval_steps = 10,
            .total_steps = 35,
            .console = console_,
            .clock_s = [this] { return now_; }};
  }
  std::vector<Json> lines() const {
    std::vector<Json> out;
    std::istringstream text(read_file(folder_ / "run" / "metrics.jsonl"));
    for (std::string line; std::getline(text, line);) out.push_back(json::parse(line, "line"));
    return out;
  }
  std::vector<int64_t> steps() const {
    std::vector<int64_t> out;
    for (const Json& line : lines()) {
      if (line["kind"] == "step") out.push_back(line["step"]);
    }
    return out;
  }
  std::FILE* console_;
  double now_ = 0;
};

TEST_F(RecorderTest, Steps_AreWrittenOnTheInterval) {
  {
    Recorder recorder(options());
    recorder.start({.run = "r"});
    for (int64_t step = 1; step <= 35; ++step, now_ += 1) {
      StepRecord record = {.step = step, .loss = 2, .step_ms = 500, .tokens_per_s = 100};
      if (step == 17) record.skipped = "nonfinite gradient";
      recorder.step(record, step == 35);
      if (step == 20) {
        EXPECT_DOUBLE_EQ(recorder.eta_s().value(), 7.5);
      }
    }
    recorder.evaluation({.step = 35, .loss = 1});
    recorder.checkpoint({.step = 35, .path = "checkpoints/step-00000035"});
    recorder.end({.step = 35, .cause = "done"});
    EXPECT_EQ(recorder.dropped(), 0);
  }
  EXPECT_THAT(steps(), ElementsAre(1, 10, 17, 20, 30, 35));
  EXPECT_EQ(lines().front()["kind"], "start");
  EXPECT_EQ(lines().back()["cause"], "done");
  const std::string console = read_file(folder_ / "console");
  // 10 s apart on the interval, plus first, skipped and last.
  EXPECT_THAT(console, HasSubstr("step      1/35 | loss 2.0000"));
  EXPECT_THAT(console, HasSubstr("step     17/35"));
  EXPECT_THAT(console, HasSubstr("| skipped: nonfinite gradient\n"));
  EXPECT_THAT(console, HasSubstr("step     30/35"));
  EXPECT_THAT(console, HasSubstr("step     35/35"));
  EXPECT_THAT(console, testing::Not(HasSubstr("step     10/35")));
  EXPECT_THAT(console, testing::Not(testing::AnyOf(HasSubstr("\r"), HasSubstr("\x1b"))));
  EXPECT_THAT(console, HasSubstr("ETA 2.5s"));
  EXPECT_TRUE(std::filesystem::exists(folder_ / "run" / "tensorboard"));
}

TEST_F(RecorderTest, LogWarnings_BecomeEventsOfTheStep) {
  log::set_level(log::Level::kOff);
  {
    Recorder recorder(options());
    recorder.observe_log();
    recorder.step({.step = 5}, false);
    log::warning("data", "corpus {} is short", "x");
    log::info("data", "not an event");
  }
  log::warning("data", "after the recorder");
  log::set_level(log::Level::kInfo);
  ASSERT_EQ(lines().size(), 2u);
  EXPECT_EQ(lines()[1].dump(), R"({"attempt":0,"kind":"event","level":"warning","module":"data",)"
                               R"("step":5,"text":"corpus x is short"})");
}

TEST_F(RecorderTest, LostDiskAndConsole_DoNotStopTheRun) {
  std::FILE* full = std::fopen("/dev/full", "w");
  ASSERT_NE(full, nullptr);
  RecorderOptions chosen = options();
  chosen.run_directory = "/dev/null/run";
  chosen.console = full;
  log::set_level(log::Level::kOff);
  {
    Recorder recorder(chosen);
    recorder.observe_log();  // the warning about the file becomes an event of the same file
    recorder.start({});
    for (int64_t step = 1; step <= 3; ++step) recorder.step({.step = step}, step == 3);
    recorder.end({});
    EXPECT_GE(recorder.dropped(), 4);
  }
  log::set_level(log::Level::kInfo);
  std::fclose(full);
}

TEST_F(RecorderTest, NoConsole_NoTensorboard) {
  RecorderOptions chosen = options();
  chosen.console = nullptr;
  chosen.tensorboard = false;
  Recorder recorder(chosen);
  recorder.step({.step = 1}, true);
  EXPECT_THAT(steps(), ElementsAre(1));
  EXPECT_FALSE(std::filesystem::exists(folder_ / "run" / "tensorboard"));
}

}  // namespace
}  // namespace capstan::metrics
