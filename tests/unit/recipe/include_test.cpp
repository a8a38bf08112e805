// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// include: order, merging, origins, refusals.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "recipe_text.h"

namespace capstan::recipe {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;
using testing::StartsWith;

class Include : public testing::Test {
 protected:
  void SetUp() override {
    folder_ =
        fs::temp_directory_path() / ("capstan-include-" + std::to_string(getpid()) + "-" +
                                     testing::UnitTest::GetInstance()->current_test_info()->name());
    fs::create_directories(folder_ / "parts");
  }
  void TearDown() override { fs::remove_all(folder_); }

  std::string write(const std::string& name, const std::string& text) const {
    std::ofstream(folder_ / name) << text;
    return (folder_ / name).string();
  }
  std::string at(const std::string& name) const { return (folder_ / name).string(); }
  // All problems, one a line.
  static std::string complaint(const std::string& path) {
    try {
      (void)load_recipe(path);
    } catch (const RecipeError& error) {
      return error.what();
    }
    return "";
  }

  fs::path folder_;
};

TEST_F(Include, MapsMerge_ListsAndScalarsAreReplaced_LaterFilesWin) {
  write("parts/base.yaml", kSmall);
  write("parts/second.yaml",
        "version: 1\noptimizer:\n  lr: 0.5\n  eps: 0.25\ndata:\n  train: [{path: a}, {path: b}]\n");
  const std::string top =
      write("top.yaml",
            "version: 1\ninclude: [parts/base.yaml, parts/second.yaml]\noptimizer: {eps: 0.125}\n");
  const Resolved resolved = load_recipe(top);
  EXPECT_EQ(resolved.recipe.optimizer.lr, 0.5);
  EXPECT_EQ(resolved.recipe.optimizer.eps, 0.125);
  EXPECT_EQ(resolved.recipe.data.train.size(), 2U);
  EXPECT_EQ(resolved.recipe.run.name, "small");
  EXPECT_EQ(resolved.origin_of("optimizer.lr").text(), at("parts/second.yaml") + ":3:7");
  EXPECT_EQ(resolved.origin_of("optimizer.eps").text(), top + ":3:18");
  EXPECT_EQ(resolved.origin_of("run.name").text(), at("parts/base.yaml") + ":2:13");
  EXPECT_THAT(resolved.files,
              testing::ElementsAre(at("parts/base.yaml"), at("parts/second.yaml"), top));
}

TEST_F(Include, PathsAreRelativeToTheirFile_AndAFileMayComeTwice) {
  write("base.yaml", kSmall);
  write("parts/one.yaml", "version: 1\ninclude: [../base.yaml]\nrun: {seed: 5}\n");
  write("parts/two.yaml", "version: 1\ninclude: [../base.yaml]\neval: {samples: 6}\n");
  const std::string top =
      write("top.yaml", "version: 1\ninclude: [parts/one.yaml, parts/two.yaml]\n");
  const Recipe recipe = load_recipe(top).recipe;
  EXPECT_EQ(recipe.run.seed, 5);
  EXPECT_EQ(recipe.eval.samples, 6);
}

TEST_F(Include, ProblemsNameTheFileTheyAreIn) {
  write("base.yaml", replaced(kSmall, "lr: 0.001", "lr: -1"));
  const std::string top = write("top.yaml", "version: 1\ninclude: [base.yaml]\nrun: {seeds: 5}\n");
  EXPECT_EQ(complaint(top), at("base.yaml") +
                                ":16:7: error: optimizer.lr: got -1, need a number, above 0.\n" +
                                top +
                                ":3:7: error: run.seeds: unknown key ('run' has no such key). "
                                "Perhaps 'run.seed' was meant.\n"
                                "2 problems; nothing was started");
}

TEST_F(Include, SyntaxErrorOfAnIncludedFile_NamesThatFile) {
  write("base.yaml", "version: 1\nrun: {\n");
  const std::string top = write("top.yaml", "version: 1\ninclude: [base.yaml]\n");
  EXPECT_THAT(complaint(top), StartsWith(at("base.yaml") + ":"));
}

TEST_F(Include, Cycles_AreRefused) {
  write("a.yaml", "version: 1\ninclude: [parts/../b.yaml]\n");
  write("b.yaml", "version: 1\ninclude:\n  - a.yaml\n");
  EXPECT_THAT(complaint(at("a.yaml")),
              StartsWith(at("b.yaml") + ":3:5: error: include[0]: got 'a.yaml'"));
  EXPECT_THAT(complaint(at("a.yaml")), HasSubstr("cycle"));
  const std::string self = write("self.yaml", "version: 1\ninclude: [self.yaml]\n");
  EXPECT_THAT(complaint(self), HasSubstr(self + ":2:11: error: include[0]: "));
}

TEST_F(Include, DepthAndNumberOfFilesAreBounded) {
  write("0.yaml", kSmall);
  for (int i = 1; i <= 10; ++i) {
    write(std::to_string(i) + ".yaml",
          "version: 1\ninclude: [" + std::to_string(i - 1) + ".yaml]\n");
  }
  EXPECT_EQ(complaint(at("8.yaml")), "");
  EXPECT_THAT(complaint(at("10.yaml")), HasSubstr("at most 8 levels"));
  std::string twice = "0.yaml";
  for (char level = 'a'; level < 'i'; ++level) {  // 2^8 readings of 0.yaml without the bound
    const std::string name = std::string(1, level) + ".yaml";
    write(name, "version: 1\ninclude: [" + twice + ", " + twice + "]\n");
    twice = name;
  }
  EXPECT_THAT(complaint(at(twice)), HasSubstr("at most 64 files"));
}

TEST_F(Include, WhatIsNotAReadableFile_IsNamed) {
  const std::string missing = write("missing.yaml", "version: 1\ninclude: [nowhere.yaml]\n");
  EXPECT_THAT(complaint(missing),
              StartsWith(missing + ":2:11: error: include[0]: got '" + at("nowhere.yaml")));
  EXPECT_THAT(complaint(missing), HasSubstr("No such file"));
  const std::string folder = write("folder.yaml", "version: 1\ninclude: [parts]\n");
  EXPECT_THAT(complaint(folder), HasSubstr("not a regular file"));
  const std::string device = write("device.yaml", "version: 1\ninclude: [/dev/zero]\n");
  EXPECT_THAT(complaint(device), HasSubstr("not a regular file"));
}

TEST_F(Include, MustBeAListOfNames) {
  for (const char* value : {"a.yaml", "{a: b}", "[[a]]", "[{a: b}]", "[\"\"]", "~", "[~]"}) {
    const std::string top = write("top.yaml", std::string("include: ") + value + "\n" + kSmall);
    EXPECT_THAT(complaint(top), StartsWith(top + ":1:")) << value;
    EXPECT_THAT(complaint(top), HasSubstr("include")) << value;
    EXPECT_THAT(complaint(top), HasSubstr("1 problem; nothing was started")) << value;
  }
}

TEST_F(Include, EveryFileNeedsItsVersion) {
  write("base.yaml", kSmall);
  write("part.yaml", "run: {seed: 3}\n");
  const std::string top = write("top.yaml", "version: 1\ninclude: [base.yaml, part.yaml]\n");
  EXPECT_THAT(complaint(top),
              StartsWith(at("part.yaml") + ":1:1: error: version: need version: 1"));
}

TEST_F(Include, UnreadableRecipe_IsARecipeError) {
  EXPECT_THAT(complaint(at("nothing.yaml")), StartsWith(at("nothing.yaml") + ":1:1: error: "));
  EXPECT_THAT(complaint(at("nothing.yaml")), HasSubstr("No such file"));
  EXPECT_THAT(complaint(at("parts")), HasSubstr("not a regular file"));
}

}  // namespace
}  // namespace capstan::recipe
