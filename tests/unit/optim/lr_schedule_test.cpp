// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/optim/lr_schedule.h"

#include <gtest/gtest.h>

#include <cmath>

#include "capstan/base/error.h"

namespace capstan::optim {
namespace {

recipe::LrSchedule recipe_of(const std::string& kind, int64_t warmup,
                             std::optional<int64_t> decay = {}, double min_ratio = 0.1) {
  recipe::LrSchedule r;
  r.kind = kind;
  r.warmup = warmup;
  r.decay = decay;
  r.min_ratio = min_ratio;
  return r;
}

double factor(const recipe::LrSchedule& r, int64_t step, int64_t total = 100) {
  return lr_of_step(make_lr_schedule(r, 2.0, total, 64), step - 1) / 2.0;  // step counts from 1
}

TEST(LrSchedule, Warmup_IsLinearAndStartsAboveZero) {
  for (const char* kind : {"constant", "linear", "cosine", "inverse_sqrt"}) {
    EXPECT_DOUBLE_EQ(factor(recipe_of(kind, 10), 1), 0.1) << kind;
    EXPECT_DOUBLE_EQ(factor(recipe_of(kind, 10), 5), 0.5) << kind;
    EXPECT_DOUBLE_EQ(factor(recipe_of(kind, 10), 10), 1.0) << kind;
  }
}

TEST(LrSchedule, Constant_StaysAtThePeak) {
  EXPECT_DOUBLE_EQ(factor(recipe_of("constant", 0), 1), 1.0);
  EXPECT_DOUBLE_EQ(factor(recipe_of("constant", 10), 100), 1.0);
}

TEST(LrSchedule, Linear_FallsToMinRatioAtTheLastStep) {
  EXPECT_DOUBLE_EQ(factor(recipe_of("linear", 20), 60), 0.55);
  EXPECT_DOUBLE_EQ(factor(recipe_of("linear", 20), 100), 0.1);
  EXPECT_DOUBLE_EQ(factor(recipe_of("linear", 20, 40), 60), 0.1);
  EXPECT_DOUBLE_EQ(factor(recipe_of("linear", 20, 40), 90), 0.1);
}

TEST(LrSchedule, Cosine_GivesTheClosedForm) {
  const auto r = recipe_of("cosine", 20);
  EXPECT_DOUBLE_EQ(factor(r, 60), 0.55);
  EXPECT_NEAR(factor(r, 40), 0.1 + 0.9 * (1 + std::sqrt(0.5)) / 2, 1e-15);
  EXPECT_DOUBLE_EQ(factor(r, 100), 0.1);
  EXPECT_DOUBLE_EQ(factor(r, 101), 0.1);
}

TEST(LrSchedule, Wsd_HoldsThenFallsInTheLastPhase) {
  const auto r = recipe_of("wsd", 10, 20);
  EXPECT_DOUBLE_EQ(factor(r, 11), 1.0);
  EXPECT_DOUBLE_EQ(factor(r, 80), 1.0);
  EXPECT_DOUBLE_EQ(factor(r, 90), 0.55);
  EXPECT_DOUBLE_EQ(factor(r, 100), 0.1);
}

TEST(LrSchedule, InverseSqrt_FallsFromTheEndOfWarmup) {
  EXPECT_DOUBLE_EQ(factor(recipe_of("inverse_sqrt", 16), 64), 0.5);
  EXPECT_DOUBLE_EQ(factor(recipe_of("inverse_sqrt", 0), 4), 0.5);
  EXPECT_DOUBLE_EQ(factor(recipe_of("inverse_sqrt", 1, {}, 0.2), 100), 0.2);
}

TEST(LrSchedule, TokensAsUnit_GiveTheRatesOfTheSameSteps) {
  auto in_tokens = recipe_of("cosine", 20 * 64);
  in_tokens.unit = "tokens";
  for (int64_t step = 1; step <= 100; ++step)
    EXPECT_NEAR(factor(in_tokens, step), factor(recipe_of("cosine", 20), step), 1e-15);
}

TEST(LrSchedule, RunShorterThanWarmup_NeverReachesThePeak) {
  EXPECT_DOUBLE_EQ(factor(recipe_of("cosine", 200), 100), 0.5);
}

TEST(LrSchedule, LengthsThatDoNotFit_AreRefused) {
  const auto message = [](const recipe::LrSchedule& r) -> std::string {
    try {
      (void)make_lr_schedule(r, 1, 100, 1);
    } catch (const ConfigError& e) {
      return e.what();
    }
    return {};
  };
  EXPECT_NE(message(recipe_of("wsd", 10)).find("lr_schedule.decay"), std::string::npos);
  EXPECT_NE(message(recipe_of("wsd", 60, 50)).find("warmup 60 + decay 50"), std::string::npos);
  EXPECT_NE(message(recipe_of("step", 0)).find("'step'"), std::string::npos);
}

}  // namespace
}  // namespace capstan::optim
