// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Numbers, booleans and text of recipes, read by one narrow grammar: what two YAML readers could
// take for different values is refused.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <variant>

namespace capstan::recipe {

// Why a text is not what was asked for: "a leading zero makes it octal for some readers".
struct Refusal {
  std::string why;  // may be empty when nothing more than the type is wrong
};

// Decimal digits with an optional '-'; no leading zeros.
[[nodiscard]] std::variant<int64_t, Refusal> parse_integer(std::string_view text);
// Digits, optional fraction (digits on both sides of the point), optional exponent; finite and not
// rounded to zero.
[[nodiscard]] std::variant<double, Refusal> parse_number(std::string_view text);
[[nodiscard]] std::variant<bool, Refusal> parse_boolean(std::string_view text);

// A plain (unquoted) text that some YAML reader takes for a number, boolean or null.
[[nodiscard]] bool is_ambiguous_text(std::string_view text);
// The text as a YAML scalar: plain where nobody can misread it, else in double quotes.
[[nodiscard]] std::string format_text(std::string_view text);

}  // namespace capstan::recipe
