// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Classes of code points and UTF-8 stepping. The text given to these functions is valid UTF-8.
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace capstan::text {

enum CharClass : uint8_t { kLetter = 1, kNumber = 2, kSpace = 4, kWord = 8 };  // \p{L} \p{N} \s \w

struct ClassRange {
  uint32_t first, last;
  uint8_t bits;
};
[[nodiscard]] std::span<const ClassRange> class_ranges();  // ascending; unicode_tables.cpp

inline constexpr uint32_t kCodePoints = 0x110000;
[[nodiscard]] const uint8_t* class_table();  // kCodePoints entries of CharClass bits; made once

struct CodePoint {
  uint32_t value;
  uint32_t length;  // bytes
};

[[nodiscard]] inline CodePoint decode_at(const char* at) {
  const auto byte = [at](int i) { return static_cast<uint32_t>(static_cast<uint8_t>(at[i])); };
  const uint32_t lead = byte(0);
  if (lead < 0x80) return {lead, 1};
  if (lead < 0xe0) return {(lead & 0x1f) << 6 | (byte(1) & 0x3f), 2};
  if (lead < 0xf0) return {(lead & 0xf) << 12 | (byte(1) & 0x3f) << 6 | (byte(2) & 0x3f), 3};
  return {(lead & 7) << 18 | (byte(1) & 0x3f) << 12 | (byte(2) & 0x3f) << 6 | (byte(3) & 0x3f), 4};
}

void append_utf8(std::string& out, uint32_t code_point);

// Length of the well-formed sequence at the start of `text`, 0 when there is none (RFC 3629).
[[nodiscard]] size_t sequence_length(std::string_view text);
// Length of the longest valid prefix.
[[nodiscard]] size_t valid_prefix(std::string_view text);

// Start of the last character of a valid, non-empty text.
[[nodiscard]] size_t last_character(std::string_view text);

}  // namespace capstan::text
