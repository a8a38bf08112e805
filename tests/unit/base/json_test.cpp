// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/base/json.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "capstan/base/error.h"

namespace capstan::json {
namespace {

using testing::HasSubstr;

std::string failure(std::string_view text, const Limits& limits = {}) {
  try {
    (void)parse(text, "a.json", limits);
  } catch (const DataError& error) {
    return error.what();
  }
  return "accepted";
}

TEST(Json, GoodText_IsRead) {
  const Json json =
      parse(R"({"a":[1,-2,3.5,true,null,"x\n\u00e9"],"b":{"c":{}},"d":[[],[{}]]})", "a.json");
  EXPECT_EQ(json.dump(), R"({"a":[1,-2,3.5,true,null,"x\n)"
                         "\xc3\xa9"
                         R"("],"b":{"c":{}},"d":[[],[{}]]})");
  EXPECT_EQ(parse("  3 ", "x").get<int>(), 3);
  EXPECT_EQ(parse("18446744073709551615", "x").get<uint64_t>(), UINT64_MAX);
  EXPECT_EQ(parse("-9223372036854775808", "x").get<int64_t>(), INT64_MIN);
}

TEST(Json, DuplicateKeys_AreRefusedWithThePlace) {
  const std::string text = failure("{\"a\": 1,\n  \"a\": 2}");
  EXPECT_THAT(text, HasSubstr("'a' twice"));
  EXPECT_THAT(text, HasSubstr("a.json, line 2 column"));
  EXPECT_EQ(failure(R"({"a":{"a":1},"b":[{"a":1},{"a":2}]})"), "accepted");
}

TEST(Json, Numbers_MustFit) {
  EXPECT_THAT(failure("[18446744073709551616]"), HasSubstr("'18446744073709551616'"));
  EXPECT_THAT(failure("[-9223372036854775809]"), HasSubstr("64 bits"));
  EXPECT_THAT(failure("[1e999]"), HasSubstr("a.json"));
  for (const char* text : {"01", "+1", ".5", "1.", "0x10", "NaN", "Infinity", "1_000"}) {
    EXPECT_THAT(failure(text), HasSubstr("need valid JSON")) << text;
  }
}

TEST(Json, Depth_IsLimited) {
  const auto nested = [](int n) { return std::string(n, '[') + std::string(n, ']'); };
  EXPECT_EQ(failure(nested(64)), "accepted");
  EXPECT_THAT(failure(nested(65)), HasSubstr("more than 64 nested levels"));
  EXPECT_THAT(failure(std::string(1000000, '[')), HasSubstr("nested levels"));
  EXPECT_THAT(failure(R"({"a":{"b":{}}})", {.depth = 2}), HasSubstr("more than 2"));
}

TEST(Json, BrokenText_NamesThePlace) {
  EXPECT_THAT(failure("{\"a\":1,}"), HasSubstr("line 1 column 8"));
  EXPECT_THAT(failure("[1,\n 2"), HasSubstr("line 2"));
  EXPECT_THAT(failure(""), HasSubstr("need valid JSON"));
  EXPECT_THAT(failure("[1] [2]"), HasSubstr("need valid JSON"));
  EXPECT_THAT(failure("[1] // no"), HasSubstr("need valid JSON"));
  EXPECT_THAT(failure("[\"\xff\"]"), HasSubstr("not UTF-8"));
  EXPECT_THAT(failure(R"(["\ud800"])"), HasSubstr("need valid JSON"));
  EXPECT_THAT(failure(std::string_view("[1]\0[2]", 7)), HasSubstr("NUL"));
  EXPECT_THAT(failure("[1,2,3]", {.bytes = 6}), HasSubstr("at most 6 B"));
}

template <class Function>
std::string access_failure(Function&& function) {
  try {
    function();
  } catch (const DataError& error) {
    return error.what();
  }
  return "accepted";
}

TEST(Json, TypedAccess_NamesKeyAndType) {
  const Json json =
      parse(R"({"n":5,"big":18446744073709551615,"x":1.5,"b":true,"s":"t"})", "a.json");
  EXPECT_EQ(get_int(json, "n", 5, 5, "a.json"), 5);
  EXPECT_EQ(get_double(json, "n", "a.json"), 5.0);
  EXPECT_EQ(get_double(json, "x", "a.json"), 1.5);
  EXPECT_TRUE(get_bool(json, "b", "a.json"));
  EXPECT_EQ(get_string(json, "s", "a.json"), "t");
  EXPECT_THAT(access_failure([&] { (void)get_int(json, "n", 6, 9, "a.json"); }),
              HasSubstr("a.json, key 'n' failed: got 5, need an integer from 6 to 9"));
  EXPECT_THAT(access_failure([&] { (void)get_int(json, "big", 0, INT64_MAX, "a.json"); }),
              HasSubstr("got 18446744073709551615"));
  EXPECT_THAT(access_failure([&] { (void)get_int(json, "x", 0, 9, "a.json"); }),
              HasSubstr("got a number"));
  EXPECT_THAT(access_failure([&] { (void)get_int(json, "b", 0, 9, "a.json"); }),
              HasSubstr("got a boolean"));
  EXPECT_THAT(access_failure([&] { (void)get_string(json, "none", "a.json"); }),
              HasSubstr("key 'none' failed: got nothing"));
  EXPECT_THAT(access_failure([&] { (void)get_bool(parse("[1]", "x"), "b", "a.json"); }),
              HasSubstr("got an array, need an object around it"));
}

TEST(Json, Number_RestoresEveryDouble) {
  for (const double value : {0.1, 5.0493, 1e-310, 1.7976931348623157e308, 1.0 / 3, -0.0, 1e22}) {
    EXPECT_EQ(std::strtod(number(value).c_str(), nullptr), value);
    EXPECT_EQ(parse(number(value), "x").get<double>(), value);
  }
  EXPECT_EQ(number(0.1), "0.1");
  EXPECT_EQ(number(std::nan("")), "null");
  EXPECT_EQ(number(-std::numeric_limits<double>::infinity()), "null");
}

}  // namespace
}  // namespace capstan::json
