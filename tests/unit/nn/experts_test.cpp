// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Expert layers on one device against a dense loop with ordinary autograd. Legend: B rows, T tokens
// of a row, N = B T, D hidden, E experts, k choices.
#include "capstan/nn/experts.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <map>

#include "capstan/base/error.h"
#include "capstan/ops/path.h"
#include "capstan/plan/experts.h"
#include "support/gradient_check.h"
#include "support/plain_store.h"

namespace capstan::nn {
namespace {

using at::Tensor;
using testing::near;
using testing::normal;
using testing::PlainStore;

constexpr int64_t kRows = 3, kTokens = 10, kHidden = 8, kExperts = 6;
constexpr double kRowsOfStep = 12, kLossScale = 4;

plan::ModelShape shape_of(plan::ExpertShape e) {
  plan::ModelShape s;
  s.family = "moe";
  s.vocab_size = 11;
  s.hidden_size = kHidden;
  s.num_hidden_layers = 1;
  s.num_attention_heads = s.num_key_value_heads = 1;
  s.head_dim = 2;
  s.initializer_range = 0.5;
  e.count = kExperts;
  e.intermediate_size = 5;
  s.experts = e;
  return s;
}

class Sink final : public param::StatSink {
 public:
  void add(const char* name, int layer, const Tensor& value) override {
    EXPECT_EQ(layer, 0);
    EXPECT_TRUE(values.emplace(name, value).second) << name;
  }
  [[nodiscard]] double number(const std::string& name) const {
    return values.at(name).to(at::kDouble).item<double>();
  }
  std::map<std::string, Tensor> values;
};

// One layer, one batch, one pass.
struct Layer {
  plan::ModelShape shape;
  PlainStore store;
  ExpertInput input;
  std::vector<param::RouterState> states{1};
  Sink sink;
  param::RowMap rows;

  explicit Layer(const plan::ExpertShape& e, testing::PlainStoreOptions options = {})
      : shape(shape_of(e)), store(plan::find_family("moe").param_table(shape), options) {
    const auto find = [&](const std::string& name) {
      return store.find("model.layers.0." + name + ".weight");
    };
    const plan::ExpertNames& names = plan::expert_names("moe");
    input.shape = shape.experts;
    input.router.parts = {find(names.router)};
    for (int i = 0; i < kExperts; ++i) {
      input.gate_up.push_back({{find(names.of(i, names.gate)), find(names.of(i, names.up))}, {}});
      input.down.push_back({{find(names.of(i, names.down))}, {}});
    }
    states[0].bias_E = 0.2 * normal({kExperts}, 12);
    states[0].fractions_E = at::softmax(normal({kExperts}, 13), 0);
  }
  [[nodiscard]] Context context(param::Mode mode = param::Mode::kTrain) {
    return {.mode = mode,
            .rows = &rows,
            .stats = mode == param::Mode::kTrain ? &sink : nullptr,
            .rows_of_step = kRowsOfStep,
            .loss_scale = kLossScale,
            .routers = states};
  }
  Tensor run(const Tensor& x_BTD, const Context& with) {
    Seams seams;
    return seams.experts(with, 0, x_BTD, input);
  }
};

Tensor leaf(const Tensor& x) { return x.detach().clone().requires_grad_(true); }

// The same with every expert on every token, given the choices.
struct Dense {
  std::map<std::string, Tensor> weights;
  Tensor x_BTD, out_BTD, loss;  // loss: auxiliary, before the loss scale
  Tensor keep_Nk;

