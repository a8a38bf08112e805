// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// GPT-2 against the same model written the ordinary way: autograd leaves and ATen ops only.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>

#include "capstan/base/error.h"
#include "capstan/ops/path.h"
#include "support/gradient_check.h"
#include "support/growing_cache.h"
#include "unit/nn/plain_llama.h"

namespace capstan::nn {
namespace {

using at::Tensor;
using testing::near;
using testing::PlainStore;
using testing::PlainStoreOptions;

plan::ModelShape tiny() {
  plan::ModelShape s;
  s.family = "gpt2";
  s.vocab_size = 31;
  s.hidden_size = 24;
  s.intermediate_size = 20;
  s.num_hidden_layers = 2;
  s.num_attention_heads = s.num_key_value_heads = 4;
  s.head_dim = 6;
  s.max_position_embeddings = 16;
  s.hidden_act = "gelu_pytorch_tanh";
  s.layer_norm_eps = 1e-4;
  s.attention_bias = s.attention_output_bias = s.tie_word_embeddings = true;
  s.initializer_range = 0.15;
  return s;
}

// Biases and norms that are not neutral.
PlainStore make_store(const plan::ModelShape& s, PlainStoreOptions options = {}) {
  auto table = plan::find_family("gpt2").param_table(s);
  for (plan::ParamSpec& spec : table)
    if (spec.shape.size() == 1) spec.init = {plan::Init::Kind::kNormal, 0.5};
  return PlainStore(std::move(table), std::move(options));
}
Model make_model(const plan::ModelShape& s, PlainStore& store, at::ScalarType compute = at::kDouble,
                 at::ScalarType residual = at::kDouble) {
  return build_model(s, {compute, residual},
                     [&](const std::string& name) { return store.find(name); });
}

struct Batch {
  Tensor ids, targets, weights;
};
Batch make_batch(const plan::ModelShape& s, int64_t samples, int64_t tokens) {
  const Tensor mixed = (at::arange(samples * (tokens + 1), at::kLong) * 7919 + 31).square();
  const Tensor text = mixed.remainder(s.vocab_size).view({samples, tokens + 1});
  Tensor targets = text.slice(1, 1).clone();
  targets[0][1] = -100;
  return {text.slice(1, 0, tokens).contiguous(), targets,
          testing::normal({samples, tokens}, 77).abs() + 0.01};
}

Tensor plain_loss(const plan::ModelShape& s, const Weights& w, const Batch& b,
                  const param::RowMap& rows) {
  const int64_t samples = b.ids.size(0), tokens = b.ids.size(1);
  const Tensor place = at::arange(tokens, at::kLong);
  Tensor allow = (place.view({1, 1, tokens}) <= place.view({1, tokens, 1}));
  if (rows.first_key_BT.defined())
    allow = allow.logical_and(place >= rows.first_key_BT.to(at::kLong).unsqueeze(-1));
  const Tensor positions =
      rows.positions_are_rows ? place.expand({samples, tokens}) : rows.positions_BT;
  const auto norm = [&](const Tensor& x, const std::string& name) {
    return at::layer_norm(x, {s.hidden_size}, w.at(name + ".weight"), w.at(name + ".bias"),
                          s.layer_norm_eps);
  };
  const auto project = [&](const Tensor& x, const std::string& name) {
    return at::matmul(x, w.at(name + ".weight").t()) + w.at(name + ".bias");
  };
  const Tensor& table = w.at("transformer.wte.weight");
  Tensor x = at::embedding(table, b.ids) + at::embedding(w.at("transformer.wpe.weight"), positions);
  for (int i = 0; i < s.num_hidden_layers; ++i) {
    const std::string prefix = "transformer.h." + std::to_string(i) + ".";
    const Tensor h = norm(x, prefix + "ln_1");
    const auto heads = [&](const char* name) {
      return project(h, prefix + "attn." + name)
          .view({samples, tokens, -1, s.head_dim})
          .transpose(1, 2);
    };
    const Tensor q = heads("q_proj"), k = heads("k_proj"), v = heads("v_proj");
    const Tensor scores =
        (at::matmul(q, k.transpose(-1, -2)) / std::sqrt(static_cast<double>(s.head_dim)))
            .masked_fill(allow.unsqueeze(1).logical_not(), -1e300);
    const Tensor a = at::matmul(at::softmax(scores, -1), v).transpose(1, 2);
    x = x + project(a.reshape({samples, tokens, -1}), prefix + "attn.c_proj");
    const Tensor up = project(norm(x, prefix + "ln_2"), prefix + "mlp.c_fc");
    x = x + project(at::gelu(up, s.hidden_act == "gelu" ? "none" : "tanh"), prefix + "mlp.c_proj");
  }
  const Tensor& head = s.tie_word_embeddings ? table : w.at("lm_head.weight");
  const Tensor logp = at::log_softmax(at::matmul(norm(x, "transformer.ln_f"), head.t()), -1);
  const Tensor valid = b.targets.ne(-100);
  const Tensor index = at::where(valid, b.targets, at::zeros_like(b.targets)).unsqueeze(-1);
  return -(logp.gather(-1, index).squeeze(-1) * valid.to(at::kDouble) * b.weights).sum();
}

void expect_equal_to_plain(const plan::ModelShape& s, const param::RowMap& rows,
                           PlainStoreOptions options = {}) {
  PlainStore store = make_store(s, std::move(options));
  const Model model = make_model(s, store);
  const Batch batch = make_batch(s, 2, 13);
  const BlockwiseRun run = run_blockwise(model, rows, batch.ids, batch.targets, batch.weights);
  store.run_deferred();
  const Weights weights = leaves_of(store);
  const Tensor loss = plain_loss(s, weights, batch, rows);
  torch::autograd::backward({loss}, {});
  EXPECT_TRUE(near(run.loss, loss));
  for (const auto& [name, leaf] : weights)
    EXPECT_TRUE(near(store.gradient_of(name), leaf.grad())) << name;
}

param::RowMap three_documents() {
  param::RowMap rows;
  rows.first_key_BT = at::tensor({0, 0, 0, 3, 3, 3, 3, 3, 8, 8, 8, 8, 8}, at::kInt).repeat({2, 1});
  rows.positions_BT = (at::arange(13, at::kInt) - rows.first_key_BT).to(at::kLong);
  rows.positions_are_rows = false;
  return rows;
}

class Gpt2Forms : public ::testing::TestWithParam<ops::Path> {};

TEST_P(Gpt2Forms, LossAndEveryGradientEqualPlainAutograd) {
  const ops::PathGuard guard(GetParam());
  for (const char* act : {"gelu", "gelu_pytorch_tanh"})
    for (const bool tied : {false, true})
      for (const bool joined : {true, false}) {
        SCOPED_TRACE(fmt::format("{} tied {} joined {}", act, tied, joined));
        plan::ModelShape s = tiny();
        s.hidden_act = act;
        s.tie_word_embeddings = tied;
        expect_equal_to_plain(s, {}, {.joined = joined, .deferred = joined});
      }
}

TEST_P(Gpt2Forms, DocumentsRestartPositions) {
  const ops::PathGuard guard(GetParam());
  expect_equal_to_plain(tiny(), three_documents());
}

TEST_P(Gpt2Forms, HeadsOfAnyWidth) {
  const ops::PathGuard guard(GetParam());
  for (const int64_t heads : {1, 3, 8}) {
    plan::ModelShape s = tiny();
    s.num_attention_heads = s.num_key_value_heads = heads;
    s.head_dim = s.hidden_size / heads;
    expect_equal_to_plain(s, {});
  }
}

TEST_P(Gpt2Forms, PartsMadeAgainGiveTheSameGradients) {
  const ops::PathGuard guard(GetParam());
  const plan::ModelShape s = tiny();
  PlainStore kept = make_store(s), again = make_store(s);
  const Batch batch = make_batch(s, 2, 13);
  run_blockwise(make_model(s, kept), {}, batch.ids, batch.targets, batch.weights);
  const Model model = build_model(s,
                                  {.compute = at::kDouble,
                                   .residual = at::kDouble,
                                   .remade = {.attention = true, .mlp = true, .norm = true}},
                                  [&](const std::string& name) { return again.find(name); });
  run_blockwise(model, {}, batch.ids, batch.targets, batch.weights);
  for (const auto& spec : kept.table())
    EXPECT_TRUE(at::equal(again.gradient_of(spec.name), kept.gradient_of(spec.name))) << spec.name;
}

INSTANTIATE_TEST_SUITE_P(Forms, Gpt2Forms,
                         ::testing::Values(ops::Path::kFused, ops::Path::kReference),
                         [](const auto& instance) {
                           return std::string(instance.param == ops::Path::kFused ? "Fused"
                                                                                  : "Reference");
                         });

TEST(Gpt2, NarrowPrecisionsFollowFp64) {
  const plan::ModelShape s = tiny();
  const std::string name = "transformer.h.0.mlp.c_fc.weight";
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
    const Tensor got = store.gradient_of(name).to(at::kDouble), ref = exact.gradient_of(name);
    EXPECT_LT((got - ref).norm().item<double>(), 3 * limit * ref.norm().item<double>())
        << at::toString(compute);
  }
}

Tensor logits_of(const Model& model, const Context& context, const Tensor& ids) {
  Seams seams;
  at::NoGradGuard no_grad;
  BlockIO io = model.embedding->forward(context, seams, ids);
  for (const auto& layer : model.layers) io = layer->forward(context, seams, io);
  return model.head->logits(context, seams, io, ids.size(1));
}

TEST(Gpt2, CachedStepsEqualTheFullForward) {
  const plan::ModelShape s = tiny();
  PlainStore store = make_store(s);
  const Model model = make_model(s, store);
  const Tensor ids = (at::arange(2 * 15, at::kLong) * 13).remainder(29).view({2, 15});
  const param::RowMap whole;
  const Tensor want = logits_of(model, {.mode = param::Mode::kEval, .rows = &whole}, ids);
  test::GrowingCache cache;
  std::vector<Tensor> steps;
  for (const int64_t count : {7, 1, 1, 4, 2}) {
    const int64_t done = cache.length();
    param::RowMap rows;
    rows.positions_BT = at::arange(done, done + count, at::kLong).expand({2, count});
    rows.positions_are_rows = false;
    steps.push_back(logits_of(model, {.mode = param::Mode::kDecode, .rows = &rows, .cache = &cache},
                              ids.narrow(1, done, count)));
  }
  EXPECT_TRUE(near(at::cat(steps, 1), want));
}

TEST(Gpt2, WhatItDoesNotHaveIsRefused) {
  PlainStore store = make_store(tiny());
  plan::ModelShape gated = tiny(), shared = tiny();
  gated.hidden_act = "silu";
  shared.num_key_value_heads = 2;
  EXPECT_THROW((void)make_model(gated, store), ConfigError);
  EXPECT_THROW((void)make_model(shared, store), ConfigError);
}

}  // namespace
}  // namespace capstan::nn
