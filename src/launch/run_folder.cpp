// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/launch/run_folder.h"

#include <fmt/format.h>
#include <string.h>

#include <algorithm>
#include <charconv>
#include <set>
#include <system_error>
#include <vector>

#include "capstan/base/env.h"
#include "capstan/base/error.h"
#include "capstan/base/json.h"
#include "capstan/base/log.h"
#include "capstan/base/text.h"

namespace capstan::launch {
namespace {

namespace fs = std::filesystem;

std::optional<int64_t> number_behind(const std::string& name, std::string_view prefix) {
  if (!name.starts_with(prefix)) return std::nullopt;
  int64_t number = 0;
  const char* last = name.data() + name.size();
  const auto [end, error] = std::from_chars(name.data() + prefix.size(), last, number);
  return error == std::errc() && end == last ? std::optional(number) : std::nullopt;
}

bool is_below(const fs::path& path, const fs::path& folder) {
  return std::mismatch(folder.begin(), folder.end(), path.begin(), path.end()).first ==
         folder.end();
}

// First parts of the paths of everything that is no folder: "checkpoints", "metrics.jsonl", ...
std::set<std::string> names_in_use(const Path& run_directory, const Path& own_logs) {
  std::set<std::string> names;
  std::error_code error;
  for (fs::recursive_directory_iterator at(run_directory, error), end; at != end;
       at.increment(error)) {
    const fs::path inside = at->path().lexically_relative(run_directory);
    std::error_code ignored;
    if (at->is_directory(ignored) && !at->is_symlink(ignored)) continue;
    if (inside == "lock" || (!own_logs.empty() && is_below(inside, own_logs))) continue;
    names.insert(inside.begin()->native());
  }
  if (error && error != std::errc::no_such_file_or_directory)
    throw EnvError({.module = "launch",
                    .what = "reading the run directory " + run_directory.string(),
                    .got = error.message()});
  return names;
}

}  // namespace

void check_unused(const Path& run_directory, int own_attempt) {
  const Path own_logs =
      own_attempt < 0 ? Path() : Path("logs") / fmt::format("attempt_{}", own_attempt);
  const std::set<std::string> names = names_in_use(run_directory, own_logs);
  if (names.empty()) return;
  const std::vector<std::string> found(names.begin(), names.end());
  throw ConfigError({.module = "launch",
                     .what = "--resume none",
                     .got = fmt::format("{} in {}", join(found, ", "), run_directory.string()),
                     .need = "an empty run directory",
                     .fix = "Give another name (--set run.name=NAME), or --resume auto to go on"});
}

std::optional<int64_t> last_committed_step(const Path& run_directory) {
  std::optional<int64_t> newest;
  std::error_code error;
  for (fs::directory_iterator at(run_directory / "checkpoints", error), end; at != end;
       at.increment(error)) {
    const auto step = number_behind(at->path().filename().native(), "step-");
    std::error_code ignored;
    if (step && *step >= newest.value_or(0) && fs::exists(at->path() / "manifest.json", ignored))
      newest = step;
  }
  return newest;
}

std::string cause_of_error(std::string_view class_name) {
  if (class_name == "DivergenceError") return "numerics";
  if (class_name == "DataError") return "data";
  if (class_name == "ConfigError") return "recipe";
  if (class_name == "EnvError" || class_name == "AbortedError") return "environment";
  if (class_name == "InternalError") return "internal";
  return "worker";
}

std::string signal_name(int signal) {
  const char* name = ::sigabbrev_np(signal);
  return name != nullptr ? std::string("SIG") + name : "signal " + std::to_string(signal);
}

void write_exit_report(const Path& run_directory, const ExitReport& report) noexcept {
  try {
    std::error_code ignored;
    if (!fs::is_directory(run_directory, ignored)) return;
    const auto or_null = [](const auto& value, bool given) {
      return given ? json::Json(value) : json::Json();
    };
    const auto step = last_committed_step(run_directory);
    const json::Json root = {{"code", report.code},
                             {"class", report.cause},
                             {"error", or_null(report.error, !report.error.empty())},
                             {"rank", report.rank},
                             {"host", host_name()},
                             {"signal", or_null(signal_name(report.signal), report.signal != 0)},
                             {"worker_exit_code", or_null(report.worker_exit_code.value_or(0),
                                                          report.worker_exit_code.has_value())},
                             {"message", report.message},
                             {"last_committed_step", or_null(step.value_or(0), step.has_value())},
                             {"time", utc_now()}};
    write_file_atomic(run_directory / "exit.json",
                      root.dump(1, ' ', false, json::Json::error_handler_t::replace) + "\n");
  } catch (const std::exception& error) {
    log::warning("launch", "exit.json was not written: {}", error.what());
  }
}

}  // namespace capstan::launch
