// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/base/check.h"

#include <cstring>
#include <exception>

#include "capstan/base/error.h"
#include "capstan/base/log.h"

namespace capstan {

namespace {

// The part of __FILE__ a reader needs: the folder and the file, without the machine's path.
const char* short_file(const char* file) {
  const char* start = std::strstr(file, "/src/");
  return start != nullptr ? start + 1 : file;
}

std::string describe(const char* condition, const char* file, int line,
                     const std::string& message) {
  return fmt::format("[internal] check '{}' failed at {}:{}: {}", condition, short_file(file), line,
                     message);
}

}  // namespace

void throw_check_failure(const char* condition, const char* file, int line,
                         const std::string& message) {
  throw InternalError(describe(condition, file, line, message));
}

void log_check_failure(const char* condition, const char* file, int line,
                       const std::string& message) noexcept {
  try {
    log::error("internal", "check '{}' failed at {}:{}: {}", condition, short_file(file), line,
               message);
  } catch (const std::exception&) {
    std::fputs("[internal] check failed and could not be logged\n", stderr);
  }
}

}  // namespace capstan
