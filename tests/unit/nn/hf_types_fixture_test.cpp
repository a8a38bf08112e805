// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Models by their config.json against numbers recorded from Hugging Face, in fp64 throughout
// (tests/fixtures/nn/make_mixtral_fixture.py, make_qwen_fixture.py).
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "capstan/ops/path.h"
#include "capstan/plan/family.h"
#include "unit/nn/hugging_face.h"

namespace capstan::nn {
namespace {

constexpr testing::Tolerance kFp64{1e-11, 1e-11}, kFp32{1e-4, 4e-6};

using Case = std::tuple<const char*, at::ScalarType, ops::Path>;
class HuggingFaceTypes : public ::testing::TestWithParam<Case> {};

TEST_P(HuggingFaceTypes, LogitsLossAndEveryGradient) {
  const auto& [type, dtype, form] = GetParam();
  const ops::PathGuard guard(form);
  const auto fixture = read_tiny_safetensors(std::string(CAPSTAN_SOURCE_DIR "/tests/fixtures/nn/") +
                                             type + "_tiny.safetensors");
  const plan::ModelShape s = plan::from_hf_config(fixture.metadata.at("config"), type);
  ASSERT_EQ(fixture.tensors.size(), 4 + 2 * plan::find_family(s.family).param_table(s).size());
  expect_recorded(fixture, s, dtype, dtype == at::kDouble ? kFp64 : kFp32,
                  [&](const std::string& what, const std::string& name) {
                    return fixture.tensors.at(what + name);
                  });
}

INSTANTIATE_TEST_SUITE_P(
    Families, HuggingFaceTypes,
    ::testing::Combine(::testing::Values("mixtral", "qwen2_moe", "qwen2", "qwen3"),
                       ::testing::Values(at::kDouble, at::kFloat),
                       ::testing::Values(ops::Path::kFused, ops::Path::kReference)),
    [](const auto& instance) {
      return std::string(std::get<0>(instance.param)) + at::toString(std::get<1>(instance.param)) +
             (std::get<2>(instance.param) == ops::Path::kFused ? "Fused" : "Reference");
    });

}  // namespace
}  // namespace capstan::nn
