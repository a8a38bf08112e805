// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "capstan/ops/path.h"
#include "support/gradient_check.h"
#include "unit/nn/plain_llama.h"

namespace capstan::nn {
namespace {

using at::Tensor;
using testing::near;
using testing::PlainStore;
using testing::PlainStoreOptions;

plan::ModelShape tiny() {
  plan::ModelShape s;
  s.vocab_size = 31;
  s.hidden_size = 24;
  s.intermediate_size = 20;
  s.num_hidden_layers = 2;
  s.num_attention_heads = 4;
  s.num_key_value_heads = 2;
  s.head_dim = 8;
  s.max_position_embeddings = 64;
  s.rope_theta = 500;
  s.initializer_range = 0.15;
  return s;
}

PlainStore make_store(const plan::ModelShape& s, PlainStoreOptions options = {}) {
  return PlainStore(plan::find_family("llama").param_table(s), options);
}
Model make_model(const plan::ModelShape& s, PlainStore& store, at::ScalarType compute = at::kDouble,
                 at::ScalarType residual = at::kDouble) {
  return build_model(s, {compute, residual},
                     [&](const std::string& name) { return store.find(name); });
}

struct Batch {
  Tensor ids, targets, weights;
};
Batch make_batch(const plan::ModelShape& s, int64_t samples, int64_t tokens, int64_t seed = 0) {
  const Tensor mixed = (at::arange(samples * (tokens + 1), at::kLong) * 7919 + seed * 31).square();
  const Tensor text = mixed.remainder(s.vocab_size).view({samples, tokens + 1});
  Tensor targets = text.slice(1, 1).clone();
  targets[0][1] = -100;
  return {text.slice(1, 0, tokens).contiguous(), targets,
          testing::normal({samples, tokens}, 77).abs() + 0.01};
}

Tensor plain_loss(const Tensor& logits, const Batch& b) {
  const Tensor logp = at::log_softmax(logits, -1), valid = b.targets.ne(-100);
  const Tensor index = at::where(valid, b.targets, at::zeros_like(b.targets)).unsqueeze(-1);
  return -(logp.gather(-1, index).squeeze(-1) * valid.to(at::kDouble) * b.weights).sum();
}

void expect_equal_to_plain(const plan::ModelShape& s, const param::RowMap& rows,
                           PlainStoreOptions options) {
  PlainStore store = make_store(s, options);
  const Model model = make_model(s, store);
  const Batch batch = make_batch(s, 2, 13);
  const BlockwiseRun run = run_blockwise(model, rows, batch.ids, batch.targets, batch.weights);
  store.run_deferred();
  const Weights weights = leaves_of(store);
  const Tensor positions = rows.positions_are_rows ? Tensor() : rows.positions_BT;
  const Tensor loss =
      plain_loss(plain_logits(s, weights, {batch.ids, rows.first_key_BT, positions}), batch);
  torch::autograd::backward({loss}, {});
  EXPECT_TRUE(near(run.loss, loss));
  for (const auto& [name, leaf] : weights)
    EXPECT_TRUE(near(store.gradient_of(name), leaf.grad())) << name;
}

class LlamaForms : public ::testing::TestWithParam<ops::Path> {};

TEST_P(LlamaForms, LossAndEveryGradientEqualPlainAutograd) {
  const ops::PathGuard guard(GetParam());
  for (const bool tied : {false, true})
    for (const bool bias : {false, true})
      for (const bool joined : {true, false}) {
        SCOPED_TRACE(fmt::format("tied {} bias {} joined {}", tied, bias, joined));
        plan::ModelShape s = tiny();
        s.tie_word_embeddings = tied;
        s.attention_bias = s.attention_output_bias = bias;
        expect_equal_to_plain(s, {}, {.joined = joined, .deferred = joined});
      }
}

// Biases on q, k and v alone, as Qwen2; norms of their heads, as Qwen3; and both.
TEST_P(LlamaForms, BiasesOfQkvAndNormsOfHeads) {
  const ops::PathGuard guard(GetParam());
  for (const bool joined : {true, false})
    for (const bool bias : {false, true})
      for (const bool output_bias : {false, true})
        for (const bool qk_norm : {false, true}) {
          SCOPED_TRACE(
              fmt::format("joined {} bias {} {} norm {}", joined, bias, output_bias, qk_norm));
          plan::ModelShape s = tiny();
          s.rms_norm_eps = 0.01;
          s.attention_bias = bias;
          s.attention_output_bias = output_bias;
          s.qk_norm = qk_norm;
          expect_equal_to_plain(s, {}, {.joined = joined, .deferred = joined});
        }
}

TEST_P(LlamaForms, DocumentsWindowsAndPositions) {
  const ops::PathGuard guard(GetParam());
  param::RowMap rows;
  rows.first_key_BT = at::tensor({0, 0, 0, 3, 3, 3, 3, 3, 8, 8, 8, 8, 8}, at::kInt).repeat({2, 1});
  rows.positions_BT = (at::arange(13, at::kInt) - rows.first_key_BT).to(at::kLong);
  rows.positions_are_rows = false;
  plan::ModelShape s = tiny();
  expect_equal_to_plain(s, rows, {});
  s.qk_norm = true;
  expect_equal_to_plain(s, rows, {});
  s.qk_norm = false;
  s.sliding_window = 4;
  expect_equal_to_plain(s, rows, {});
  expect_equal_to_plain(s, {}, {});
}

TEST_P(LlamaForms, HeadRatios) {
  const ops::PathGuard guard(GetParam());
  for (const auto& [heads, key_heads] :
       {std::pair<int64_t, int64_t>{4, 4}, {4, 1}, {6, 3}, {1, 1}}) {
    plan::ModelShape s = tiny();
    s.num_attention_heads = heads;
    s.num_key_value_heads = key_heads;
    expect_equal_to_plain(s, {}, {});
  }
}

INSTANTIATE_TEST_SUITE_P(Forms, LlamaForms,
                         ::testing::Values(ops::Path::kFused, ops::Path::kReference),
                         [](const auto& instance) {
                           return std::string(instance.param == ops::Path::kFused ? "Fused"
                                                                                  : "Reference");
                         });

TEST(Llama, GradientsMatchDifferences) {
  const plan::ModelShape s = tiny();
  PlainStore store = make_store(s);
  const Model model = make_model(s, store);
  const Batch batch = make_batch(s, 1, 7);
  run_blockwise(model, {}, batch.ids, batch.targets, batch.weights);
  const auto loss = [&] {
    at::NoGradGuard no_grad;
    return run_blockwise(model, {}, batch.ids, batch.targets, batch.weights).loss.item<double>();
  };
  for (const auto& spec : store.table())
    EXPECT_TRUE(testing::is_gradient(loss, store.value_of(spec.name),
                                     store.gradient_of(spec.name).clone(), 6))
        << spec.name;
}

TEST(Llama, DocumentsEqualRunsOfTheirOwn) {
  const plan::ModelShape s = tiny();
  PlainStore store = make_store(s), alone = make_store(s);
  const Model model = make_model(s, store), single = make_model(s, alone);
  const Batch batch = make_batch(s, 1, 13);
  param::RowMap rows;
  rows.first_key_BT = at::tensor({0, 0, 0, 0, 4, 4, 4, 4, 4, 4, 4, 4, 12}, at::kInt).view({1, 13});
  rows.positions_BT = (at::arange(13, at::kInt) - rows.first_key_BT).to(at::kLong);
  rows.positions_are_rows = false;
  const BlockwiseRun packed = run_blockwise(model, rows, batch.ids, batch.targets, batch.weights);
  std::vector<Tensor> logprobs;
  for (const auto& [begin, count] : {std::pair<int64_t, int64_t>{0, 4}, {4, 8}, {12, 1}}) {
    const auto cut = [&](const Tensor& x) { return x.narrow(1, begin, count).contiguous(); };
    logprobs.push_back(
        run_blockwise(single, {}, cut(batch.ids), cut(batch.targets), cut(batch.weights))
            .logprob_BT);
  }
  EXPECT_TRUE(near(packed.logprob_BT, at::cat(logprobs, 1)));
  for (const auto& spec : store.table())
    EXPECT_TRUE(near(store.gradient_of(spec.name), alone.gradient_of(spec.name))) << spec.name;
}

TEST(Llama, MicroBatchesAddUp) {
  const plan::ModelShape s = tiny();
  PlainStore whole = make_store(s), parts = make_store(s);
  const Batch batch = make_batch(s, 4, 9);
  run_blockwise(make_model(s, whole), {}, batch.ids, batch.targets, batch.weights);
  const Model model = make_model(s, parts);
  for (int64_t i = 0; i < 4; ++i)
    run_blockwise(model, {}, batch.ids.narrow(0, i, 1), batch.targets.narrow(0, i, 1),
                  batch.weights.narrow(0, i, 1));
  for (const auto& spec : whole.table())
    EXPECT_TRUE(near(parts.gradient_of(spec.name), whole.gradient_of(spec.name))) << spec.name;
}

TEST(Llama, NarrowPrecisionsFollowFp64) {
  const plan::ModelShape s = tiny();
  PlainStore exact = make_store(s);
  const Batch batch = make_batch(s, 2, 13);
  const double want =
      run_blockwise(make_model(s, exact), {}, batch.ids, batch.targets, batch.weights)
          .loss.item<double>();
  for (const auto& [compute, residual, limit] : {std::tuple{at::kFloat, at::kFloat, 1e-6},
                                                 {at::kBFloat16, at::kFloat, 2e-2},
                                                 {at::kBFloat16, at::kBFloat16, 2e-2},
                                                 {at::kHalf, at::kFloat, 2e-3}}) {
    PlainStore store = make_store(s, {.values = compute, .gradients = at::kFloat});
    const BlockwiseRun run = run_blockwise(make_model(s, store, compute, residual), {}, batch.ids,
                                           batch.targets, batch.weights);
    EXPECT_NEAR(run.loss.item<double>(), want, limit * want) << at::toString(compute);
    const Tensor got = store.gradient_of("model.layers.0.mlp.up_proj.weight").to(at::kDouble);
    const Tensor ref = exact.gradient_of("model.layers.0.mlp.up_proj.weight");
    EXPECT_LT((got - ref).norm().item<double>(), 3 * limit * ref.norm().item<double>())
        << at::toString(compute);
  }
}

TEST(Llama, FrozenBlocksTakeNoGradient) {
  const plan::ModelShape s = tiny();
  PlainStoreOptions options;
  for (const auto& spec : plan::find_family("llama").param_table(s))
    if (spec.block <= 1) options.frozen.push_back(spec.name);
  PlainStore store = make_store(s, options), free = make_store(s);
  const Batch batch = make_batch(s, 2, 8);
  run_blockwise(make_model(s, free), {}, batch.ids, batch.targets, batch.weights);
  // The frozen embedding needs no backward at all: only blocks with a graph are run.
  const Model model = make_model(s, store);
  Seams seams;
  const param::RowMap rows;
  const Context context{.rows = &rows};
  BlockIO io = model.embedding->forward(context, seams, batch.ids);
  EXPECT_FALSE(io.residual_BTD.requires_grad());
  io = model.layers[0]->forward(context, seams, io);
  EXPECT_FALSE(io.hidden_BTD.requires_grad());
  io = model.layers[1]->forward(context, seams, io);
  const TokenScores scores =
      model.head->score(context, seams, io, batch.targets, {.weights_BT = batch.weights});
  torch::autograd::backward({scores.weighted_loss}, {});
  for (const auto& spec : store.table()) {
    if (spec.block <= 1)
      EXPECT_FALSE(store.has_gradient(spec.name)) << spec.name;
    else
      EXPECT_TRUE(near(store.gradient_of(spec.name), free.gradient_of(spec.name))) << spec.name;
  }
}

}  // namespace
}  // namespace capstan::nn
