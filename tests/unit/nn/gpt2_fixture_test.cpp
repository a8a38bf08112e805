// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// GPT-2 against numbers recorded from Hugging Face (tests/fixtures/nn/make_gpt2_fixture.py), whose
// files hold the matrices transposed and q, k, v in one.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>

#include "capstan/ops/path.h"
#include "support/gradient_check.h"
#include "unit/nn/plain_llama.h"
#include "unit/nn/tiny_safetensors.h"

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
  testing::PlainStore store(plan::find_family("gpt2").param_table(s),
                            {.values = dtype, .gradients = dtype});
  int64_t elements = 0, in_file = 0;
  for (const auto& spec : store.table()) {
    store.value_of(spec.name).copy_(from_file(fixture.tensors, "weight.", spec.name));
    elements += plan::numel(spec.shape);
  }
  for (const auto& [name, tensor] : fixture.tensors)
    if (name.starts_with("weight.")) in_file += tensor.numel();
  ASSERT_EQ(elements, in_file);
  const Model model =
      build_model(s, {dtype, dtype}, [&](const std::string& n) { return store.find(n); });
  const Tensor &ids = fixture.tensors.at("ids"), &targets = fixture.tensors.at("targets");
  const double count = static_cast<double>(targets.ne(-100).sum().item<int64_t>());
  const BlockwiseRun run =
      run_blockwise(model, {}, ids, targets, at::full(targets.sizes(), 1 / count, at::kDouble));
  const auto tolerance = dtype == at::kDouble ? kFp64 : kFp32;
  EXPECT_TRUE(testing::near(run.loss.view({1}), fixture.tensors.at("loss"), tolerance));
  for (const auto& spec : store.table())
    EXPECT_TRUE(testing::near(store.gradient_of(spec.name),
                              from_file(fixture.tensors, "gradient.", spec.name), tolerance))
        << spec.name;

  at::NoGradGuard no_grad;
  Seams seams;
  const param::RowMap rows;
  const Context context{.mode = param::Mode::kEval, .rows = &rows};
  BlockIO io = model.embedding->forward(context, seams, ids);
  for (const auto& layer : model.layers) io = layer->forward(context, seams, io);
  EXPECT_TRUE(testing::near(model.head->logits(context, seams, io, ids.size(1)),
                            fixture.tensors.at("logits"), tolerance));
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
