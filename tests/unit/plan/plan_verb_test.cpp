// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// capstan plan as a user calls it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "../../../tools/capstan/verbs.h"
#include "capstan/base/error.h"
#include "capstan/base/gpu.h"
#include "capstan/recipe/load.h"
#include "recipes.h"

namespace capstan::cli {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;
using Json = nlohmann::json;

class PlanVerb : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ =
        std::filesystem::temp_directory_path() / ("capstan plan " + std::to_string(::getpid()));
    std::filesystem::create_directories(folder_ / "tok");
    std::ofstream(folder_ / "tiny.yaml") << plan::testing::kRecipe;
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  // What the verb prints; `data.tokenizer` points into the folder of the test.
  std::string run(std::vector<std::string> arguments) {
    CLI::App app("capstan");
    add_plan(app);
    arguments.insert(arguments.begin(), {"plan", (folder_ / "tiny.yaml").string(), "--set",
                                         "data.tokenizer='" + (folder_ / "tok").string() + "'"});
    std::reverse(arguments.begin(), arguments.end());
    ::testing::internal::CaptureStdout();
    try {
      app.parse(arguments);
    } catch (...) {
      (void)::testing::internal::GetCapturedStdout();
      throw;
    }
    return ::testing::internal::GetCapturedStdout();
  }
  void write_tokenizer(const std::string& text) {
    std::ofstream(folder_ / "tok/tokenizer.json") << text;
  }

  std::filesystem::path folder_;
};

TEST_F(PlanVerb, PrintsAPageWithoutTheDataExisting) {
  const std::string page = run({"--set", "model.vocab_size=8192", "--world", "2"});
  EXPECT_THAT(page, HasSubstr("2 ranks on cpu"));
  EXPECT_THAT(page, HasSubstr("5,048,576"));
}

TEST_F(PlanVerb, ReadsTheSizeOfTheTokenizer) {
  write_tokenizer(
      R"({"model":{"vocab":{"a":0,"b":1,"<s>":2}},"added_tokens":[{"id":2,"content":"<s>"},{"id":3,"content":"</s>"}]})");
  EXPECT_EQ(Json::parse(run({"--json"}))["model"]["vocab_size"], 4);
  write_tokenizer(
      R"({"model":{"vocab":{"a":0,"b":9}}})");  // ids with gaps need rows up to the largest
  EXPECT_EQ(Json::parse(run({"--json"}))["model"]["vocab_size"], 10);
}

TEST_F(PlanVerb, MissingTokenizerNamesBothWays) {
  try {
    (void)run({});
    FAIL();
  } catch (const ConfigError& e) {
    EXPECT_THAT(e.what(), HasSubstr("tokenizer.json"));
    EXPECT_THAT(e.what(), HasSubstr("capstan data tokenizer train"));
    EXPECT_THAT(e.what(), HasSubstr("--set model.vocab_size=8192"));
  }
}

TEST_F(PlanVerb, DamagedTokenizerIsRefused) {
  for (const char* text : {"{", "[]", R"({"model":{}})", R"({"model":{"vocab":[1]}})",
                           R"({"model":{"vocab":{"a":-1}}})", R"({"model":{"vocab":{"a":"x"}}})",
                           R"({"model":{"vocab":{"a":0}},"added_tokens":[{"id":1}]})"}) {
    write_tokenizer(text);
    EXPECT_THROW((void)run({}), DataError) << text;
  }
}

TEST_F(PlanVerb, WhatCannotBeHonouredIsRefused) {
  EXPECT_THROW((void)run({"--set", "model.vocab_size=100", "--world", "3"}), recipe::RecipeError);
  EXPECT_THROW((void)run({"--world", "0"}), CLI::ParseError);
  EXPECT_THROW(
      (void)run({"--set", "model.vocab_size=100", "--world", "4", "--ranks-per-host", "3"}),
      ConfigError);
  const std::vector<std::string> small = {"--set", "model.vocab_size=100", "--world",
                                          "4",     "--host-memory",        "0.01"};
  EXPECT_THROW((void)run(small), recipe::RecipeError);  // memory of a host that is not this one
  try {
    (void)run({"--hardware", "h100.yaml"});
    FAIL();
  } catch (const ConfigError& e) {
    EXPECT_THAT(e.what(), HasSubstr("--hardware"));
    EXPECT_THAT(e.what(), HasSubstr("not in this build"));
  }
}

