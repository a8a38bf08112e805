// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// CAPSTAN_CHECK(condition, "format {}", args...): always on; throws InternalError with file and
// line. For conditions that only a bug of ours can break; what a user can cause gets a named error
// instead.
#pragma once
#include <fmt/format.h>

#include <string>

namespace capstan {

[[noreturn]] void throw_check_failure(const char* condition, const char* file, int line,
                                      const std::string& message);

// `_LOG_ONLY` form for destructors: logs instead of throwing.
void log_check_failure(const char* condition, const char* file, int line,
                       const std::string& message) noexcept;

}  // namespace capstan

#define CAPSTAN_CHECK(condition, ...)                                                             \
  do {                                                                                            \
    if (!(condition)) [[unlikely]]                                                                \
      ::capstan::throw_check_failure(#condition, __FILE__, __LINE__, ::fmt::format(__VA_ARGS__)); \
  } while (false)

#define CAPSTAN_CHECK_LOG_ONLY(condition, ...)                                                  \
  do {                                                                                          \
    if (!(condition)) [[unlikely]]                                                              \
      ::capstan::log_check_failure(#condition, __FILE__, __LINE__, ::fmt::format(__VA_ARGS__)); \
  } while (false)
