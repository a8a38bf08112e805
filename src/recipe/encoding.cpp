// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "recipe/encoding_internal.h"

#include <fmt/format.h>

#include <algorithm>

#include "capstan/base/text.h"

namespace capstan::recipe {
namespace {

bool is_comment_start(std::string_view text, size_t at) {
  return text[at] == '#' &&
         (at == 0 || text[at - 1] == ' ' || text[at - 1] == '\t' || text[at - 1] == '\n');
}

std::optional<EncodingFault> check_character(std::string_view text, size_t at, bool in_comment) {
  const auto byte = static_cast<unsigned char>(text[at]);
  if (byte == 0) return EncodingFault{at, "a NUL byte", "a recipe is text", "Remove it"};
  if (byte == '\t') {
    if (in_comment) return std::nullopt;
    return EncodingFault{at, "a tab", "YAML readers disagree about its width", "Use spaces"};
  }
  if (byte == '\n') return std::nullopt;
  if (byte == '\r' && at + 1 < text.size() && text[at + 1] == '\n') return std::nullopt;
  if (byte < 0x20 || byte == 0x7f) {
    return EncodingFault{at, fmt::format("control character 0x{:02x}", byte), "a recipe is text",
                         "Remove it"};
  }
  return std::nullopt;
}

}  // namespace

std::optional<EncodingFault> find_encoding_fault(std::string_view text) {
  if (text.starts_with("\xEF\xBB\xBF")) {
    return EncodingFault{0, "a byte-order mark", "", "Save the file as UTF-8 without one"};
  }
  const size_t invalid = find_invalid_utf8(text).value_or(text.size());
  bool in_comment = false;
  for (size_t at = 0; at < invalid; ++at) {
    if (text[at] == '\n') in_comment = false;
    if (is_comment_start(text, at)) in_comment = true;
    if (auto fault = check_character(text, at, in_comment)) return fault;
  }
  if (invalid == text.size()) return std::nullopt;
  return EncodingFault{invalid,
                       fmt::format("byte 0x{:02x}", static_cast<unsigned char>(text[invalid])),
                       "it is not valid UTF-8 here", "Save the file as UTF-8"};
}

Place place_of(std::string_view text, size_t offset) {
  const std::string_view before = text.substr(0, offset);
  const auto lines = std::count(before.begin(), before.end(), '\n');
  const size_t line_start =
      before.rfind('\n') == std::string_view::npos ? 0 : before.rfind('\n') + 1;
  return {static_cast<int>(lines) + 1, static_cast<int>(offset - line_start) + 1};
}

}  // namespace capstan::recipe
