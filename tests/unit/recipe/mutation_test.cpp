// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Ten thousand damaged copies of a recipe: each is read or refused, and nothing else happens.
#include <gtest/gtest.h>

#include <array>
#include <filesystem>
#include <fstream>
#include <random>
#include <sstream>

#include "recipe_text.h"

namespace capstan::recipe {
namespace {

// Own reduction of the generator's numbers: the library's distributions differ between
// implementations.
class Mutator {
 public:
  explicit Mutator(uint64_t seed) : random_(seed) {}

  std::string mutate(std::string text, const std::string& other) {
    const size_t times = 1 + below(4);
    for (size_t i = 0; i < times; ++i) change(text, other);
    return text;
  }

 private:
  size_t below(size_t limit) { return limit == 0 ? 0 : static_cast<size_t>(random_() % limit); }

  void change(std::string& text, const std::string& other) {
    static constexpr std::array kWords = {"&a ",
                                          "*a",
                                          "<<: *a",
                                          "~",
                                          "null",
                                          "---\n",
                                          "...\n",
                                          "!!str ",
                                          "? ",
                                          "- ",
                                          "[",
                                          "]",
                                          "{",
                                          "}",
                                          "\"",
                                          "'",
                                          "|\n",
                                          ">-\n",
                                          "\t",
                                          "#",
                                          ": ",
                                          ",",
                                          "010",
                                          ".inf",
                                          "1e400",
                                          "\xEF\xBB\xBF",
                                          "\xC3",
                                          "include: [quickstart.yaml]\n",
                                          "[[[[[[[[",
                                          "{{{{{{{{",
                                          "%TAG ! x\n",
                                          "\r",
                                          "\xE2\x80\xA8",
                                          "99999999999999999999",
                                          "-1",
                                          "0",
                                          "\\",
                                          "@",
                                          "`"};
    const size_t at = below(text.size() + 1);
    switch (below(8)) {
      case 0:
        if (at < text.size()) text[at] = static_cast<char>(random_());
        break;
      case 1:
        text.erase(at, 1 + below(20));
        break;
      case 2:
        text.insert(at, kWords[below(kWords.size())]);
        break;
      case 3:
        text.insert(at, text.substr(below(text.size()), below(200)));
        break;
      case 4:
        text.resize(at);
        break;
      case 5:
        text.insert(at, other.substr(below(other.size()), below(200)));
        break;
      case 6:
        if (at < text.size()) text[at] = static_cast<char>(text[at] ^ (1 << below(8)));
        break;
      default:
        replace_a_value(text, kWords[below(kWords.size())]);
    }
  }

  void replace_a_value(std::string& text, const char* word) {
    const size_t colon = text.find(": ", below(text.size() + 1));
    if (colon == std::string::npos) return;
    const size_t end = text.find_first_of(" ,}]\n", colon + 2);
    if (end != std::string::npos) text.replace(colon + 2, end - colon - 2, word);
  }

  std::mt19937_64 random_;
};

// Comments are dropped, so that more of the damage falls on keys and values.
std::string without_comments(const std::filesystem::path& path) {
  std::ifstream stream(path);
  std::string text;
  for (std::string line; std::getline(stream, line);) {
    line.resize(line.find('#') == std::string::npos ? line.size() : line.find('#'));
    line.resize(line.find_last_not_of(' ') + 1);
    if (!line.empty()) text += line + "\n";
  }
  return text;
}

TEST(Mutation, TenThousandDamagedRecipes_AreReadOrRefused) {
  const std::filesystem::path configs = std::filesystem::path(CAPSTAN_SOURCE_DIR) / "configs";
  const std::string text = without_comments(configs / "quickstart.yaml");
  const std::string tiny = without_comments(configs / "debug" / "tiny.yaml");
  Mutator mutator(20260101);
  size_t accepted = 0, refused = 0;
  for (int i = 0; i < 10000; ++i) {
    const std::string damaged = mutator.mutate(text, tiny);
    try {
      const std::string dump = dump_recipe(parse(damaged), false);
      ASSERT_EQ(dump_recipe(parse(dump).recipe), dump) << damaged;
      ++accepted;
    } catch (const RecipeError& error) {
      ASSERT_FALSE(error.problems().empty());
      for (const Problem& problem : error.problems()) {
        ASSERT_GE(problem.origin.line, 1) << damaged;
        ASSERT_GE(problem.origin.column, 1) << damaged;
        ASSERT_FALSE(problem.text().empty());
      }
      ++refused;
    }
  }
  // The mutations are neither all fatal nor all harmless.
  EXPECT_GT(accepted, 100U);
  EXPECT_GT(refused, 5000U);
}

}  // namespace
}  // namespace capstan::recipe
