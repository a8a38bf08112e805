// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Mixtures of experts against numbers recorded from Hugging Face
// (tests/fixtures/nn/make_mixtral_fixture.py).
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

using Case = std::tuple<const char*, at::ScalarType, ops::Path>;
class HuggingFaceMoe : public ::testing::TestWithParam<Case> {};

TEST_P(HuggingFaceMoe, LogitsLossAndEveryGradient) {
  const auto& [type, dtype, form] = GetParam();
  const ops::PathGuard guard(form);
  const auto fixture = read_tiny_safetensors(std::string(CAPSTAN_SOURCE_DIR "/tests/fixtures/nn/") +
                                             type + "_tiny.safetensors");
  const plan::ModelShape s = plan::from_hf_config(fixture.metadata.at("config"), type);
  testing::PlainStore store(plan::find_family(s.family).param_table(s),
                            {.values = dtype, .gradients = dtype});
  for (const auto& spec : store.table())
    store.value_of(spec.name).copy_(fixture.tensors.at("weight." + spec.name));
  ASSERT_EQ(fixture.tensors.size(), 4 + 2 * store.table().size());
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
                              fixture.tensors.at("gradient." + spec.name), tolerance))
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

INSTANTIATE_TEST_SUITE_P(
    Families, HuggingFaceMoe,
    ::testing::Combine(::testing::Values("mixtral", "qwen2_moe"),
                       ::testing::Values(at::kDouble, at::kFloat),
                       ::testing::Values(ops::Path::kFused, ops::Path::kReference)),
    [](const auto& instance) {
      return std::string(std::get<0>(instance.param)) + at::toString(std::get<1>(instance.param)) +
             (std::get<2>(instance.param) == ops::Path::kFused ? "Fused" : "Reference");
    });

}  // namespace
}  // namespace capstan::nn
