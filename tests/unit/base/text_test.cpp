// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/base/text.h"

#include <gtest/gtest.h>

namespace capstan {
namespace {

TEST(Text, NearestName_FindsSlipsOnly) {
  const std::vector<std::string> names = {"learning_rate", "weight_decay", "lr", "steps", "seed"};
  EXPECT_EQ(nearest_name("lerning_rate", names), "learning_rate");
  EXPECT_EQ(nearest_name("wieght_decay", names), "weight_decay");
  EXPECT_EQ(nearest_name("weight-decay", names), "weight_decay");
  EXPECT_EQ(nearest_name("Seed", names), "seed");
  EXPECT_EQ(nearest_name("step", names), "steps");
  EXPECT_EQ(nearest_name("batch_size", names), std::nullopt);
  EXPECT_EQ(nearest_name("xy", names), std::nullopt);
  EXPECT_EQ(nearest_name("", names), std::nullopt);
  EXPECT_EQ(nearest_name(std::string(100000, 'a'), names), std::nullopt);
}

TEST(Text, Utf8_FollowsTheTable) {
  EXPECT_EQ(find_invalid_utf8("plain"), std::nullopt);
  EXPECT_EQ(find_invalid_utf8("\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80"), std::nullopt);
  EXPECT_EQ(find_invalid_utf8("\xed\x9f\xbf\xee\x80\x80\xf4\x8f\xbf\xbf"), std::nullopt);
  EXPECT_EQ(find_invalid_utf8("ab\xff"), 2u);
  EXPECT_EQ(find_invalid_utf8("a\xc0\x80"), 1u) << "overlong";
  EXPECT_EQ(find_invalid_utf8("\xe0\x80\x80"), 0u) << "overlong";
  EXPECT_EQ(find_invalid_utf8("\xed\xa0\x80"), 0u) << "surrogate";
  EXPECT_EQ(find_invalid_utf8("\xf4\x90\x80\x80"), 0u) << "above U+10FFFF";
  EXPECT_EQ(find_invalid_utf8("x\xe2\x82"), 1u) << "cut short";
  EXPECT_EQ(find_invalid_utf8("\x80"), 0u);
}

TEST(Text, Quote_EscapesAndCuts) {
  EXPECT_EQ(quote("a'b\\c\n\x01\x7f"), "'a\\'b\\\\c\\n\\x01\\x7f'");
  EXPECT_EQ(quote("\xff"
                  "\xc3\xa9"),
            "'\\xff\xc3\xa9'");
  EXPECT_EQ(quote("abcdef", 3), "'abc'... (6 bytes)");
  EXPECT_EQ(quote("ab\xe2\x82\xac", 3), "'ab'... (5 bytes)") << "characters stay whole";
  EXPECT_EQ(quote("\x1b[31m"), "'\\x1b[31m'") << "no terminal sequences";
}

TEST(Text, Join) {
  EXPECT_EQ(join({}, ", "), "");
  const std::vector<std::string> parts = {"a", "b", "c"};
  EXPECT_EQ(join(parts, ", "), "a, b, c");
}

TEST(Text, Glob_StarStaysWithinAPart) {
  EXPECT_TRUE(glob_match("a/*.h", "a/b.h"));
  EXPECT_FALSE(glob_match("a/*.h", "a/b/c.h"));
  EXPECT_FALSE(glob_match("a/*", "a/b/c"));
  EXPECT_TRUE(glob_match("a/?.h", "a/\xc3\xa9.h")) << "? is one character";
  EXPECT_FALSE(glob_match("a/?.h", "a/bb.h"));
  EXPECT_TRUE(glob_match("a/**/z.h", "a/z.h"));
  EXPECT_TRUE(glob_match("a/**/z.h", "a/b/c/z.h"));
  EXPECT_TRUE(glob_match("**/ops/*.h", "ATen/ops/add.h"));
  EXPECT_TRUE(glob_match("a/**", "a/b/c"));
  EXPECT_TRUE(glob_match("**", "anything/at/all"));
}

TEST(Text, Glob_WithoutSlashMatchesNameOrAnyFolder) {
  EXPECT_TRUE(glob_match("*.h", "ATen/ops/add.h"));
  EXPECT_FALSE(glob_match("*.h", "ATen/ops/add.hpp"));
  EXPECT_TRUE(glob_match("google", "a/google/protobuf/x.h"));
  EXPECT_FALSE(glob_match("google", "a/google2/x.h"));
  EXPECT_FALSE(glob_match("", "a"));
}

TEST(Text, Glob_FolderWithSlashTakesItsContent) {
  EXPECT_TRUE(glob_match("ATen/ops", "ATen/ops/add.h"));
  EXPECT_FALSE(glob_match("ATen/ops", "ATen/ops2/add.h"));
  EXPECT_FALSE(glob_match("ATen/ops", "x/ATen/ops/add.h"));
  EXPECT_TRUE(glob_match("build/", "x/build/y"));
  EXPECT_FALSE(glob_match("build/", "x/build")) << "a file, not a folder";
}

TEST(Text, Glob_ManyStarsStayFast) {
  const std::string pattern = "a/" + std::string("*a*a*a*a*a*a*a*a*a*a") + "b";
  EXPECT_FALSE(glob_match(pattern, "a/" + std::string(5000, 'a')));
  std::string deep;
  for (int i = 0; i < 200; ++i) deep += "a/";
  EXPECT_FALSE(glob_match("**/a/**/a/**/a/**/a/**/b?", deep));
}

}  // namespace
}  // namespace capstan
