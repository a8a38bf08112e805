// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>

#include "capstan/base/error.h"
#include "support/gradient_check.h"
#include "support/growing_cache.h"
#include "unit/nn/plain_llama.h"

namespace capstan::nn {
namespace {

using at::Tensor;

plan::ModelShape small_shape(std::optional<int64_t> window) {
  plan::ModelShape s;
  s.vocab_size = 29;
  s.hidden_size = 16;
  s.intermediate_size = 24;
  s.num_hidden_layers = 3;
  s.num_attention_heads = 4;
  s.num_key_value_heads = 2;
  s.head_dim = 6;
  s.max_position_embeddings = 32;
  s.initializer_range = 0.2;
  s.sliding_window = window;
  return s;
}

Tensor logits_of(const Model& model, const Context& context, const Tensor& ids, int64_t count) {
  Seams seams;
  at::NoGradGuard no_grad;
  BlockIO io = model.embedding->forward(context, seams, ids);
  for (const auto& layer : model.layers) io = layer->forward(context, seams, io);
  return model.head->logits(context, seams, io, count);
}

TEST(Decode, CachedStepsEqualTheFullForward) {
  for (const auto dtype : {at::kDouble, at::kFloat})
    for (const std::optional<int64_t> window :
         {std::optional<int64_t>{}, std::optional<int64_t>{5}}) {
      const plan::ModelShape s = small_shape(window);
      testing::PlainStore store(plan::find_family("llama").param_table(s),
                                {.values = dtype, .gradients = dtype});
      const Model model =
          build_model(s, {dtype, dtype}, [&](const std::string& n) { return store.find(n); });
      const Tensor ids = (at::arange(2 * 17, at::kLong) * 13).remainder(29).view({2, 17});
      const param::RowMap whole;
      const Tensor want = logits_of(model, {.mode = param::Mode::kEval, .rows = &whole}, ids, 17);
      EXPECT_EQ(want.sizes(), (std::vector<int64_t>{2, 17, 29}));

      test::GrowingCache cache;
      std::vector<Tensor> steps;
      for (const int64_t count : {7, 1, 1, 4, 1, 3}) {  // prompt, single tokens, chunks
        const int64_t done = cache.length();
        param::RowMap rows;
        rows.positions_BT = at::arange(done, done + count, at::kLong).expand({2, count});
        rows.positions_are_rows = false;
        steps.push_back(logits_of(model,
                                  {.mode = param::Mode::kDecode, .rows = &rows, .cache = &cache},
                                  ids.narrow(1, done, count), count));
      }
      EXPECT_EQ(cache.length(), 17);
      EXPECT_TRUE(testing::near(at::cat(steps, 1), want));
    }
}

TEST(Decode, LastLogitsAreTheTailOfAll) {
  const plan::ModelShape s = small_shape({});
  testing::PlainStore store(plan::find_family("llama").param_table(s), {});
  const Model model = build_model(s, {at::kDouble, at::kDouble},
                                  [&](const std::string& n) { return store.find(n); });
  const Tensor ids = at::arange(10, at::kLong).view({1, 10});
  const param::RowMap rows;
  const Context context{.mode = param::Mode::kEval, .rows = &rows};
  const Tensor all = logits_of(model, context, ids, 10);
  EXPECT_TRUE(testing::near(logits_of(model, context, ids, 1), all.narrow(1, 9, 1)));
  EXPECT_THROW((void)logits_of(model, context, ids, 11), InternalError);
}

TEST(Decode, PassWithoutRowsIsRefused) {
  const plan::ModelShape s = small_shape({});
  testing::PlainStore store(plan::find_family("llama").param_table(s), {});
  const Model model = build_model(s, {at::kDouble, at::kDouble},
                                  [&](const std::string& n) { return store.find(n); });
  EXPECT_THROW((void)logits_of(model, {}, at::zeros({1, 3}, at::kLong), 1), InternalError);
}

}  // namespace
}  // namespace capstan::nn
