// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/optim/grad_norm.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace capstan::optim {
namespace {

using parallel::Shard;

Shard shard_of(const at::Tensor& gradient, std::vector<parallel::ShardRange> ranges) {
  Shard shard;
  shard.gradient = gradient;
  shard.ranges = std::move(ranges);
  return shard;
}

TEST(GradNorm, CountsCountedRangesOnly) {
  const std::vector<Shard> shards{
      shard_of(at::full({256}, 2.0, at::kDouble), {{0, 10, true, true}, {20, 25, false, false}}),
      shard_of(at::full({256}, 3.0, at::kFloat), {{0, 4, true, true}}), Shard{}};
  const auto sums = sum_of_squares(shards);
  EXPECT_EQ(sums.counted, 10 * 4.0 + 4 * 9.0);
  EXPECT_TRUE(sums.is_finite);
}

// Gradients come from the last shard to the first.
TEST(GradNorm, PartsHaveTheBitsOfTheWhole) {
  std::vector<Shard> shards{Shard{}};
  for (int i = 0; i < 5; ++i) {
    const at::Tensor g = at::arange(40000, at::kDouble).mul(0.7 + i).sin();
    shards.push_back(shard_of(g, {{0, 20000, true, true}, {20100, 40000, true, i != 2}}));
  }
  std::vector<SquareParts> parts(shards.size());
  for (size_t i = shards.size(); i-- > 0;) parts[i] = parts_of_squares(shards[i]);
  EXPECT_EQ(add_up(parts).counted, sum_of_squares(shards).counted);
  EXPECT_TRUE(add_up(parts).is_finite);
  shards[3].gradient[20200] = std::numeric_limits<double>::quiet_NaN();
  parts[3] = parts_of_squares(shards[3]);  // not counted, but seen
  EXPECT_FALSE(add_up(parts).is_finite);
}

TEST(GradNorm, NonFiniteElementsOfUncountedRanges_AreSeen) {
  at::Tensor g = at::zeros({256}, at::kFloat);
  g[21] = std::numeric_limits<float>::infinity();
  const std::vector<Shard> shards{shard_of(g, {{0, 10, true, true}, {20, 25, true, false}})};
  const auto sums = sum_of_squares(shards);
  EXPECT_EQ(sums.counted, 0);
  EXPECT_FALSE(sums.is_finite);
}

TEST(GradNorm, LargeFp32Values_DoNotOverflow) {
  EXPECT_NEAR(sum_of_squares(at::full({100}, 1e30, at::kFloat)) / 1e62, 1.0, 1e-7);
}

TEST(GradNorm, SameBitsForAnyThreadCount_CloseToFp64Sum) {
  const int before = at::get_num_threads();
  for (const auto type : {at::kDouble, at::kFloat, at::kBFloat16}) {
    const at::Tensor g = at::arange(150001, at::kDouble).mul(0.7).sin().to(type);
    at::set_num_threads(1);
    const double one = sum_of_squares(g);
    at::set_num_threads(2);
    const double two = sum_of_squares(g);
    EXPECT_EQ(one, two);
    const double expected = g.to(at::kDouble).square().sum().item<double>();
    EXPECT_NEAR(one / expected, 1.0, 1e-13);
  }
  at::set_num_threads(before);
}

TEST(GradNorm, ClipFactor_NeverAmplifies) {
  EXPECT_EQ(clip_factor(0.5, 1.0), 1.0);
  EXPECT_NEAR(clip_factor(4.0, 1.0), 0.25, 1e-6);
}

}  // namespace
}  // namespace capstan::optim
