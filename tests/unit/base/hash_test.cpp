// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/base/hash.h"

#include <gtest/gtest.h>

#include <utility>

namespace capstan {
namespace {

// Expected values: the xxhash package of Python (xxh3_64_hexdigest, xxh3_128_hexdigest).
TEST(Hash, KnownAnswers) {
  EXPECT_EQ(hex64(xxh3_64("")), "2d06800538d394c2");
  EXPECT_EQ(xxh3_128_hex(""), "99aa06d3014798d86001c324468d497f");
  EXPECT_EQ(hex64(xxh3_64("abc")), "78af5f94892f3950");
  EXPECT_EQ(hex64(xxh3_64("abc", 7)), "48ff56f569e39912");
  EXPECT_EQ(xxh3_128_hex("abc"), "06b05ab6733a618578af5f94892f3950");
  EXPECT_EQ(xxh3_128_hex(std::string(100000, 'x')), "0fe996a84987456bd8b99a30e426ac41");
}

TEST(Hash, Streaming_EqualsOneCall) {
  std::string text;
  for (int i = 0; i < 5000; ++i) text += static_cast<char>(i * 31);
  Hasher hasher;
  for (size_t at = 0, step = 1; at < text.size(); at += step, step = step * 2 + 1) {
    hasher.update(std::string_view(text).substr(at, step));
  }
  EXPECT_EQ(hasher.hex(), xxh3_128_hex(text));
  EXPECT_EQ(hasher.hex(), xxh3_128_hex(text)) << "hex() must not change the state";
  Hasher moved = std::move(hasher);
  moved.update("more");
  EXPECT_EQ(moved.hex(), xxh3_128_hex(text + "more"));
}

TEST(Hash, Hex64_KeepsLeadingZeros) { EXPECT_EQ(hex64(0xAB), "00000000000000ab"); }

}  // namespace
}  // namespace capstan
