// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Initial values are drawn where the parameter lies, with the host's bits.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "capstan/ops/device_kernels.h"
#include "capstan/ops/init.h"
#include "support/fake_device/fake_device.h"
#include "support/fake_device/fake_kernels.h"

namespace capstan::test {
namespace {

struct Case {
  plan::Shape shape;
  plan::Box box;
  bool equal_runs;
};

std::vector<Case> cases() {
  return {{{37, 29}, {{0, 0}, {37, 29}}, true},      {{37, 29}, {{5, 0}, {9, 29}}, true},
          {{37, 29}, {{5, 3}, {9, 11}}, true},       {{37, 29}, {{5, 3}, {1, 11}}, true},
          {{8, 6, 5}, {{2, 1, 0}, {3, 1, 5}}, true}, {{8, 6, 5}, {{2, 1, 1}, {3, 4, 3}}, false},
          {{8, 6, 5}, {{2, 1, 1}, {3, 0, 3}}, false}};
}

plan::ParamSpec spec_of(const plan::Shape& shape) {
  plan::ParamSpec spec;
  spec.name = "w";
  spec.shape = shape;
  return spec;
}

TEST(FakeDeviceInit, EqualRuns_AreThoseOfTheBox) {
  for (const Case& c : cases())
    EXPECT_EQ(param::equal_runs(c.box, c.shape).has_value(), c.equal_runs);
  const auto runs = param::equal_runs({{5, 3}, {9, 11}}, {37, 29});
  ASSERT_TRUE(runs);
  EXPECT_EQ(runs->first, 5 * 29 + 3);
  EXPECT_EQ(runs->length, 11);
  EXPECT_EQ(runs->stride, 29);
}

// With kernels, and without.
class FakeDeviceInit : public ::testing::TestWithParam<bool> {
 protected:
  void SetUp() override {
    if (GetParam()) ops::install_device_kernels(&fake_kernels());
  }
  void TearDown() override { ops::install_device_kernels(nullptr); }
};

TEST_P(FakeDeviceInit, AnyBox_HasTheBitsOfTheHost) {
  for (const Case& c : cases())
    for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
      const plan::ParamSpec spec = spec_of(c.shape);
      const at::Tensor expected = param::init_values(spec, c.box, 7, "policy", dtype);
      const at::Tensor out =
          at::empty({plan::numel(c.box.extent)}, expected.options().device(fake_device()));
      ops::fill_init_values(out, spec, c.box, 7, "policy");
      EXPECT_TRUE(at::equal(out.cpu(), expected.view(-1)));
    }
}

TEST_P(FakeDeviceInit, Constants) {
  plan::ParamSpec spec = spec_of({6});
  spec.init.kind = plan::Init::Kind::kOnes;
  const at::Tensor out = at::empty({4}, at::TensorOptions(fake_device()));
  ops::fill_init_values(out, spec, {{1}, {4}}, 7, "policy");
  EXPECT_TRUE(at::equal(out.cpu(), at::ones({4})));
}

INSTANTIATE_TEST_SUITE_P(Kernels, FakeDeviceInit, ::testing::Bool());

}  // namespace
}  // namespace capstan::test
