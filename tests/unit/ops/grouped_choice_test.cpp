// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/ops/grouped_choice.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace capstan::ops {
namespace {

using ::testing::HasSubstr;

const GroupedCase kOnGpu{.on_cpu = false,
                         .has_order = true,
                         .has_products = true,
                         .dtype = at::kBFloat16,
                         .groups = 8,
                         .hidden = 64,
                         .features = 24,
                         .adds_wide = true};

GroupedChoice choose(void (*change)(GroupedCase&)) {
  GroupedCase c = kOnGpu;
  change(c);
  return choose_grouped(c);
}

TEST(GroupedChoice, GpusTakeOneProductWhereItIsRight) {
  EXPECT_EQ(choose_grouped(kOnGpu).form, GroupedForm::kGrouped);
  EXPECT_TRUE(choose_grouped(kOnGpu).reason.empty());
  const auto form = [](void (*change)(GroupedCase&)) { return choose(change).form; };
  EXPECT_EQ(form([](auto& c) { c.groups = 1023; }), GroupedForm::kGrouped);
  EXPECT_EQ(form([](auto& c) { c.features = 8; }), GroupedForm::kGrouped);
}

TEST(GroupedChoice, TheLoopSaysWhyAndWhatToChange) {
  const auto expect = [](void (*change)(GroupedCase&), const char* reason, const char* fix) {
    const GroupedChoice choice = choose(change);
    EXPECT_EQ(choice.form, GroupedForm::kLoop) << reason;
    EXPECT_THAT(choice.reason, HasSubstr(reason));
    EXPECT_THAT(choice.fix, HasSubstr(fix));
  };
  expect([](auto& c) { c.path = Path::kReference; }, "CAPSTAN_OPS", "Unset");
  expect([](auto& c) { c.has_order = false; }, "by the host", "");
  expect(
      [](auto& c) {
        c.has_products = false;
        c.dtype = at::kFloat;
      },
      "not in fp32", "precision.compute: bf16");
  expect([](auto& c) { c.has_products = false; }, "compute capability 9.0", "");
  expect([](auto& c) { c.same_type = false; }, "another type", "precision.keep_fp32");
  expect([](auto& c) { c.groups = 1024; }, "1024 experts", "parallel.expert");
  expect([](auto& c) { c.hidden = 68; },
         "rows of 68 numbers, a grouped product takes multiples of 8", "model.hidden_size");
  expect([](auto& c) { c.features = 20; }, "experts of 20", "model.experts.intermediate_size");
}

TEST(GroupedChoice, GradientsAreRoundedWhereNoProductForEachAddsThem) {
  const auto rounding = [](void (*change)(GroupedCase&)) { return choose(change).rounding; };
  EXPECT_THAT(rounding([](auto&) {}), HasSubstr("only the device knows the rows"));
  EXPECT_EQ(rounding([](auto& c) { c.knows_rows = true; }), "");
  // A loop knows them.
  EXPECT_EQ(rounding([](auto& c) { c.has_products = false; }), "");
  EXPECT_EQ(rounding([](auto& c) { c.same_type = false; }), "");
  EXPECT_THAT(rounding([](auto& c) {
                c.path = Path::kReference;
                c.adds_wide = false;
              }),
              HasSubstr("CAPSTAN_OPS"));
  // Nothing is narrower than its buffer.
  EXPECT_EQ(rounding([](auto& c) { c.dtype = at::kDouble; }), "");
  const auto on_cpu = [](at::ScalarType type, bool adds_wide) {
    return choose_grouped({.dtype = type, .adds_wide = adds_wide}).rounding;
  };
  EXPECT_EQ(on_cpu(at::kBFloat16, true), "");
  EXPECT_EQ(on_cpu(at::kFloat, false), "");
  EXPECT_THAT(on_cpu(at::kHalf, false), HasSubstr("but with AMX"));
}

TEST(GroupedChoice, CpusTakeTheLoopAsAMatterOfCourse) {
  const GroupedChoice choice = choose_grouped({.groups = 8, .hidden = 64, .features = 24});
  EXPECT_EQ(choice.form, GroupedForm::kLoop);
  EXPECT_TRUE(choice.reason.empty() && choice.fix.empty());
  EXPECT_TRUE(grouped_case(at::kCPU, at::kBFloat16, 8).on_cpu);
}

}  // namespace
}  // namespace capstan::ops
