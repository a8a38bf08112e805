// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Against numbers recorded from Hugging Face (tests/fixtures/nn/make_llama_fixture.py).
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "capstan/ops/path.h"
#include "capstan/plan/family.h"
#include "unit/nn/hugging_face.h"

namespace capstan::nn {
namespace {

plan::ModelShape shape_of(const std::string& text) {
  const auto j = nlohmann::json::parse(text);
  plan::ModelShape s;
  s.vocab_size = j.at("vocab_size");
  s.hidden_size = j.at("hidden_size");
  s.intermediate_size = j.at("intermediate_size");
  s.num_hidden_layers = j.at("num_hidden_layers");
  s.num_attention_heads = j.at("num_attention_heads");
  s.num_key_value_heads = j.at("num_key_value_heads");
  s.head_dim = j.at("head_dim");
  s.max_position_embeddings = j.at("max_position_embeddings");
  s.rms_norm_eps = j.at("rms_norm_eps");
  s.rope_theta = j.at("rope_theta");
  s.tie_word_embeddings = j.at("tie_word_embeddings");
  return s;
}

// Hugging Face makes the angles of RoPE in fp32, whatever the model's dtype.
constexpr testing::Tolerance kFp64{1e-6, 5e-7}, kFp32{1e-4, 2e-6};

class HuggingFaceLlama : public ::testing::TestWithParam<std::tuple<at::ScalarType, ops::Path>> {};

TEST_P(HuggingFaceLlama, LogitsLossAndEveryGradient) {
  const auto [dtype, form] = GetParam();
  const ops::PathGuard guard(form);
  const auto fixture =
      read_tiny_safetensors(CAPSTAN_SOURCE_DIR "/tests/fixtures/nn/llama_tiny.safetensors");
  const plan::ModelShape s = shape_of(fixture.metadata.at("shape"));
  expect_recorded(fixture, s, dtype, dtype == at::kDouble ? kFp64 : kFp32,
                  [&](const std::string& what, const std::string& name) {
                    return fixture.tensors.at(what + name);
                  });
}

INSTANTIATE_TEST_SUITE_P(Precisions, HuggingFaceLlama,
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
