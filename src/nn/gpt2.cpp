// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Legend: B samples, T tokens, D hidden, F MLP features, N heads, H head size, X = 3 N H, V
// vocabulary, P positions. Local sizes: under a layout N, F, V are those of the rank.
#include "nn/gpt2_internal.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <cmath>

#include "capstan/base/error.h"
#include "capstan/ops/embedding.h"
#include "capstan/ops/gelu.h"
#include "capstan/ops/layer_norm.h"
#include "nn/llama_internal.h"

namespace capstan::nn {
namespace {

struct LayerNorm {
  Param weight_D, bias_D;
  double eps = 0;
  ops::NormOutput output = ops::NormOutput::kKept;

  [[nodiscard]] ops::AddLayerNorm operator()(const Tensor& residual, const Tensor& hidden) const {
    return ops::add_layer_norm(residual, hidden, weight_D, bias_D, eps, output);
  }
};

LayerNorm find_norm(const FindParam& find, const std::string& name, double eps) {
  return {.weight_D = find(name + ".weight"), .bias_D = find(name + ".bias"), .eps = eps};
}

struct Gpt2Embedding final : Embedding {
  Param table_VD, positions_PD;
  at::ScalarType residual;

  BlockIO forward(const Context& context, Seams& seams, const Tensor& ids_BT) const override {
    const Tensor tokens_BTD = seams.embed(context, ids_BT, table_VD, residual);
    const Tensor places_BTD =
        ops::embedding(seams.positions(context, ids_BT), positions_PD, residual);
    return {.hidden_BTD = {}, .residual_BTD = tokens_BTD + places_BTD, .extras = {}};
  }
};

struct Gpt2Layer final : Block {
  int index = 0;
  AttentionInput attention;  // heads of the whole model; local numbers follow from the weights
  plan::RemadeParts remade;
  ops::GeluForm activation = ops::GeluForm::kTanh;
  LayerNorm before_attention, before_mlp;
  Projection qkv, o, up, down;

  BlockIO forward(const Context& context, Seams& seams, const BlockIO& in) const override {
    const auto before = before_attention(in.residual_BTD, in.hidden_BTD);
    const auto between = before_mlp(before.residual, attend(context, seams, before.normed));
    return {.hidden_BTD = mlp(context, seams, between.normed),
            .residual_BTD = between.residual,
            .extras = in.extras};
  }

  Tensor attend(const Context& context, Seams& seams, const Tensor& x_BTD) const {
    const auto attended = [&seams, this](const Context& pass, const Tensor& x) {
      AttentionInput local = attention;
      local.query_heads = qkv.parts[0].local().local_shape[0] / attention.head_size;
      local.key_value_heads = local.query_heads;
      const Tensor qkv_BTX = seams.column(pass, x, {&qkv, 1}).front();
      return seams.attend(pass, index, qkv_BTX, local);
    };
    return seams.row(context, run_part(remade.attention, context, x_BTD, attended), o);
  }

  Tensor mlp(const Context& context, Seams& seams, const Tensor& x_BTD) const {
    if (!remade.mlp)
      return seams.row(context, seams.column_gelu(context, x_BTD, up, activation), down);
    const auto activated = [&seams, this](const Context& pass, const Tensor& x) {
      return ops::activation_of(seams.column_gelu(pass, x, up, activation));
    };
    return seams.row(context, run_part(true, context, x_BTD, activated), down);
  }
};

struct Gpt2Head final : Head {
  LayerNorm last;
  Projection head;

  TokenScores score(const Context& context, Seams& seams, const BlockIO& in,
                    const Tensor& targets_BT, const ScoreRequest& request) const override {
    return seams.score(context, last(in.residual_BTD, in.hidden_BTD).normed, head, targets_BT,
                       request);
  }

  Tensor logits(const Context& context, Seams& seams, const BlockIO& in,
                int64_t count) const override {
    const at::NoGradGuard no_grad;
    const auto tail = [&](const Tensor& x) {
      return x.defined() ? seams.last_tokens(context, x, count) : x;
    };
    return seams.logits(context, last(tail(in.residual_BTD), tail(in.hidden_BTD)).normed, head);
  }
};

void check_shape(const plan::ModelShape& shape) {
  const bool is_gelu = shape.hidden_act == "gelu" || shape.hidden_act == "gelu_pytorch_tanh";
  if (is_gelu && shape.num_key_value_heads == shape.num_attention_heads) return;
  throw ConfigError(ErrorText{
      .module = "nn",
      .what = "building a gpt2 model",
      .got = "hidden_act '" + shape.hidden_act + "', " + std::to_string(shape.num_key_value_heads) +
             " key/value heads for " + std::to_string(shape.num_attention_heads) + " heads",
      .need = "gelu or gelu_pytorch_tanh, and as many of either",
      .why = "GPT-2 has no gate and shares no keys",
      .fix = ""});
}

std::unique_ptr<Block> build_layer(const plan::ModelShape& shape, const ModelOptions& options,
                                   const FindParam& find, int index) {
  const std::string prefix = "transformer.h." + std::to_string(index) + ".";
  const LayerParams params{find, prefix};
  auto layer = std::make_unique<Gpt2Layer>();
  layer->index = index;
  layer->attention = {.query_heads = shape.num_attention_heads,
                      .key_value_heads = shape.num_attention_heads,
                      .head_size = shape.head_dim,
                      .rotates = false,
                      .max_positions = shape.max_position_embeddings,
                      .spec = {.scale = 1 / std::sqrt(static_cast<double>(shape.head_dim)),
                               .sliding_window = std::nullopt}};
  layer->remade = options.remade;
  layer->activation = shape.hidden_act == "gelu" ? ops::GeluForm::kErf : ops::GeluForm::kTanh;
  layer->before_attention = find_norm(find, prefix + "ln_1", shape.layer_norm_eps);
  layer->before_mlp = find_norm(find, prefix + "ln_2", shape.layer_norm_eps);
  for (LayerNorm* norm : {&layer->before_attention, &layer->before_mlp})
    norm->output = options.remade.norm ? ops::NormOutput::kRemade : ops::NormOutput::kKept;
  layer->qkv = params.projection({"attn.q_proj", "attn.k_proj", "attn.v_proj"}, true);
  layer->o = params.projection({"attn.c_proj"}, true);
  layer->up = params.projection({"mlp.c_fc"}, true);
  layer->down = params.projection({"mlp.c_proj"}, true);
  return layer;
}

}  // namespace

Model build_gpt2(const plan::ModelShape& shape, const ModelOptions& options,
                 const FindParam& find) {
  check_shape(shape);
  Model model;
  model.shape = shape;
  auto embedding = std::make_unique<Gpt2Embedding>();
  embedding->table_VD = find("transformer.wte.weight");
  embedding->positions_PD = find("transformer.wpe.weight");
  embedding->residual = options.residual;
  model.embedding = std::move(embedding);
  for (int i = 0; i < shape.num_hidden_layers; ++i)
    model.layers.push_back(build_layer(shape, options, find, i));
  auto head = std::make_unique<Gpt2Head>();
  head->last = find_norm(find, "transformer.ln_f", shape.layer_norm_eps);
  head->head.parts = {
      find(shape.tie_word_embeddings ? "transformer.wte.weight" : "lm_head.weight")};
  model.head = std::move(head);
  return model;
}

}  // namespace capstan::nn
