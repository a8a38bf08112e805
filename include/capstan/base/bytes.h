// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Bytes and counts for people ("18.3 MiB", "1.24 M"), and checked integer arithmetic for sizes from
// files.
#pragma once
#include <cstdint>
#include <optional>
#include <string>

namespace capstan {

inline constexpr int64_t kKiB = 1024, kMiB = 1024 * kKiB, kGiB = 1024 * kMiB;

[[nodiscard]] std::string format_bytes(int64_t bytes);      // "512 B", "18.3 MiB", "1.02 GiB"
[[nodiscard]] std::string format_count(int64_t count);      // "5,898,240"
[[nodiscard]] std::string format_duration(double seconds);  // "3m31s", "12.3s", "2h05m"

[[nodiscard]] std::optional<int64_t> checked_add(int64_t a, int64_t b);
[[nodiscard]] std::optional<int64_t> checked_multiply(int64_t a, int64_t b);
[[nodiscard]] constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace capstan
