// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Log lines go to stderr: `[12:30:01.123] [rank 0] [data] text`, warnings and errors marked. The
// sink is the one process-wide singleton. Thread-safe. Ranks that are threads set their rank per
// thread.
#pragma once
#include <fmt/format.h>

#include <string>
#include <string_view>
#include <utility>

namespace capstan::log {

enum class Level { kDebug, kInfo, kWarning, kError, kOff };

// Reads "debug", "info", "warning", "error", "off"; throws ConfigError with the list otherwise.
[[nodiscard]] Level parse_level(std::string_view name);
void set_level(Level level);
[[nodiscard]] bool is_enabled(Level level);

// Rank shown in front of the lines of this thread; -1 = that of the process. A process that is one
// rank sets the process rank, so that its helper threads show it too; -1 = none.
void set_thread_rank(int rank);
void set_process_rank(int rank);
[[nodiscard]] int thread_rank();

// Besides stderr, warnings and errors reach this function (metrics turns them into events); empty =
// none.
void set_observer(void (*observer)(void* context, Level, std::string_view module,
                                   std::string_view text),
                  void* context);

void write(Level level, std::string_view module, std::string_view text);

template <class... Args>
void debug(std::string_view module, fmt::format_string<Args...> format, Args&&... args) {
  if (is_enabled(Level::kDebug))
    write(Level::kDebug, module, fmt::format(format, std::forward<Args>(args)...));
}
template <class... Args>
void info(std::string_view module, fmt::format_string<Args...> format, Args&&... args) {
  if (is_enabled(Level::kInfo))
    write(Level::kInfo, module, fmt::format(format, std::forward<Args>(args)...));
}
template <class... Args>
void warning(std::string_view module, fmt::format_string<Args...> format, Args&&... args) {
  write(Level::kWarning, module, fmt::format(format, std::forward<Args>(args)...));
}
template <class... Args>
void error(std::string_view module, fmt::format_string<Args...> format, Args&&... args) {
  write(Level::kError, module, fmt::format(format, std::forward<Args>(args)...));
}

}  // namespace capstan::log
