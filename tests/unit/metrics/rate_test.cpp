// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/metrics/rate.h"

#include <gtest/gtest.h>

#include "capstan/base/bytes.h"

namespace capstan::metrics {
namespace {

TEST(Rate, TokensPerSecond) {
  EXPECT_DOUBLE_EQ(tokens_per_second(2048, 256), 8000);
  EXPECT_EQ(tokens_per_second(2048, 0), 0);
}

TEST(Rate, Mfu_IsAgainstAllRanksAndNoneWithoutPeak) {
  EXPECT_DOUBLE_EQ(model_flops_utilisation(1e6, 4000, 2e9, 4).value(), 0.5);
  EXPECT_EQ(model_flops_utilisation(1e6, 4000, 0, 4), std::nullopt);
  EXPECT_EQ(model_flops_utilisation(0, 4000, 2e9, 4), std::nullopt);
}

TEST(Rate, Meter_LeavesTheFirstStepOut) {
  RateMeter meter;
  EXPECT_EQ(meter.seconds_per_step(), std::nullopt);
  EXPECT_EQ(meter.eta_s(10), std::nullopt);
  meter.add(9.0, 100);
  EXPECT_DOUBLE_EQ(meter.seconds_per_step().value(), 9.0);
  meter.add(1.0, 100);
  meter.add(2.0, 50);
  EXPECT_DOUBLE_EQ(meter.seconds_per_step().value(), 1.5);
  EXPECT_DOUBLE_EQ(meter.tokens_per_s().value(), 50);
  EXPECT_DOUBLE_EQ(meter.eta_s(10).value(), 15);
  EXPECT_DOUBLE_EQ(meter.eta_s(0).value(), 0);
}

TEST(Rate, Meter_ForgetsOldSteps) {
  RateMeter meter;
  for (int i = 0; i < 100; ++i) meter.add(5.0, 10);
  for (int i = 0; i < 32; ++i) meter.add(0.25, 10);
  EXPECT_DOUBLE_EQ(meter.seconds_per_step().value(), 0.25);
}

TEST(Memory, Outcome_IsHeldToItsBar) {
  const MemoryOutcome good = {1000 * kMiB, 950 * kMiB, 0};
  EXPECT_TRUE(is_memory_as_predicted(good));
  EXPECT_DOUBLE_EQ(memory_deviation(good).value(), -0.05);
  EXPECT_FALSE(is_memory_as_predicted({1000 * kMiB, 1101 * kMiB, 0}));
  EXPECT_TRUE(is_memory_as_predicted({10 * kMiB, 26 * kMiB, 0})) << "small runs get 16 MiB";
  EXPECT_FALSE(is_memory_as_predicted({10 * kMiB, 27 * kMiB, 0}));
}

TEST(Memory, Text) {
  EXPECT_EQ(format_memory({612 * kMiB, 598 * kMiB, kGiB}),
            "peak memory: predicted 612 MiB, counted 598 MiB (-2.3 %), resident 1.00 GiB");
  EXPECT_EQ(format_memory({0, 598 * kMiB, 0}), "peak memory: counted 598 MiB");
}

}  // namespace
}  // namespace capstan::metrics
