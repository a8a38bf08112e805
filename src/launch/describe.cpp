// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <charconv>
#include <system_error>

#include "capstan/base/error.h"
#include "capstan/base/text.h"
#include "capstan/launch/local.h"

namespace capstan::launch {

namespace {

int attempt_number(const std::string& name) {
  constexpr std::string_view kPrefix = "attempt_";
  int number = -1;
  if (!name.starts_with(kPrefix)) return -1;
  const char* last = name.data() + name.size();
  const auto [end, error] = std::from_chars(name.data() + kPrefix.size(), last, number);
  return error == std::errc() && end == last ? number : -1;
}

}  // namespace

std::string describe(const LaunchResult& result) {
  if (!result.failure) return "";
  const RankFailure& failure = *result.failure;
  std::string out = fmt::format("rank {} {}", failure.rank, failure.reason);
  if (!failure.message.empty()) out += fmt::format(": {}", failure.message);
  out += "\n";
  if (!failure.last_lines.empty()) out += "its last lines:\n";
  for (const std::string& line : failure.last_lines) {
    out += fmt::format("[rank {}] {}\n", failure.rank, line);
  }
  return out + "its logs: " + failure.log_directory.native() + "\n";
}

Path make_attempt_directory(const Path& logs) {
  create_directories_durable(logs);
  int number = 0;
  for (const auto& entry : std::filesystem::directory_iterator(logs)) {
    number = std::max(number, attempt_number(entry.path().filename().native()) + 1);
  }
  for (;; ++number) {
    const Path path = logs / fmt::format("attempt_{}", number);
    std::error_code problem;
    if (std::filesystem::create_directory(path, problem)) return path;
    if (problem) {
      throw EnvError({.module = "launch",
                      .what = "creating the log folder " + quote(path.native(), 4096),
                      .got = problem.message()});
    }
  }
}

}  // namespace capstan::launch
