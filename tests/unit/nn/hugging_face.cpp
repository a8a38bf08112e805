// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "unit/nn/hugging_face.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>

#include "unit/nn/plain_llama.h"

namespace capstan::nn {

void expect_recorded(const TinySafetensors& fixture, const plan::ModelShape& s,
                     at::ScalarType dtype, const testing::Tolerance& tolerance,
                     const ReadRecorded& read) {
  testing::PlainStore store(plan::find_family(s.family).param_table(s),
                            {.values = dtype, .gradients = dtype});
  for (const auto& spec : store.table())
    store.value_of(spec.name).copy_(read("weight.", spec.name));
  const Model model =
      build_model(s, {dtype, dtype}, [&](const std::string& n) { return store.find(n); });
  const at::Tensor &ids = fixture.tensors.at("ids"), &targets = fixture.tensors.at("targets");
  const double count = static_cast<double>(targets.ne(-100).sum().item<int64_t>());
  const BlockwiseRun run =
      run_blockwise(model, {}, ids, targets, at::full(targets.sizes(), 1 / count, at::kDouble));
  EXPECT_TRUE(testing::near(run.loss.view({1}), fixture.tensors.at("loss"), tolerance));
  for (const auto& spec : store.table())
    EXPECT_TRUE(
        testing::near(store.gradient_of(spec.name), read("gradient.", spec.name), tolerance))
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

}  // namespace capstan::nn
