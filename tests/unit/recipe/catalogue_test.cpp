// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Recipes by name.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "recipe_text.h"

namespace capstan::recipe {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;

// Works in a folder of its own with a catalogue at CAPSTAN_CONFIGS.
class Catalogue : public testing::Test {
 protected:
  void SetUp() override {
    before_ = fs::current_path();
    folder_ = fs::temp_directory_path() / ("capstan-catalogue-" + std::to_string(getpid()));
    fs::create_directories(folder_ / "tree" / "debug");
    fs::create_directories(folder_ / "work");
    fs::current_path(folder_ / "work");
    setenv("CAPSTAN_CONFIGS", (folder_ / "tree").c_str(), 1);
    write("tree/first.yaml",
          "# SPDX-FileCopyrightText: x\n# SPDX-License-Identifier: y\n# The first.\n" + kSmall);
    write("tree/debug/second.yaml", kSmall);
    write("tree/notes.txt", "no recipe");
  }
  void TearDown() override {
    unsetenv("CAPSTAN_CONFIGS");
    fs::current_path(before_);
    fs::remove_all(folder_);
  }
  void write(const std::string& name, const std::string& text) const {
    std::ofstream(folder_ / name) << text;
  }

  fs::path before_, folder_;
};

TEST_F(Catalogue, ListsNamesWithSummaries) {
  const auto entries = list_recipes();
  ASSERT_EQ(entries.size(), 2U);
  EXPECT_EQ(entries[0].name, "debug/second");
  EXPECT_EQ(entries[0].summary, "");
  EXPECT_EQ(entries[1].name, "first");
  EXPECT_EQ(entries[1].summary, "The first.");
}

TEST_F(Catalogue, FindsByNameAndByPath) {
  EXPECT_EQ(find_recipe("first"), folder_ / "tree" / "first.yaml");
  EXPECT_EQ(find_recipe("debug/second"), folder_ / "tree" / "debug" / "second.yaml");
  EXPECT_EQ(find_recipe("../tree/first.yaml"), "../tree/first.yaml");
}

TEST_F(Catalogue, OwnConfigsFolderWins) {
  fs::create_directories("configs");
  write("work/configs/first.yaml", "# Mine.\n" + kSmall);
  EXPECT_EQ(find_recipe("first"), fs::path("configs") / "first.yaml");
  EXPECT_EQ(list_recipes()[1].summary, "Mine.");
}

TEST_F(Catalogue, UnknownNames_AreRefusedWithTheNearest) {
  for (const char* name : {"frist", "frist.yaml", "some/folder/frist.yaml"}) {
    try {
      (void)find_recipe(name);
      FAIL() << name;
    } catch (const ConfigError& error) {
      EXPECT_THAT(error.what(), HasSubstr("'first'"));
      EXPECT_EQ(error.exit_code(), 2);
    }
  }
  for (const char* name : {"", ".", "..", "../tree/first", "debug", "/", "tree"}) {
    EXPECT_THROW((void)find_recipe(name), ConfigError) << name;
  }
}

TEST(SourceCatalogue, EveryRecipeIsValid) {
  for (const auto& entry :
       fs::recursive_directory_iterator(fs::path(CAPSTAN_SOURCE_DIR) / "configs")) {
    if (entry.path().extension() != ".yaml") continue;
    EXPECT_NO_THROW((void)load_recipe(entry.path())) << entry.path();
  }
  EXPECT_EQ(find_recipe("debug/tiny").filename(), "tiny.yaml");
}

}  // namespace
}  // namespace capstan::recipe
