// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "recipe/scalar_internal.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>

namespace capstan::recipe {
namespace {

bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_letter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }

std::string lower(std::string_view text) {
  std::string result(text);
  for (char& c : result) {
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  }
  return result;
}

size_t skip_digits(std::string_view text, size_t at) {
  while (at < text.size() && is_digit(text[at])) ++at;
  return at;
}

// The narrow grammar; integers have neither fraction nor exponent.
struct Shape {
  bool valid = false, integer = false;
};
Shape shape_of(std::string_view text) {
  const size_t start = text.starts_with('-') ? 1 : 0;
  size_t at = skip_digits(text, start);
  if (at == start || (text[start] == '0' && at > start + 1)) return {};
  if (at == text.size()) return {true, true};
  if (text[at] == '.') {
    const size_t fraction = at + 1;
    at = skip_digits(text, fraction);
    if (at == fraction) return {};
  }
  if (at < text.size() && (text[at] == 'e' || text[at] == 'E')) {
    ++at;
    if (at < text.size() && (text[at] == '+' || text[at] == '-')) ++at;
    const size_t exponent = at;
    at = skip_digits(text, exponent);
    if (at == exponent) return {};
  }
  return {at == text.size(), false};
}

bool consists_of(std::string_view text, std::string_view extra) {
  return std::all_of(text.begin(), text.end(), [&](char c) {
    return is_digit(c) || extra.find(c) != std::string_view::npos;
  });
}

std::string why_not_a_point(std::string_view body) {
  const size_t point = body.find('.');
  if (point == std::string_view::npos) return "";
  const bool left = point > 0 && is_digit(body[point - 1]);
  const bool right = point + 1 < body.size() && is_digit(body[point + 1]);
  return left && right ? "" : "a number needs digits on both sides of the point";
}

// The reason for a text that does not have the shape of a number; empty when it is just text.
std::string why_not_a_number(std::string_view text) {
  std::string_view body = text;
  if (body.starts_with('-') || body.starts_with('+')) body.remove_prefix(1);
  const std::string small = lower(body);
  for (const char* special : {".inf", ".nan", "inf", "nan", "infinity"}) {
    if (small == special) return "numbers must be finite";
  }
  if (body.empty() || (!is_digit(body[0]) && body[0] != '.')) return "";
  if (small.starts_with("0x")) return "hexadecimal is not read; write it in decimal";
  if (small.starts_with("0o")) return "octal is not read; write it in decimal";
  if (small.starts_with("0b")) return "binary is not read; write it in decimal";
  if (body.find('_') != std::string_view::npos) return "numbers are written without underscores";
  if (consists_of(body, ":") && body.find(':') != std::string_view::npos) {
    return "some readers take it for base 60";
  }
  if (consists_of(body, ",.") && body.find(',') != std::string_view::npos) {
    return "numbers are written without commas";
  }
  if (body.size() > 1 && body[0] == '0' && is_digit(body[1])) {
    return "a leading zero makes it octal for some readers";
  }
  if (text.starts_with('+')) return "numbers are written without '+'";
  if (const std::string why = why_not_a_point(body); !why.empty()) return why;
  if (is_digit(body[0]) && is_letter(body.back())) return "numbers are written without a suffix";
  return "";
}

}  // namespace

std::variant<int64_t, Refusal> parse_integer(std::string_view text) {
  const Shape shape = shape_of(text);
  if (!shape.valid) return Refusal{why_not_a_number(text)};
  if (!shape.integer) return Refusal{"an integer is written with digits alone"};
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) {
    return Refusal{"it does not fit in 64 bits"};
  }
  return value;
}

std::variant<double, Refusal> parse_number(std::string_view text) {
  if (!shape_of(text).valid) return Refusal{why_not_a_number(text)};
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  const bool is_zero =
      text.find_first_of("123456789") >= std::min(text.find_first_of("eE"), text.size());
  if (error == std::errc::result_out_of_range || !std::isfinite(value) ||
      (value == 0 && !is_zero)) {
    return Refusal{"it does not fit in a double"};
  }
  return value;
}

std::variant<bool, Refusal> parse_boolean(std::string_view text) {
  if (text == "true") return true;
  if (text == "false") return false;
  const std::string small = lower(text);
  for (const char* word : {"yes", "no", "on", "off", "y", "n", "true", "false"}) {
    if (small == word) return Refusal{"only the spellings true and false are booleans"};
  }
  return Refusal{};
}

bool is_ambiguous_text(std::string_view text) {
  static constexpr std::array kWords = {"true", "false", "yes", "no",   "on",   "off", "y",
                                        "n",    "null",  "~",   ".inf", ".nan", "inf", "nan"};
  if (text.starts_with('-') || text.starts_with('+')) text.remove_prefix(1);
  const std::string small = lower(text.substr(0, 8));
  if (std::find(kWords.begin(), kWords.end(), small) != kWords.end()) return true;
  if (text.empty() || (!is_digit(text[0]) && text[0] != '.')) return false;
  if (small.starts_with("0x") || small.starts_with("0o") || small.starts_with("0b")) return true;
  return shape_of(text).valid || consists_of(text, "_") || consists_of(text, ":") ||
         (std::count(text.begin(), text.end(), '.') == 1 && text != "." && consists_of(text, "."));
}

std::string format_text(std::string_view text) {
  const auto is_plain = [](char c) {
    return is_digit(c) || is_letter(c) || c == '_' || c == '/' || c == '.' || c == '-' || c == '+';
  };
  const bool starts_plain =
      !text.empty() && (is_letter(text[0]) || text[0] == '_' || text[0] == '/' || text[0] == '.');
  if (starts_plain && text != "..." && std::all_of(text.begin(), text.end(), is_plain) &&
      !is_ambiguous_text(text)) {
    return std::string(text);
  }
  std::string result = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') {
      result += '\\';
      result += c;
    } else if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) {
      result += fmt::format("\\x{:02x}", static_cast<unsigned char>(c));
    } else {
      result += c;
    }
  }
  return result + "\"";
}

}  // namespace capstan::recipe