  Dense(Layer& layer, const Tensor& x, const Tensor& experts_Nk);
  [[nodiscard]] Tensor weight(const std::string& name) const {
    return weights.at("model.layers.0.mlp." + name + ".weight");
  }
};

Tensor keep_by_definition(const plan::ExpertShape& e, const Tensor& experts_Nk) {
  const Tensor keep = at::ones(experts_Nk.sizes(), at::kBool);
  if (!e.capacity_factor) return keep;
  const double even = static_cast<double>(kTokens * e.per_token) / kExperts;
  const auto capacity = static_cast<int64_t>(std::ceil(*e.capacity_factor * even - 1e-9));
  for (int64_t b = 0; b < kRows; ++b) {
    std::map<int64_t, int64_t> taken;
    for (int64_t n = b * kTokens; n < (b + 1) * kTokens; ++n)
      for (int64_t j = 0; j < e.per_token; ++j)
        keep[n][j] = taken[experts_Nk[n][j].item<int64_t>()]++ < capacity;
  }
  return keep;
}

Tensor losses_by_definition(Layer& layer, const Tensor& logits_NE, const Tensor& scores_NE,
                            const Tensor& experts_Nk) {
  const plan::ExpertShape& e = layer.shape.experts;
  const Tensor shares = scores_NE / scores_NE.sum(-1, true);
  Tensor loss = at::zeros({}, at::kDouble);
  for (int64_t b = 0; b < kRows; ++b) {
    const auto row = [&](const Tensor& t) { return t.narrow(0, b * kTokens, kTokens); };
    const Tensor counts_E = at::bincount(row(experts_Nk).flatten(), {}, kExperts).to(at::kDouble);
    const Tensor load_E = e.auxiliary_scope == "global"
                              ? layer.states[0].fractions_E
                              : counts_E / static_cast<double>(kTokens * e.per_token);
    loss = loss + e.auxiliary_loss * kExperts * (load_E * row(shares).mean(0)).sum();
    loss = loss + e.z_loss * at::logsumexp(row(logits_NE), -1).square().mean();
  }
  return loss / kRowsOfStep;
}

Dense::Dense(Layer& layer, const Tensor& x, const Tensor& experts_Nk) : x_BTD(leaf(x)) {
  const plan::ExpertShape& e = layer.shape.experts;
  for (const auto& spec : layer.store.table())
    weights[spec.name] = leaf(layer.store.value_of(spec.name));
  const Tensor x_ND = x_BTD.view({-1, kHidden});
  const Tensor logits = at::matmul(x_ND, weight("gate").t());
  const Tensor scores = e.router == "sigmoid" ? at::sigmoid(logits) : at::softmax(logits, -1);
  Tensor chosen = scores.gather(1, experts_Nk);
  if (e.normalize_weights) chosen = chosen / chosen.sum(-1, true);
  keep_Nk = keep_by_definition(e, experts_Nk);
  chosen = chosen * e.scaling * keep_Nk;
  Tensor out = at::zeros_like(x_ND);
  for (int64_t i = 0; i < kExperts; ++i) {
    const auto part = [&](const char* name) {
      return weight("experts." + std::to_string(i) + "." + name);
    };
    const Tensor y = at::matmul(
        at::silu(at::matmul(x_ND, part("gate_proj").t())) * at::matmul(x_ND, part("up_proj").t()),
        part("down_proj").t());
    out = out + y * (chosen * experts_Nk.eq(i)).sum(-1, true);
  }
  out_BTD = out.view(x_BTD.sizes());
  loss = losses_by_definition(layer, logits, scores, experts_Nk);
}

std::vector<plan::ExpertShape> shapes() {
  using E = plan::ExpertShape;
  return {E{.per_token = 2},
          E{.per_token = 1, .normalize_weights = false},
          E{.per_token = 6, .scaling = 0.5},
          E{.per_token = 2, .auxiliary_loss = 0.3},
          E{.per_token = 2, .auxiliary_loss = 0.3, .auxiliary_scope = "global", .z_loss = 0.1},
          E{.per_token = 2, .router = "sigmoid", .auxiliary_loss = 0.2, .z_loss = 0.05},
          E{.per_token = 3,
            .router = "sigmoid",
            .groups = 3,
            .groups_per_token = 2,
            .scaling = 2.5,
            .bias_update_rate = 0.01},
          E{.per_token = 2, .auxiliary_loss = 0.3, .capacity_factor = 1.0},
          E{.per_token = 3, .router = "sigmoid", .capacity_factor = 0.3},
          E{.per_token = 2, .capacity_factor = 100.0}};
}

class ExpertForms : public ::testing::TestWithParam<ops::Path> {
 protected:
  ops::PathGuard guard_{GetParam()};
};

TEST_P(ExpertForms, OutputLossesAndEveryGradientEqualADenseLoop) {
  int64_t dropped = 0;
  for (const plan::ExpertShape& e : shapes()) {
    Layer layer(e, {.deferred = true});
    const Tensor x = leaf(normal({kRows, kTokens, kHidden}, 3));
    const Tensor w = normal({kRows, kTokens, kHidden}, 4);
    const Tensor y = layer.run(x, layer.context());
    torch::autograd::backward({y}, {w});
    layer.store.run_deferred();
    const Tensor chosen = layer.sink.values.at("chosen_experts");
    Dense dense(layer, x, chosen);
    torch::autograd::backward({(dense.out_BTD * w).sum() + kLossScale * dense.loss}, {});
    EXPECT_TRUE(near(y.detach(), dense.out_BTD.detach()));
    EXPECT_TRUE(near(x.grad(), dense.x_BTD.grad()));
    for (const auto& [name, weight] : dense.weights) {
      if (!weight.grad().defined()) continue;
      EXPECT_TRUE(near(layer.store.gradient_of(name), weight.grad())) << name;
    }
    const auto loss_of = [&](double coefficient, const char* name) {
      return coefficient > 0 ? layer.sink.number(name) : 0;
    };
    EXPECT_NEAR(
        loss_of(e.auxiliary_loss, "router_auxiliary_loss") + loss_of(e.z_loss, "router_z_loss"),
        dense.loss.item<double>(), 1e-13);
    const double drops = dense.keep_Nk.logical_not().sum().item<double>();
    EXPECT_EQ(layer.sink.number("expert_dropped"), drops);
    dropped += static_cast<int64_t>(drops);
    EXPECT_EQ(layer.sink.number("router_tokens"), kRows * kTokens);
    EXPECT_TRUE(
        layer.sink.values.at("expert_tokens").equal(at::bincount(chosen.flatten(), {}, kExperts)));
    const Tensor scores = layer.sink.values.at("router_scores");
    const Tensor shares = scores / scores.sum(-1, true);
    EXPECT_NEAR(layer.sink.number("router_entropy"), -(shares * shares.log()).sum().item<double>(),
                1e-11);
  }
  EXPECT_GT(dropped, 20);
}

TEST_P(ExpertForms, MicroBatchesAddUp) {
  for (const plan::ExpertShape& e : shapes()) {
    Layer whole(e), parts(e);
    const Tensor x = normal({kRows, kTokens, kHidden}, 3), w = normal({kRows, kTokens, kHidden}, 4);
    const Tensor all = leaf(x);
    torch::autograd::backward({whole.run(all, whole.context())}, {w});
    double auxiliary = 0;
    std::vector<Tensor> grads;
    for (int64_t b = 0; b < kRows; ++b) {
      const Tensor part = leaf(x.narrow(0, b, 1));
      parts.sink.values.clear();
      torch::autograd::backward({parts.run(part, parts.context())}, {w.narrow(0, b, 1)});
      grads.push_back(part.grad());
      if (e.auxiliary_loss > 0) auxiliary += parts.sink.number("router_auxiliary_loss");
    }
    EXPECT_TRUE(near(at::cat(grads), all.grad()));
    if (e.auxiliary_loss > 0) {
      EXPECT_NEAR(auxiliary, whole.sink.number("router_auxiliary_loss"), 1e-14);
    }
    for (const auto& spec : whole.store.table()) {
      if (!whole.store.has_gradient(spec.name)) continue;
      EXPECT_TRUE(near(parts.store.gradient_of(spec.name), whole.store.gradient_of(spec.name)))
          << spec.name;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Experts, ExpertForms,
                         ::testing::Values(ops::Path::kFused, ops::Path::kReference),
                         [](const auto& instance) {
                           return std::string(instance.param == ops::Path::kFused ? "Fused"
                                                                                  : "Reference");
                         });

TEST(Experts, OnlyTrainingReportsAndOnlyBackwardsPay) {
  const plan::ExpertShape e{.per_token = 2, .auxiliary_loss = 0.3, .z_loss = 0.1};
  const Tensor x = normal({kRows, kTokens, kHidden}, 3), w = normal({kRows, kTokens, kHidden}, 4);
  Layer first(e), again(e), eval(e);
  const Tensor xa = leaf(x), xb = leaf(x);
  torch::autograd::backward({first.run(xa, first.context())}, {w});
  Context recompute = again.context(param::Mode::kRecompute);
  recompute.stats = &again.sink;  // passed by mistake: still silent
  torch::autograd::backward({again.run(xb, recompute)}, {w});
  EXPECT_TRUE(again.sink.values.empty());
  EXPECT_TRUE(xa.grad().equal(xb.grad()));
  at::NoGradGuard no_grad;
  Context context = eval.context(param::Mode::kEval);
  context.rows_of_step = 0;
  EXPECT_TRUE(eval.run(x, context).equal(eval.run(x, eval.context(param::Mode::kEval))));
  // The first pass of a recomputed block has no graph; its statistics are those of the step.
  (void)eval.run(x, eval.context());
  EXPECT_EQ(eval.sink.number("router_z_loss"), first.sink.number("router_z_loss"));
}

TEST(Experts, DecodingDropsNothing) {
  Layer tight({.per_token = 2, .capacity_factor = 0.2}), loose({.per_token = 2});
  at::NoGradGuard no_grad;
  const Tensor x = normal({kRows, kTokens, kHidden}, 3);
  const auto mode = param::Mode::kDecode;
  EXPECT_TRUE(tight.run(x, tight.context(mode)).equal(loose.run(x, loose.context(mode))));
  EXPECT_FALSE(tight.run(x, tight.context(param::Mode::kEval))
                   .equal(loose.run(x, loose.context(param::Mode::kEval))));
}

TEST(Experts, WhatBalancingNeedsMustBeThere) {
  const Tensor x = leaf(normal({kRows, kTokens, kHidden}, 3));
  const auto fails = [&](const plan::ExpertShape& e, const std::function<void(Context&)>& change) {
    Layer layer(e);
    Context context = layer.context();
    change(context);
    EXPECT_THROW((void)layer.run(x, context), InternalError);
  };
  fails({.per_token = 2, .auxiliary_loss = 0.1}, [](Context& c) { c.rows_of_step = 0; });
  fails({.per_token = 2, .z_loss = 0.1}, [](Context& c) { c.rows_of_step = 0; });
  fails({.per_token = 2, .bias_update_rate = 0.1}, [](Context& c) { c.routers = {}; });
  const param::RouterState empty;
  fails({.per_token = 2, .bias_update_rate = 0.1},
        [&](Context& c) { c.routers = std::span(&empty, 1); });
  fails({.per_token = 2, .auxiliary_loss = 0.1, .auxiliary_scope = "global"},
        [&](Context& c) { c.routers = std::span(&empty, 1); });
  Layer half({.per_token = 2});
  half.input.gate_up.resize(3);
  EXPECT_THROW((void)half.run(x, half.context()), InternalError);
}

TEST(Experts, FrozenWeightsPassTheGradientOn) {
  const plan::ExpertShape e{.per_token = 2, .auxiliary_loss = 0.3};
  testing::PlainStoreOptions options;
  for (const auto& spec : plan::find_family("moe").param_table(shape_of(e)))
    options.frozen.push_back(spec.name);
  Layer frozen(e, options), free(e);
  const Tensor x = leaf(normal({kRows, kTokens, kHidden}, 3)), same = leaf(x);
  const Tensor w = normal({kRows, kTokens, kHidden}, 4);
  torch::autograd::backward({frozen.run(x, frozen.context())}, {w});
  torch::autograd::backward({free.run(same, free.context())}, {w});
  EXPECT_TRUE(x.grad().equal(same.grad()));
  EXPECT_FALSE(frozen.store.has_gradient("model.layers.0.mlp.gate.weight"));
  EXPECT_FALSE(
      frozen.run(x.detach(), {.mode = param::Mode::kEval, .rows = &frozen.rows}).requires_grad());
}

}  // namespace
}  // namespace capstan::nn
