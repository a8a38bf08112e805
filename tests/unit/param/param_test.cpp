// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/param/param.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <limits>

#include "capstan/base/error.h"
#include "support/gradient_check.h"
#include "support/plain_store.h"

namespace capstan::param {
namespace {

using testing::normal;
using testing::PlainStore;

TEST(AddToSlot, OverwriteIgnoresWhatTheBufferHolds) {
  GradSlot slot{at::full({3, 5}, std::numeric_limits<double>::quiet_NaN()), true};
  const Tensor g = normal({3, 5}, 1);
  add_to_slot(slot, g);
  EXPECT_TRUE(testing::near(slot.buffer, g));
  EXPECT_FALSE(slot.overwrite);
  add_to_slot(slot, g);
  EXPECT_TRUE(testing::near(slot.buffer, 2 * g));
}

TEST(AddToSlot, Bf16IntoFp32IsExact) {
  for (const int64_t n : {1, 7, 31, 70000}) {
    const Tensor start = normal({n}, 2, at::kFloat), g = normal({n}, 3, at::kBFloat16);
    GradSlot slot{start.clone(), false};
    add_to_slot(slot, g);
    EXPECT_TRUE(at::equal(slot.buffer, start + g.to(at::kFloat)));
  }
}

TEST(AddToSlot, EveryDtypePairAndStridedInput) {
  for (const auto from : {at::kFloat, at::kBFloat16, at::kHalf, at::kDouble})
    for (const auto to : {at::kFloat, at::kDouble, at::kBFloat16}) {
      const Tensor g = normal({6, 4}, 4, from).t();
      GradSlot slot{at::ones({4, 6}, to), false};
      add_to_slot(slot, g);
      EXPECT_TRUE(testing::near(slot.buffer, at::ones({4, 6}, to) + g.to(to)));
    }
}

TEST(AddToSlot, WrongSizeIsRefused) {
  GradSlot slot{at::zeros({4}), false};
  EXPECT_THROW(add_to_slot(slot, at::zeros({5})), InternalError);
}

std::vector<plan::ParamSpec> three_parts() {
  std::vector<plan::ParamSpec> table(3);
  const int64_t rows[] = {4, 2, 3};
  for (int i = 0; i < 3; ++i) {
    table[i].name = "part" + std::to_string(i);
    table[i].shape = {rows[i], 5};
    table[i].fuse_group = 0;
  }
  return table;
}

class ProjectionTest : public ::testing::TestWithParam<bool> {};

TEST_P(ProjectionTest, JoinsRowsInOrderOfTheParts) {
  PlainStore store(three_parts(), {.joined = GetParam()});
  const Projection p{{store.find("part0"), store.find("part1"), store.find("part2")}, {}};
  const Tensor w = p.weight();
  EXPECT_EQ(w.sizes(), (std::vector<int64_t>{9, 5}));
  EXPECT_TRUE(at::equal(w.narrow(0, 4, 2), store.value_of("part1")));
  EXPECT_FALSE(p.bias_value().defined());
  EXPECT_TRUE(p.trainable());

  const Tensor g = normal({9, 5}, 5);
  p.accumulate([&](GradSlot& slot) { add_to_slot(slot, g); });
  p.accumulate([&](GradSlot& slot) { add_to_slot(slot, g); });
  EXPECT_TRUE(testing::near(store.gradient_of("part0"), 2 * g.narrow(0, 0, 4)));
  EXPECT_TRUE(testing::near(store.gradient_of("part2"), 2 * g.narrow(0, 6, 3)));
}

TEST_P(ProjectionTest, FrozenPartsTakeNoGradient) {
  PlainStore store(three_parts(), {.joined = GetParam(), .frozen = {"part0", "part1", "part2"}});
  const Projection p{{store.find("part0"), store.find("part1"), store.find("part2")}, {}};
  EXPECT_FALSE(p.trainable());
  EXPECT_FALSE(p.anchor().requires_grad());
  p.accumulate([](GradSlot&) { FAIL() << "a frozen parameter got a gradient"; });
}

INSTANTIATE_TEST_SUITE_P(Storage, ProjectionTest, ::testing::Bool(), [](const auto& instance) {
  return std::string(instance.param ? "OneTensor" : "SeparateTensors");
});

TEST(Projection, MixedOrForeignPartsAreRefused) {
  PlainStore store(three_parts(), {.frozen = {"part1"}}), other(three_parts(), {});
  const Projection mixed{{store.find("part0"), store.find("part1")}, {}};
  EXPECT_THROW((void)mixed.weight(), InternalError);
  const Projection foreign{{store.find("part0"), other.find("part1")}, {}};
  EXPECT_THROW((void)foreign.weight(), InternalError);
  EXPECT_THROW((void)Projection{}.weight(), InternalError);
}

}  // namespace
}  // namespace capstan::param
