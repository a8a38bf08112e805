// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>
#include <tuple>

#include "capstan/recipe/load.h"

namespace capstan::recipe {
namespace {

constexpr size_t kMostShown = 50;
constexpr const char* kOverrideFile = "--set";

auto order_of(const Problem& problem) {
  const Origin& at = problem.origin;
  return std::tie(at.file, at.line, at.column);
}

bool comes_before(const Problem& a, const Problem& b) {
  const bool a_is_override = a.origin.file == kOverrideFile;
  const bool b_is_override = b.origin.file == kOverrideFile;
  if (a_is_override != b_is_override) return b_is_override;
  return order_of(a) < order_of(b);
}

std::vector<Problem> sorted(std::vector<Problem> problems) {
  std::stable_sort(problems.begin(), problems.end(), comes_before);
  return problems;
}

std::string list_text(const std::vector<Problem>& problems) {
  std::string text;
  for (size_t i = 0; i < std::min(problems.size(), kMostShown); ++i)
    text += problems[i].text() + "\n";
  if (problems.size() > kMostShown)
    text += fmt::format("... and {} more\n", problems.size() - kMostShown);
  const char* word = problems.size() == 1 ? "problem" : "problems";
  return text + fmt::format("{} {}; nothing was started", problems.size(), word);
}

}  // namespace

std::string Origin::text() const {
  return line == 0 ? file : fmt::format("{}:{}:{}", file, line, column);
}

std::string Problem::text() const {
  std::string result = origin.text() + ": error: ";
  if (!key.empty()) result += key + ": ";
  if (need.empty()) {
    result += got;
  } else {
    result += got.empty() ? "need " + need : fmt::format("got {}, need {}", got, need);
  }
  if (!why.empty()) result += fmt::format(" ({})", why);
  result += ".";
  if (!fix.empty()) result += fmt::format(" {}.", fix);
  return result;
}

RecipeError::RecipeError(std::vector<Problem> problems)
    : ConfigError(list_text(sorted(problems))), problems_(sorted(std::move(problems))) {}

Origin Resolved::origin_of(const std::string& key) const {
  const auto found = origins.find(key);
  return found == origins.end() ? Origin{"default", 0, 0} : found->second;
}

}  // namespace capstan::recipe
