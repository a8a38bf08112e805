// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The scanners against the regular expressions they stand for, on PCRE2.
#include "text/scanner.h"

#include <gmock/gmock.h>

#include <random>

#include "capstan/base/text.h"
#include "text/byte_map.h"
#include "text/normalizer.h"
#include "text/regex.h"
#include "text/unicode.h"

namespace capstan::text {
namespace {

std::vector<std::string> scan_all(PiecePattern pattern, std::string_view text) {
  std::vector<std::string> pieces;
  while (!text.empty()) {
    const size_t length = scanner_of(pattern)(text);
    pieces.emplace_back(text.substr(0, length));
    text.remove_prefix(length);
  }
  return pieces;
}

std::vector<std::string> match_all(const Regex& regex, std::string_view text) {
  std::vector<std::string> pieces;
  regex.split(text, [&](std::string_view piece) { pieces.emplace_back(piece); });
  return pieces;
}

std::string random_text(std::mt19937& random) {
  static constexpr uint32_t kChosen[] = {
      ' ',    ' ',    '\n',   '\r', '\t',  '\'',   's',   'S',    'l',   'L',     'r',      'e',
      'v',    'm',    'd',    't',  '1',   '9',    '.',   '-',    0x17f, 0x85,    0xa0,     0x180e,
      0x200b, 0x2028, 0x3000, 0xb2, 0x661, 0x2160, 0x301, 0x4e00, 0xe9,  0x1f600, 0x10ffff, 0xfdd0};
  std::string text;
  const int length = 1 + static_cast<int>(random() % 14);
  for (int i = 0; i < length; ++i) {
    uint32_t c = kChosen[random() % std::size(kChosen)];
    if (random() % 8 == 0) c = random() % kCodePoints;
    if (c < 0xd800 || c > 0xdfff) append_utf8(text, c);
  }
  return text;
}

TEST(Scanner, AgreesWithItsRegularExpression) {
  std::mt19937 random(3);
  for (const PiecePattern pattern :
       {PiecePattern::kGpt2, PiecePattern::kLlama3, PiecePattern::kQwen2}) {
    const Regex regex(regex_of(pattern), Regex::Kind::kPattern, "test");
    for (int round = 0; round < 40000; ++round) {
      const std::string text = random_text(random);
      ASSERT_EQ(scan_all(pattern, text), match_all(regex, text))
          << name_of(pattern) << ": " << quote(text, 200);
    }
  }
}

// Lengths of the runs of code points with and without a class, over all of Unicode in order.
std::vector<size_t> runs_of(uint8_t wanted, std::string& all) {
  std::vector<size_t> runs;
  bool before = false;
  for (uint32_t c = 0; c < kCodePoints; ++c) {
    if (c >= 0xd800 && c <= 0xdfff) continue;
    const size_t start = all.size();
    append_utf8(all, c);
    const bool now = (class_table()[c] & wanted) != 0;
    if (runs.empty() || now != before) runs.push_back(0);
    runs.back() += all.size() - start;
    before = now;
  }
  return runs;
}

TEST(Scanner, EveryCodePointHasTheClassOfTheRegex) {
  for (const auto& [pattern, wanted] :
       {std::pair("\\p{L}+", kLetter), std::pair("\\p{N}+", kNumber), std::pair("\\s+", kSpace)}) {
    std::string all;
    const std::vector<size_t> expected = runs_of(wanted, all);
    std::vector<size_t> runs;
    Regex(pattern, Regex::Kind::kPattern, "test").split(all, [&](std::string_view piece) {
      runs.push_back(piece.size());
    });
    EXPECT_EQ(runs, expected) << pattern;
  }
}

TEST(Scanner, KnownPatterns) {
  for (const PiecePattern pattern :
       {PiecePattern::kGpt2, PiecePattern::kLlama3, PiecePattern::kQwen2}) {
    EXPECT_EQ(known_pattern(regex_of(pattern)), pattern);
    EXPECT_EQ(piece_pattern_from_name(name_of(pattern)), pattern);
  }
  EXPECT_EQ(known_pattern("\\p{L}+"), std::nullopt);
}

TEST(Unicode, ValidPrefix_AgreesWithBase) {
  std::mt19937 random(5);
  for (int round = 0; round < 20000; ++round) {
    std::string text = random_text(random) + "x";
    for (int i = 0; i < 2; ++i) text[random() % text.size()] = static_cast<char>(random());
    ASSERT_EQ(valid_prefix(text), find_invalid_utf8(text).value_or(text.size()));
  }
}

TEST(ByteMap, IsABijection) {
  std::string all;
  for (int b = 0; b < 256; ++b) all += static_cast<char>(b);
  EXPECT_EQ(symbols_to_bytes(bytes_to_symbols(all)), all);
  EXPECT_EQ(bytes_to_symbols(" the\n"), "ĠtheĊ");
  EXPECT_EQ(symbols_to_bytes("a b"), std::nullopt);
  EXPECT_EQ(symbols_to_bytes("你"), std::nullopt);
}

TEST(Normalizer, FormsAndQuickCheck) {
  EXPECT_EQ(normalize("e\u0301", NormalForm::kNfc), "é");
  EXPECT_EQ(normalize("é", NormalForm::kNfd), "e\u0301");
  EXPECT_EQ(normalize("ﬁ²", NormalForm::kNfkc), "fi2");
  EXPECT_EQ(normalize("가", NormalForm::kNfkd).size(), 6u);
  EXPECT_TRUE(is_surely_normal("straße", NormalForm::kNfc));
  EXPECT_FALSE(is_surely_normal("straße", NormalForm::kNfd));
  EXPECT_FALSE(is_surely_normal("a\u0300", NormalForm::kNfc));
}

}  // namespace
}  // namespace capstan::text
