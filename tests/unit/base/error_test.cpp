// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/base/error.h"

#include <gtest/gtest.h>

#include "capstan/base/check.h"

namespace capstan {
namespace {

TEST(Error, AllParts_ReadAsOneSentence) {
  EXPECT_EQ(format_error({.module = "data",
                          .what = "reading corpus.bin",
                          .got = "12 bytes",
                          .need = "16 bytes",
                          .why = "the index says so",
                          .fix = "Prepare it again"}),
            "[data] reading corpus.bin failed: got 12 bytes, need 16 bytes (the index says so). "
            "Prepare it again.");
}

TEST(Error, EmptyParts_AreLeftOut) {
  EXPECT_EQ(format_error({.what = "saving"}), "saving failed.");
  EXPECT_EQ(format_error({.module = "comm", .what = "a barrier", .got = "a timeout"}),
            "[comm] a barrier failed: got a timeout.");
  EXPECT_EQ(format_error({.module = "comm", .what = "a barrier", .need = "4 ranks"}),
            "[comm] a barrier failed: need 4 ranks.");
}

TEST(Error, TextThatSaysFailure_GetsNoSecondOne) {
  EXPECT_EQ(format_error({.what = "cannot open x"}), "cannot open x.");
  EXPECT_EQ(format_error({.what = "the save failed", .got = "EIO"}), "the save failed: got EIO.");
  EXPECT_EQ(format_error({.what = "resume refused"}), "resume refused.");
}

TEST(Error, Classes_HaveTheirExitCodes) {
  const auto codes = [](const Error& error) {
    return std::pair(error.exit_code(), error.run_exit_code());
  };
  EXPECT_EQ(codes(ConfigError("x")), std::pair(2, 2));
  EXPECT_EQ(codes(EnvError("x")), std::pair(1, 91));
  EXPECT_EQ(codes(DataError("x")), std::pair(94, 94));
  EXPECT_EQ(codes(DivergenceError("x")), std::pair(93, 93));
  EXPECT_EQ(codes(InternalError("x")), std::pair(1, 91));
}

TEST(Check, Failure_NamesConditionFileAndMessage) {
  const int ranks = 3;
  CAPSTAN_CHECK(ranks == 3, "never formatted {}", ranks);
  try {
    CAPSTAN_CHECK(ranks == 4, "got {} ranks", ranks);
    FAIL() << "no exception";
  } catch (const InternalError& error) {
    const std::string text = error.what();
    EXPECT_NE(text.find("'ranks == 4'"), std::string::npos) << text;
    EXPECT_NE(text.find("error_test.cpp:"), std::string::npos) << text;
    EXPECT_NE(text.find("got 3 ranks"), std::string::npos) << text;
  }
}

}  // namespace
}  // namespace capstan
