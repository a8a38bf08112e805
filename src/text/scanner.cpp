// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "text/scanner.h"

#include <array>
#include <string>

#include "capstan/base/error.h"
#include "capstan/base/text.h"
#include "text/unicode.h"

namespace capstan::text {
namespace {

constexpr uint8_t kPlainClass = kLetter | kNumber | kSpace;

// A position in valid UTF-8 with the class of the character there; class kEnd at the end.
class Cursor {
 public:
  static constexpr uint8_t kEnd = 0x80;

  Cursor(std::string_view text, const uint8_t* table)
      : begin_(text.data()), at_(text.data()), end_(text.data() + text.size()), table_(table) {
    look();
  }
  [[nodiscard]] bool at_end() const { return at_ == end_; }
  [[nodiscard]] uint32_t value() const { return value_; }
  [[nodiscard]] bool is(uint8_t wanted) const { return (class_ & wanted) != 0; }
  // Neither whitespace nor letter nor number, and not the end.
  [[nodiscard]] bool is_other() const { return class_ == 0; }
  [[nodiscard]] bool is_newline() const { return !at_end() && (value_ == '\n' || value_ == '\r'); }
  [[nodiscard]] size_t offset() const { return static_cast<size_t>(at_ - begin_); }
  void step() {
    at_ += length_;
    look();
  }
  void skip(uint8_t wanted) {
    while (is(wanted)) step();
  }
  void skip_other() {
    while (is_other()) step();
  }

 private:
  void look() {
    if (at_ == end_) {
      class_ = kEnd, value_ = 0, length_ = 0;
      return;
    }
    const CodePoint point = decode_at(at_);
    value_ = point.value, length_ = point.length;
    class_ = table_[value_] & kPlainClass;
  }

  const char *begin_, *at_, *end_;
  const uint8_t* table_;
  uint32_t value_ = 0, length_ = 0;
  uint8_t class_ = 0;
};

char lower(char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c; }

// 's 't 're 've 'm 'll 'd at the start of text; 0 when there is none. U+017F folds to s.
template <bool kFold>
size_t contraction(std::string_view text) {
  if (text.size() < 2 || text[0] != '\'') return 0;
  const auto at = [text](size_t i) { return kFold ? lower(text[i]) : text[i]; };
  const char first = at(1);
  if (first == 's' || first == 't' || first == 'm' || first == 'd') return 2;
  if (text.size() < 3) return 0;
  if (kFold && text[1] == '\xc5' && text[2] == '\xbf') return 3;
  const char second = at(2);
  if ((first == 'r' && second == 'e') || (first == 'v' && second == 'e')) return 3;
  return first == 'l' && second == 'l' ? 3 : 0;
}

// \s+(?!\S)|\s+ : all of a run that ends the text, else the run without its last character, else
// one.
size_t whitespace_run(Cursor cursor, size_t* newline_end) {
  size_t last = 0, count = 0;
  *newline_end = 0;
  while (cursor.is(kSpace)) {
    const bool newline = cursor.is_newline();
    last = cursor.offset();
    ++count;
    cursor.step();
    if (newline) *newline_end = cursor.offset();
  }
  return cursor.at_end() || count == 1 ? cursor.offset() : last;
}

// 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
size_t scan_gpt2(std::string_view text) {
  static const uint8_t* const table = class_table();
  if (const size_t length = contraction<false>(text)) return length;
  const Cursor start(text, table);
  Cursor cursor = start;
  if (cursor.value() == ' ') cursor.step();
  if (cursor.is(kLetter)) return cursor.skip(kLetter), cursor.offset();
  if (cursor.is(kNumber)) return cursor.skip(kNumber), cursor.offset();
  if (cursor.is_other()) return cursor.skip_other(), cursor.offset();
  size_t newline_end = 0;
  return whitespace_run(start, &newline_end);
}

// (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,kDigits}| ?[^\s\p{L}\p{N}]+[\r\n]*|
// \s*[\r\n]+|\s+(?!\S)|\s+
template <int kDigits>
size_t scan_cl100k(std::string_view text) {
  static const uint8_t* const table = class_table();
  if (const size_t length = contraction<true>(text)) return length;
  const Cursor start(text, table);
  Cursor cursor = start;
  if (cursor.is(kNumber)) {
    for (int i = 0; i < kDigits && cursor.is(kNumber); ++i) cursor.step();
    return cursor.offset();
  }
  if (!cursor.is(kLetter) && !cursor.is_newline()) cursor.step();
  if (cursor.is(kLetter)) return cursor.skip(kLetter), cursor.offset();
  cursor = start;
  if (cursor.value() == ' ') cursor.step();
  if (cursor.is_other()) {
    cursor.skip_other();
    while (cursor.is_newline()) cursor.step();
    return cursor.offset();
  }
  size_t newline_end = 0;
  const size_t run = whitespace_run(start, &newline_end);
  return newline_end > 0 ? newline_end : run;
}

constexpr std::string_view kGpt2Regex =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
constexpr std::string_view kLlama3Regex =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|)"
    R"(\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr std::string_view kQwen2Regex =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|)"
    R"(\s*[\r\n]+|\s+(?!\S)|\s+)";

struct Known {
  PiecePattern pattern;
  std::string_view name, regex;
  Scan scan;
};
constexpr std::array<Known, 3> kKnown = {{
    {PiecePattern::kGpt2, "gpt2", kGpt2Regex, scan_gpt2},
    {PiecePattern::kLlama3, "llama3", kLlama3Regex, scan_cl100k<3>},
    {PiecePattern::kQwen2, "qwen2", kQwen2Regex, scan_cl100k<1>},
}};

const Known& known(PiecePattern pattern) {
  for (const Known& entry : kKnown) {
    if (entry.pattern == pattern) return entry;
  }
  throw InternalError(std::string("[text] unknown piece pattern"));
}

}  // namespace

PiecePattern piece_pattern_from_name(std::string_view name) {
  for (const Known& entry : kKnown) {
    if (entry.name == name) return entry.pattern;
  }
  throw ConfigError({.module = "text",
                     .what = "choosing the piece pattern",
                     .got = quote(name),
                     .need = "one of gpt2, llama3, qwen2"});
}

std::string_view name_of(PiecePattern pattern) { return known(pattern).name; }
std::string_view regex_of(PiecePattern pattern) { return known(pattern).regex; }
Scan scanner_of(PiecePattern pattern) { return known(pattern).scan; }

std::optional<PiecePattern> known_pattern(std::string_view regex) {
  for (const Known& entry : kKnown) {
    if (entry.regex == regex) return entry.pattern;
  }
  return std::nullopt;
}

}  // namespace capstan::text
