// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <unistd.h>

#include <limits>

#include "capstan/base/env.h"
#include "capstan/base/error.h"
#include "capstan/base/json.h"
#include "capstan/base/log.h"
#include "capstan/launch/rank_env.h"

namespace capstan::launch {

namespace {

Path done_path(const Path& error_file) { return error_file.parent_path() / "done"; }

std::optional<Path> error_file_path() {
  const auto path = read_env("CAPSTAN_ERROR_FILE");
  if (!path || path->empty()) return std::nullopt;
  return Path(*path);
}

std::string error_json(const std::exception& error, int exit_code) {
  const auto* own = dynamic_cast<const Error*>(&error);
  const json::Json report = {
      {"rank", read_env_int("CAPSTAN_RANK", 0, std::numeric_limits<int>::max()).value_or(0)},
      {"host", host_name()},
      {"pid", ::getpid()},
      {"class", own != nullptr ? own->class_name() : "exception"},
      {"message", error.what()},
      {"exit_code", exit_code},
      {"cascade", own != nullptr && own->text().module == "comm"},
      {"time", utc_now()},
      {"monotonic_ns", monotonic_ns()}};
  return report.dump(2, ' ', false, json::Json::error_handler_t::replace) + "\n";
}

}  // namespace

void write_error_file(const std::exception& error, int exit_code) noexcept {
  try {
    if (const auto path = error_file_path()) write_file_atomic(*path, error_json(error, exit_code));
  } catch (const std::exception& problem) {
    // The rank is failing already; its exit code still tells the launcher.
    log::warning("launch", "no error file was written: {}", problem.what());
  }
}

void declare_done() noexcept {
  try {
    if (const auto path = error_file_path()) {
      write_file_atomic(done_path(*path), "{\"done\":true}\n");
    }
  } catch (const std::exception& problem) {
    log::warning("launch", "the end of the run could not be declared: {}", problem.what());
  }
}

std::optional<ErrorFile> read_error_file(const Path& path) {
  try {
    const std::string origin = path.native();
    const json::Json report = json::parse(read_file(path, 16 << 20), origin);
    constexpr int64_t kMost = std::numeric_limits<int>::max();
    return ErrorFile{
        .rank = static_cast<int>(json::get_int(report, "rank", 0, kMost, origin)),
        .exit_code = static_cast<int>(json::get_int(report, "exit_code", 0, 255, origin)),
        .class_name = json::get_string(report, "class", origin),
        .message = json::get_string(report, "message", origin),
        .time_ns = json::get_int(report, "monotonic_ns", 0, INT64_MAX, origin),
        .is_cascade = json::get_bool(report, "cascade", origin)};
  } catch (const Error&) {
    return std::nullopt;  // a rank that was killed leaves none, or half of one on a full disk
  }
}

bool is_declared_done(const Path& error_file) {
  try {
    const Path path = done_path(error_file);
    return json::get_bool(json::parse(read_file(path, 4096), path.native()), "done", path.native());
  } catch (const Error&) {
    return false;
  }
}

}  // namespace capstan::launch