TEST_F(PlanVerb, GpusNeedNotBeHere) {
  const auto on_gpus = [&](std::vector<std::string> more) {
    more.insert(more.begin(), {"--set", "model.vocab_size=100", "--world", "2"});
    return run(more);
  };
  if (probe_gpus().gpus.empty()) {
    EXPECT_THAT(on_gpus({"--set", "run.device=cuda"}), HasSubstr("--gpu-memory GIB"));
  }
  const std::string large = on_gpus({"--gpu-memory", "80"});
  EXPECT_THAT(large, HasSubstr("on the GPU of rank 0"));
  EXPECT_THAT(large, Not(HasSubstr("--gpu-memory")));
  try {
    (void)on_gpus({"--gpu-memory", "0.5"});
    FAIL();
  } catch (const recipe::RecipeError& e) {
    EXPECT_THAT(e.what(), HasSubstr("at most 512 MiB on the GPU of a rank"));
  }
  EXPECT_THROW((void)on_gpus({"--gpu-memory", "80", "--set", "run.device=cpu"}), ConfigError);
}

TEST_F(PlanVerb, DrawsTheScheduleAsTextOrFile) {
  const std::vector<std::string> flags = {"--set", "model.vocab_size=100", "--draw"};
  const auto with = [&](std::vector<std::string> more) {
    more.insert(more.begin(), flags.begin(), flags.end());
    return more;
  };
  EXPECT_THAT(run(with({})), HasSubstr("  rank 0 | F0 B0 -- F1 B1 --\n"));
  const std::string file = (folder_ / "step.svg").string();
  EXPECT_THAT(run(with({file})), HasSubstr(file));
  std::ifstream stream(file);
  const std::string svg((std::istreambuf_iterator<char>(stream)), {});
  EXPECT_EQ(svg.rfind("<svg ", 0), 0u);
  EXPECT_THAT(svg, HasSubstr("2 micro-batches"));
  EXPECT_THROW((void)run(with({"--json"})), CLI::ParseError);
  try {
    (void)run(with({"step.png"}));
    FAIL();
  } catch (const ConfigError& e) {
    EXPECT_THAT(e.what(), HasSubstr("ends in .svg"));
  }
}

TEST_F(PlanVerb, DrawsEveryScheduleOfARecipe) {
  const auto draw = [&](const char* schedule, const char* chunks) {
    return run({"--set", "model.vocab_size=100", "--world", "2", "--set",
                "parallel.pipeline.size=2", "--set",
                std::string("parallel.pipeline.schedule=") + schedule, "--set",
                std::string("parallel.pipeline.chunks=") + chunks, "--draw"});
  };
  EXPECT_THAT(draw("gpipe", "1"), HasSubstr("  rank 1 | .. F0 F1 B0 -- B1 -- .. ..\n"));
  EXPECT_THAT(draw("1f1b", "1"), HasSubstr("  rank 1 | .. F0 B0 -- F1 B1 -- .. ..\n"));
  EXPECT_THAT(draw("interleaved", "2"), HasSubstr("  rank 1 | ..   F0.0 F1.0 F0.1 B0.1 --"));
  EXPECT_THAT(draw("zero_bubble", "1"), HasSubstr("  rank 1 | .. F0 I0 F1 I1 W0 W1\n"));
  EXPECT_THAT(draw("zero_bubble", "2"), HasSubstr("  rank 1 | ..   F0.0 F0.1 F1.0 F1.1 I0.1"));
}

TEST_F(PlanVerb, PlansTheQuickstart) {
  CLI::App app("capstan");
  add_plan(app);
  std::vector<std::string> arguments = {"model.vocab_size=8192",
                                        "--set",
                                        "2",
                                        "--world",
                                        CAPSTAN_SOURCE_DIR "/configs/quickstart.yaml",
                                        "plan"};
  ::testing::internal::CaptureStdout();
  app.parse(arguments);
  EXPECT_THAT(::testing::internal::GetCapturedStdout(), HasSubstr("quickstart"));
}

}  // namespace
}  // namespace capstan::cli
