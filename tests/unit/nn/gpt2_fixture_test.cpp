// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// GPT-2 against numbers recorded from Hugging Face (tests/fixtures/nn/make_gpt2_fixture.py), whose
// files hold the matrices transposed and q, k, v in one.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "capstan/ops/path.h"
#include "capstan/plan/family.h"
#include "unit/nn/hugging_face.h"

namespace capstan::nn {
namespace {

using at::Tensor;

constexpr testing::Tolerance kFp64{1e-11, 1e-11}, kFp32{1e-4, 4e-6};

// The tensor of one of our parameters; `what` is "weight." or "gradient.".
Tensor from_file(const std::map<std::string, Tensor>& file, const std::string& what,
                 const std::string& name) {
  const bool is_matrix = name.ends_with(".weight") && name.find(".ln_") == std::string::npos;
  int64_t third = 0;
  for (const char* part : {"q_proj", "k_proj", "v_proj"}) {
    if (const size_t at = name.find(part); at != std::string::npos) {
      const Tensor all = file.at(what + std::string(name).replace(at, 6, "c_attn"));
      return (is_matrix ? all.t() : all).chunk(3)[third];
    }
    ++third;
  }
  const bool is_transposed = is_matrix && name.find(".h.") != std::string::npos;
  const Tensor value = file.at(what + name);
  return is_transposed ? value.t() : value;
}

class HuggingFaceGpt2 : public ::testing::TestWithParam<std::tuple<at::ScalarType, ops::Path>> {};

TEST_P(HuggingFaceGpt2, LogitsLossAndEveryGradient) {
  const auto& [dtype, form] = GetParam();
  const ops::PathGuard guard(form);
  const auto fixture =
      read_tiny_safetensors(CAPSTAN_SOURCE_DIR "/tests/fixtures/nn/gpt2_tiny.safetensors");
  const plan::ModelShape s = plan::from_hf_config(fixture.metadata.at("config"), "gpt2_tiny");
  int64_t in_file = 0;
  for (const auto& [name, tensor] : fixture.tensors)
    if (name.starts_with("weight.")) in_file += tensor.numel();
  ASSERT_EQ(plan::count_parameters(plan::find_family("gpt2").param_table(s)), in_file);
  expect_recorded(fixture, s, dtype, dtype == at::kDouble ? kFp64 : kFp32,
                  [&](const std::string& what, const std::string& name) {
                    return from_file(fixture.tensors, what, name);
                  });
}

INSTANTIATE_TEST_SUITE_P(Precisions, HuggingFaceGpt2,
                         ::testing::Combine(::testing::Values(at::kDouble, at::kFloat),
                                            ::testing::Values(ops::Path::kFused,
                                                              ops::Path::kReference)),
                         [](const auto& instance) {
                           return std::string(at::toString(std::get<0>(instance.param))) +
                                  (std::get<1>(instance.param) == ops::Path::kFused ? "Fused"
                                                                                    : "Reference");
                         });

}  // namespace
}  // namespace capstan::nn
