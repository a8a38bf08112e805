// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// JSON from files and environment, read strictly: duplicate keys, depth, invalid UTF-8 and numbers
// that do not fit are refused with the place. Wraps nlohmann::json.
#pragma once
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace capstan::json {

using Json = nlohmann::json;

struct Limits {
  int depth = 64;
  int64_t bytes = int64_t{1} << 30;
};
// `origin` names the source in errors (a path). Throws DataError.
[[nodiscard]] Json parse(std::string_view text, std::string_view origin, const Limits& limits = {});

// Typed access with the key path in the error: got what, need what. Throws DataError.
[[nodiscard]] const Json& field(const Json& object, const char* key, std::string_view origin);
[[nodiscard]] int64_t get_int(const Json& object, const char* key, int64_t low, int64_t high,
                              std::string_view origin);
[[nodiscard]] double get_double(const Json& object, const char* key, std::string_view origin);
[[nodiscard]] bool get_bool(const Json& object, const char* key, std::string_view origin);
[[nodiscard]] std::string get_string(const Json& object, const char* key, std::string_view origin);

// Non-finite numbers become null; shortest form that restores the double.
[[nodiscard]] std::string number(double value);

}  // namespace capstan::json
