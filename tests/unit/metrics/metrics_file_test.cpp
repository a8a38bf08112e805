// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/metrics/metrics_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <csignal>
#include <fstream>
#include <limits>
#include <sstream>
#include <thread>

#include "capstan/base/json.h"
#include "capstan/base/log.h"
#include "unit/metrics/temporary_folder.h"

namespace capstan::metrics {
namespace {

using json::Json;
using testing::HasSubstr;

std::vector<std::string> lines_of(const Path& path) {
  std::vector<std::string> lines;
  std::istringstream text(read_file(path));
  for (std::string line; std::getline(text, line);) lines.push_back(line);
  return lines;
}

TEST(Records, Lines_AreAsDocumented) {
  EXPECT_EQ(
      to_json(StartRecord{.time = "2026-01-31T12:30:01.123Z",
                          .run = "quickstart",
                          .version = "0.1.0",
                          .world_size = 2,
                          .device = "cpu",
                          .recipe_xxh3 = "ab",
                          .parameters = 5898240,
                          .flops_per_token = 35389440,
                          .predicted_peak_bytes = 1000}),
      R"({"kind":"start","schema":1,"time":"2026-01-31T12:30:01.123Z","attempt":0,)"
      R"("run":"quickstart","version":"0.1.0","world_size":2,"device":"cpu","recipe_xxh3":"ab",)"
      R"("parameters":5898240,"flops_per_token":35389440,"flops_convention":"causal",)"
      R"("predicted_peak_bytes":1000,"resumed_step":0})");
  EXPECT_EQ(
      to_json(StepRecord{.step = 120,
                         .tokens = 245760,
                         .samples = 960,
                         .loss = 5.0493,
                         .grad_norm = 1.204,
                         .lr = 0.00287,
                         .step_ms = 271.1,
                         .data_wait_ms = 0.2,
                         .tokens_per_s = 7557,
                         .mfu = 0.412,
                         .peak_bytes = 1,
                         .rss_bytes = 2,
                         .target_tokens = 2048,
                         .elapsed_s = 33.1}),
      R"({"kind":"step","attempt":0,"step":120,"tokens":245760,"samples":960,"loss":5.0493,)"
      R"("grad_norm":1.204,"lr":0.00287,"step_ms":271.1,"data_wait_ms":0.2,"tokens_per_s":7557,)"
      R"("mfu":0.412,"peak_bytes":1,"rss_bytes":2,"target_tokens":2048,"skipped":null,)"
      R"("loss_scale":null,"elapsed_s":33.1})");
  EXPECT_EQ(
      to_json(EvalRecord{.step = 300,
                         .loss = 5.31,
                         .perplexity = 202.4,
                         .bits_per_byte = 2.33,
                         .target_tokens = 16384}),
      R"({"kind":"eval","attempt":0,"step":300,"set":"heldout","loss":5.31,"perplexity":202.4,)"
      R"("bits_per_byte":2.33,"target_tokens":16384})");
  EXPECT_EQ(to_json(CheckpointRecord{.step = 300,
                                     .path = "checkpoints/step-00000300",
                                     .bytes = 7,
                                     .stall_ms = 12,
                                     .commit_ms = 140}),
            R"({"kind":"checkpoint","attempt":0,"step":300,"path":"checkpoints/step-00000300",)"
            R"("bytes":7,"stall_ms":12,"commit_ms":140,"ok":true,"error":null})");
  EXPECT_EQ(to_json(EndRecord{.time = "T", .step = 900, .cause = "done"}),
            R"({"kind":"end","time":"T","attempt":0,"step":900,"exit":0,"cause":"done"})");
}

TEST(Records, Numbers_RestoreAndNonFiniteIsNull) {
  const double loss = 5.049312345678901;
  const Json line = json::parse(to_json(StepRecord{.loss = loss,
                                                   .grad_norm = std::nan(""),
                                                   .lr = std::numeric_limits<double>::infinity(),
                                                   .mfu = std::nan(""),
                                                   .skipped = "nonfinite gradient",
                                                   .loss_scale = 65536}),
                                "line");
  EXPECT_EQ(line["loss"].get<double>(), loss);
  EXPECT_TRUE(line["grad_norm"].is_null());
  EXPECT_TRUE(line["lr"].is_null());
  EXPECT_TRUE(line["mfu"].is_null());
  EXPECT_EQ(line["skipped"], "nonfinite gradient");
  EXPECT_EQ(line["loss_scale"], 65536);
}

TEST(Records, Experts_AreThereForModelsThatHaveThem) {
  EXPECT_FALSE(json::parse(to_json(StepRecord{}), "line").contains("expert_load"));
  const Json line = json::parse(
      to_json(StepRecord{.experts = ExpertRecord{.load = 1.5, .dropped = 0.25, .z_loss = 3}}),
      "line");
  EXPECT_EQ(line["expert_load"], 1.5);
  EXPECT_EQ(line["expert_dropped"], 0.25);
  EXPECT_EQ(line["expert_auxiliary_loss"], 0.0);
  EXPECT_EQ(line["expert_z_loss"], 3.0);
}

TEST(Records, Text_IsEscaped) {
  const std::string line =
      to_json(EventRecord{.level = "warning", .module = "data", .text = "a\"b\n\x01\xff end"});
  EXPECT_EQ(line.find('\n'), std::string::npos);
  const Json read = json::parse(line, "line");
  EXPECT_EQ(read["text"], "a\"b\n\x01\xef\xbf\xbd end") << "broken bytes become U+FFFD";
}

TEST(Records, EmptyTime_IsNow) {
  EXPECT_THAT(to_json(EndRecord{}), testing::ContainsRegex("\"time\":\"2[0-9]{3}-[0-9T:.-]*Z\""));
}

using MetricsFileTest = TemporaryFolder;

TEST_F(MetricsFileTest, Attempts_AppendAndCount) {
  const Path path = folder_ / "run" / "metrics.jsonl";
  EXPECT_EQ(next_attempt(path), 0);
  for (int attempt = 0; attempt < 3; ++attempt) {
    MetricsFile file(path);
    EXPECT_EQ(file.attempt(), attempt);
    file.write(StartRecord{.attempt = 77});
    file.write(StepRecord{.step = attempt * 10});
  }
  const std::vector<std::string> lines = lines_of(path);
  ASSERT_EQ(lines.size(), 6u);
  EXPECT_EQ(json::parse(lines[5], "line")["attempt"], 2);
  EXPECT_EQ(json::parse(lines[0], "line")["attempt"], 0) << "not the caller's 77";
}

TEST_F(MetricsFileTest, TornLine_IsCutAndTheRestKept) {
  const Path path = folder_ / "metrics.jsonl";
  {
    MetricsFile file(path);
    file.write(StartRecord{});
    file.write(StepRecord{.step = 1});
  }
  const std::string whole = read_file(path);
  for (const std::string& torn :
       {std::string(R"({"kind":"st)"), std::string(R"({"kind":"start","attempt":9})"),
        std::string(200000, 'x')}) {
    std::ofstream(path, std::ios::app) << torn;
    {
      MetricsFile file(path);
      EXPECT_EQ(file.attempt(), 1) << "the torn line does not count";
    }
    EXPECT_EQ(read_file(path), whole);
  }
  std::ofstream(path, std::ios::trunc) << "no line break at all";
  EXPECT_EQ(MetricsFile(path).attempt(), 0);
  EXPECT_EQ(read_file(path), "");
}

TEST_F(MetricsFileTest, NextAttempt_SurvivesDamage) {
  const Path path = folder_ / "metrics.jsonl";
  std::ofstream(path)
      << "garbage\n{\"kind\":\"start\",\"attempt\":4}\n{\"kind\":\"start\",\"attempt\":-3}\n"
      << "{\"kind\":\"start\",\"attempt\":\"x\"}\n{\"kind\":\"step\",\"attempt\":6}\n";
  EXPECT_EQ(next_attempt(path), 7) << "the last line's attempt lost its start line";
}

TEST_F(MetricsFileTest, ReadSteps_HigherAttemptWins) {
  const Path path = folder_ / "metrics.jsonl";
  {
    MetricsFile file(path);
    file.write(StepRecord{.step = 10, .loss = 1});
    file.write(StepRecord{.step = 20, .loss = 2, .skipped = "nonfinite gradient"});
  }
  std::ofstream(path, std::ios::app) << "{\"kind\":\"later\",\"step\":10}\nnot json\n";
  {
    MetricsFile file(path);
    file.write(EvalRecord{.step = 20, .loss = 9});
    file.write(StepRecord{.step = 20, .loss = 3.25, .mfu = 0.5});
  }
  const auto steps = read_steps(path);
  ASSERT_EQ(steps.size(), 2u);
  EXPECT_EQ(steps.at(10).loss, 1);
  EXPECT_EQ(steps.at(20).loss, 3.25);
  EXPECT_EQ(steps.at(20).attempt, 1);
  EXPECT_EQ(steps.at(20).mfu, 0.5);
  EXPECT_EQ(steps.at(20).skipped, std::nullopt);
  EXPECT_TRUE(read_steps(folder_ / "none").empty());
}

// Warnings about this file, counted by the log's observer.
struct Warnings {
  std::vector<std::string> texts;
  static void add(void* context, log::Level, std::string_view, std::string_view text) {
    static_cast<Warnings*>(context)->texts.emplace_back(text);
  }
};

TEST_F(MetricsFileTest, FullDisk_WarnsOnceCountsAndLeavesWholeLines) {
  const Path path = folder_ / "metrics.jsonl";
  const pid_t child = ::fork();
  if (child == 0) {
    std::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit = {1090, 1090};  // four lines of a step and one of an end
    ::setrlimit(RLIMIT_FSIZE, &limit);
    Warnings warnings;
    log::set_level(log::Level::kOff);
    log::set_observer(&Warnings::add, &warnings);
    MetricsFile file(path);
    for (int i = 0; i < 10; ++i) file.write(StepRecord{.step = i});
    const bool once =
        warnings.texts.size() == 1 && warnings.texts[0].find("File too large") != std::string::npos;
    // A line that still fits is written: nothing was torn.
    const int64_t dropped = file.dropped();
    file.write(EndRecord{.time = "T"});
    log::set_observer(nullptr, nullptr);
    ::_exit(once && dropped == 6 && file.dropped() == 6 ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  const std::string text = read_file(path);
  EXPECT_EQ(text.back(), '\n');
  for (const std::string& line : lines_of(path)) EXPECT_NO_THROW((void)json::parse(line, "line"));
  EXPECT_THAT(lines_of(path).back(), HasSubstr("\"kind\":\"end\""));
}

TEST_F(MetricsFileTest, UnopenableFile_DropsEveryLine) {
  std::ofstream(folder_ / "file") << "x";
  Warnings warnings;
  log::set_level(log::Level::kOff);
  log::set_observer(&Warnings::add, &warnings);
  {
    MetricsFile file(folder_ / "file" / "metrics.jsonl");
    file.write(StepRecord{});
    file.write(StepRecord{});
    file.sync();
    EXPECT_EQ(file.dropped(), 2);
    EXPECT_EQ(warnings.texts.size(), 1u);
  }
  log::set_observer(nullptr, nullptr);
  log::set_level(log::Level::kInfo);
  ASSERT_EQ(warnings.texts.size(), 2u) << "the sum at the end";
  EXPECT_THAT(warnings.texts[1], HasSubstr("2 records of"));
}

TEST_F(MetricsFileTest, Threads_WriteWholeLines) {
  const Path path = folder_ / "metrics.jsonl";
  {
    MetricsFile file(path);
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t) {
      threads.emplace_back([&file, t] {
        for (int i = 0; i < 200; ++i) file.write(StepRecord{.step = t * 1000 + i});
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
  EXPECT_EQ(read_steps(path).size(), 800u);
}

}  // namespace
}  // namespace capstan::metrics
