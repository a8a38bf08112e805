// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What a run directory tells those who start and watch ranks, without LibTorch: whether it is
// unused, its newest committed step, and exit.json, the report of how the last attempt ended.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "capstan/base/file.h"

namespace capstan::launch {

// For `--resume none`. Throws ConfigError naming what is there, unless the directory is missing or
// holds nothing but its lock, empty folders and `logs/attempt_<own_attempt>` (-1 = none), which the
// launcher of this very attempt has made.
void check_unused(const Path& run_directory, int own_attempt);

// The highest step whose folder in checkpoints/ holds a manifest. Contents are not verified.
[[nodiscard]] std::optional<int64_t> last_committed_step(const Path& run_directory);

// exit.json: code, class, error, rank, host, signal, worker_exit_code, message,
// last_committed_step, time. What does not apply is null.
struct ExitReport {
  int code = 0;       // what the program ends with (docs/troubleshooting.md)
  std::string cause;  // "class": done, preempted, stopped, numerics, data, recipe, environment,
                      // internal, worker
  std::string error;  // class of the exception, "DataError"
  int rank = 0;       // that failed first
  int signal = 0;     // that asked for the end or ended the rank; written by name
  std::optional<int> worker_exit_code;  // of the rank, when it differs in kind from `code`
  std::string message;
};
[[nodiscard]] std::string cause_of_error(std::string_view class_name);  // "DataError" -> "data"
[[nodiscard]] std::string signal_name(int signal);                      // "SIGTERM"
// Adds host, time and the last committed step. Does nothing when the directory is missing; a
// failure to write is logged: the exit code still tells.
void write_exit_report(const Path& run_directory, const ExitReport& report) noexcept;

}  // namespace capstan::launch
