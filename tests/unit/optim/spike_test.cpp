// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/optim/spike.h"

#include <gtest/gtest.h>

#include <cmath>

namespace capstan::optim {
namespace {

double noisy(int i) { return 3.0 + 0.01 * std::sin(1.7 * i); }

// Feeds `count` ordinary steps.
SpikeDetector trained(int count, int64_t window = 32) {
  SpikeDetector d({.sigma = 6.0, .window = window});
  for (int i = 0; i < count; ++i) EXPECT_FALSE(d.is_spike(noisy(i), noisy(i + 5))) << i;
  return d;
}

TEST(Spike, LossOrNormFarAboveTheWindow_IsASpike) {
  EXPECT_TRUE(trained(40).is_spike(300, noisy(41)));
  EXPECT_TRUE(trained(40).is_spike(noisy(41), 300));
  EXPECT_FALSE(trained(40).is_spike(0.5, noisy(41)));  // below is no spike
}

TEST(Spike, OneSpike_DoesNotHideTheNext) {
  auto d = trained(40);
  EXPECT_TRUE(d.is_spike(300, noisy(0)));
  EXPECT_TRUE(d.is_spike(300, noisy(1)));
  EXPECT_FALSE(d.is_spike(noisy(2), noisy(2)));
}

TEST(Spike, NewLevel_IsAcceptedInTheEnd) {
  auto d = trained(40);
  int skipped = 0;
  for (int i = 0; i < 200; ++i) skipped += d.is_spike(4.0 + noisy(i), noisy(i)) ? 1 : 0;
  EXPECT_GT(skipped, 0);
  EXPECT_LT(skipped, 100);
}

TEST(Spike, BeforeHalfAWindow_NoVerdict) {
  auto d = trained(15);
  EXPECT_FALSE(d.is_spike(300, 300));
}

TEST(Spike, FallingLossAndSlowDrift_AreNoSpikes) {
  SpikeDetector d({.sigma = 6.0, .window = 32});
  for (int i = 0; i < 300; ++i) EXPECT_FALSE(d.is_spike(10.0 / (1 + 0.1 * i), 1.0)) << i;
  SpikeDetector slow({.sigma = 6.0, .window = 32});
  for (int i = 0; i < 300; ++i) EXPECT_FALSE(slow.is_spike(noisy(i) + 0.001 * i, 1.0)) << i;
}

TEST(Spike, ConstantValues_SurviveRounding) {
  SpikeDetector d({.sigma = 3.0, .window = 8});
  for (int i = 0; i < 20; ++i) EXPECT_FALSE(d.is_spike(2.0 + 1e-12 * (i % 3), 1.0));
}

TEST(Spike, WithoutSigma_Never) {
  SpikeDetector d({.sigma = {}, .window = 8});
  for (int i = 0; i < 20; ++i) EXPECT_FALSE(d.is_spike(1, 1));
  EXPECT_FALSE(d.is_spike(1e9, 1e9));
  EXPECT_TRUE(d.losses().empty());
}

TEST(Spike, Restored_DecidesTheSame) {
  auto a = trained(50);
  SpikeDetector b({.sigma = 6.0, .window = 32});
  b.restore(a.losses(), a.norms());
  EXPECT_EQ(a.is_spike(3.05, 3.0), b.is_spike(3.05, 3.0));
  EXPECT_EQ(a.losses(), b.losses());
}

TEST(Spike, LongerSavedWindow_IsCutToTheNewest) {
  SpikeDetector d({.sigma = 6.0, .window = 3});
  d.restore({1, 2, 3, 4, 5}, {1, 2});
  EXPECT_EQ(d.losses(), (std::vector<double>{3, 4, 5}));
}

}  // namespace
}  // namespace capstan::optim
