// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/optim/loss_scale.h"

#include <gtest/gtest.h>

namespace capstan::optim {
namespace {

TEST(LossScale, HalvesOnNonFinite_DoublesAfterTwoThousandGoodSteps) {
  LossScale scale({.dynamic = true, .start = kFirstLossScale});
  for (int i = 0; i < 1999; ++i) scale.update(true);
  scale.update(false);
  EXPECT_EQ(scale.value(), 32768.0);
  for (int i = 0; i < 1999; ++i) scale.update(true);
  EXPECT_EQ(scale.value(), 32768.0);
  scale.update(true);
  EXPECT_EQ(scale.value(), 65536.0);
  EXPECT_EQ(scale.good_steps(), 0);
}

TEST(LossScale, StaysWithinItsBounds) {
  LossScale scale({.dynamic = true, .start = 2.0, .interval = 1, .largest = 8.0});
  for (int i = 0; i < 9; ++i) scale.update(true);
  EXPECT_EQ(scale.value(), 8.0);
  for (int i = 0; i < 9; ++i) scale.update(false);
  EXPECT_EQ(scale.value(), 1.0);
}

TEST(LossScale, FixedScale_NeverMoves) {
  LossScale scale({.start = 128.0});
  scale.update(false);
  scale.restore(4.0, 3);
  EXPECT_EQ(scale.value(), 128.0);
}

TEST(LossScale, Restore_ContinuesTheCount) {
  LossScale scale({.dynamic = true, .start = kFirstLossScale});
  scale.restore(1024.0, 1999);
  scale.update(true);
  EXPECT_EQ(scale.value(), 2048.0);
}

}  // namespace
}  // namespace capstan::optim
