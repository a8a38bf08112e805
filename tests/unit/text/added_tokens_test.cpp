// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "text/added_tokens.h"

#include <gmock/gmock.h>

#include "text/bpe.h"

namespace capstan::text {
namespace {

using Parts = std::vector<std::pair<int32_t, std::string>>;

Parts split(const std::vector<AddedToken>& tokens, std::string_view text,
            bool parse_special = true) {
  std::vector<std::string> patterns;
  for (const AddedToken& token : tokens) patterns.push_back(token.content);
  Parts parts;
  for (const auto& part : AddedTokenMatcher(tokens, patterns).split(text, parse_special)) {
    parts.emplace_back(part.id, part.text);
  }
  return parts;
}

TEST(AddedTokens, LeftmostThenLongest) {
  const std::vector<AddedToken> tokens = {{.id = 1, .content = "<a>"},
                                          {.id = 2, .content = "<a>b"},
                                          {.id = 3, .content = "a>bc"},
                                          {.id = 4, .content = "<"}};
  EXPECT_EQ(
      split(tokens, "x<a>bc<a>< "),
      (Parts{
          {kNoToken, "x"}, {2, "<a>b"}, {kNoToken, "c"}, {1, "<a>"}, {4, "<"}, {kNoToken, " "}}));
  EXPECT_EQ(split(tokens, ""), Parts{});
  EXPECT_EQ(split(tokens, "<a"), (Parts{{4, "<"}, {kNoToken, "a"}}));
}

TEST(AddedTokens, StripSwallowsWhitespaceButNotTheTokenBefore) {
  const std::vector<AddedToken> tokens = {{.id = 1, .content = "L", .lstrip = true},
                                          {.id = 2, .content = "R", .rstrip = true}};
  EXPECT_EQ(split(tokens, "a \u3000\nL b"),
            (Parts{{kNoToken, "a"}, {1, " \u3000\nL"}, {kNoToken, " b"}}));
  EXPECT_EQ(split(tokens, "a R \t b"), (Parts{{kNoToken, "a "}, {2, "R \t "}, {kNoToken, "b"}}));
  EXPECT_EQ(split(tokens, "R  L"), (Parts{{2, "R  "}, {1, "L"}}));
  EXPECT_EQ(split(tokens, "\xff L"), (Parts{{kNoToken, "\xff"}, {1, " L"}}));
}

TEST(AddedTokens, SingleWordNeedsBordersOnBothSides) {
  const std::vector<AddedToken> tokens = {{.id = 1, .content = "ok", .single_word = true}};
  EXPECT_EQ(split(tokens, "ok"), (Parts{{1, "ok"}}));
  EXPECT_EQ(split(tokens, "(ok)"), (Parts{{kNoToken, "("}, {1, "ok"}, {kNoToken, ")"}}));
  for (const char* text : {"oka", "éok", "_ok", "ok9", "ok\u0301"}) {
    EXPECT_EQ(split(tokens, text), (Parts{{kNoToken, text}}));
  }
}

TEST(AddedTokens, SpecialOnesCanStayText) {
  const std::vector<AddedToken> tokens = {{.id = 1, .content = "<s>", .special = true},
                                          {.id = 2, .content = "<u>"}};
  EXPECT_EQ(split(tokens, "<s><u>", false), (Parts{{kNoToken, "<s>"}, {2, "<u>"}}));
}

}  // namespace
}  // namespace capstan::text
