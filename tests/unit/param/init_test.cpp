// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/param/init.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include "capstan/base/error.h"
#include "capstan/base/philox.h"

namespace capstan::param {
namespace {

plan::ParamSpec spec_of(plan::Shape shape, const std::string& name = "w") {
  plan::ParamSpec spec;
  spec.name = name;
  spec.shape = std::move(shape);
  spec.init = {plan::Init::Kind::kNormal, 0.02};
  return spec;
}

at::Tensor part_of(const at::Tensor& whole, const plan::Box& box) {
  at::Tensor part = whole;
  for (size_t d = 0; d < box.begin.size(); ++d)
    part = part.narrow(static_cast<int64_t>(d), box.begin[d], box.extent[d]);
  return part;
}

plan::Box whole_of(const plan::ParamSpec& spec) {
  return {std::vector<int64_t>(spec.shape.size(), 0), spec.shape};
}

TEST(InitValues, AnyBox_HoldsTheNumbersOfTheWhole) {
  for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
    const auto spec = spec_of({37, 5, 29});
    const at::Tensor whole = init_values(spec, whole_of(spec), 7, "policy", dtype);
    ASSERT_EQ(whole.scalar_type(), dtype);
    for (const plan::Box& box :
         {plan::Box{{0, 0, 0}, {37, 5, 29}}, plan::Box{{3, 0, 0}, {9, 5, 29}},
          plan::Box{{30, 1, 0}, {7, 3, 29}}, plan::Box{{36, 4, 28}, {1, 1, 1}},
          plan::Box{{2, 0, 3}, {20, 5, 11}}, plan::Box{{5, 2, 0}, {1, 3, 29}},
          plan::Box{{5, 2, 1}, {0, 3, 4}}}) {
      const at::Tensor part = init_values(spec, box, 7, "policy", dtype);
      EXPECT_EQ(part.sizes().vec(), box.extent);
      EXPECT_TRUE(at::equal(part, part_of(whole, box)));
    }
  }
}

TEST(InitValues, IsAFunctionOfSeedModelNameAndIndex) {
  const auto spec = spec_of({64, 64});
  const at::Tensor values = init_values(spec, whole_of(spec), 7, "policy", at::kDouble);
  EXPECT_TRUE(at::equal(values, init_values(spec, whole_of(spec), 7, "policy", at::kDouble)));
  EXPECT_FALSE(at::equal(values, init_values(spec, whole_of(spec), 8, "policy", at::kDouble)));
  EXPECT_FALSE(at::equal(values, init_values(spec, whole_of(spec), 7, "teacher", at::kDouble)));
  const auto other = spec_of({64, 64}, "v");
  EXPECT_FALSE(at::equal(values, init_values(other, whole_of(other), 7, "policy", at::kDouble)));
  const uint64_t stream = philox::stream_of("init", "policy/w");
  EXPECT_EQ(values.view({-1})[1234].item<double>(), 0.02 * philox::normal(7, stream, 1234));
}

TEST(InitValues, ThreadsDoNotChangeThem) {
  const auto spec = spec_of({300, 1111});
  const int before = at::get_num_threads();
  at::set_num_threads(1);
  const at::Tensor one = init_values(spec, whole_of(spec), 3, "policy");
  at::set_num_threads(4);
  const at::Tensor four = init_values(spec, whole_of(spec), 3, "policy");
  at::set_num_threads(before);
  EXPECT_TRUE(at::equal(one, four));
}

TEST(InitValues, HaveTheirMeanAndDeviation) {
  const auto spec = spec_of({512, 512});
  const at::Tensor values = init_values(spec, whole_of(spec), 11, "policy", at::kDouble);
  EXPECT_NEAR(values.mean().item<double>(), 0, 5 * 0.02 / 512);
  EXPECT_NEAR(values.std().item<double>(), 0.02, 0.02 * 0.01);
}

TEST(InitValues, ConstantsAndWrongBoxes) {
  auto spec = spec_of({6});
  spec.init.kind = plan::Init::Kind::kOnes;
  EXPECT_TRUE(at::equal(init_values(spec, {{2}, {3}}, 1, "policy"), at::ones({3})));
  spec.init.kind = plan::Init::Kind::kZeros;
  EXPECT_TRUE(at::equal(init_values(spec, {{0}, {6}}, 1, "policy"), at::zeros({6})));
  EXPECT_THROW((void)init_values(spec, {{4}, {3}}, 1, "policy"), InternalError);
  EXPECT_THROW((void)init_values(spec, {{0, 0}, {3, 1}}, 1, "policy"), InternalError);
}

}  // namespace
}  // namespace capstan::param
