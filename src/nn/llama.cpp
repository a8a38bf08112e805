// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Legend: B samples, T tokens, D hidden, F MLP features, N query heads, K key/value heads, H head
// size, X = (N + 2K) H, V vocabulary. Local sizes: under a layout N, K, F, V are those of the rank.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <cmath>

#include "capstan/base/error.h"
#include "capstan/ops/norm.h"
#include "capstan/ops/swiglu.h"
#include "nn/llama_internal.h"

namespace capstan::nn {
namespace {

struct LlamaEmbedding final : Embedding {
  Param table_VD;
  at::ScalarType residual;

  BlockIO forward(const Context& context, Seams& seams, const Tensor& ids_BT) const override {
    return {.hidden_BTD = {},
            .residual_BTD = seams.embed(context, ids_BT, table_VD, residual),
            .extras = {}};
  }
};

struct LlamaLayer final : DecoderLayer {
  Projection gate_up, down;

  LlamaLayer(const plan::ModelShape& shape, const ModelOptions& options, int number,
             const LayerParams& params)
      : DecoderLayer(shape, options, number, params),
        gate_up(params.projection({"mlp.gate_proj", "mlp.up_proj"})),
        down(params.projection({"mlp.down_proj"})) {}

  Tensor mlp(const Context& context, Seams& seams, const Tensor& x_BTD) const override {
    const auto gated = [&seams, this](const Context& pass, const Tensor& x) {
      return ops::swiglu(seams.column(pass, x, {&gate_up, 1}).front());
    };
    return seams.row(context, run_part(remade.mlp, context, x_BTD, gated), down);
  }
};

struct LlamaHead final : Head {
  double eps = 0;
  Param norm_D;
  Projection head;

  TokenScores score(const Context& context, Seams& seams, const BlockIO& in,
                    const Tensor& targets_BT, const ScoreRequest& request) const override {
    const auto last = ops::add_rms_norm(in.residual_BTD, in.hidden_BTD, norm_D, eps);
    return seams.score(context, last.normed, head, targets_BT, request);
  }

  Tensor logits(const Context& context, Seams& seams, const BlockIO& in,
                int64_t count) const override {
    const at::NoGradGuard no_grad;
    const auto tail = [&](const Tensor& x) {
      return x.defined() ? seams.last_tokens(context, x, count) : x;
    };
    const auto last = ops::add_rms_norm(tail(in.residual_BTD), tail(in.hidden_BTD), norm_D, eps);
    return seams.logits(context, last.normed, head);
  }
};

void check_shape(const plan::ModelShape& shape) {
  if (shape.hidden_act == "silu" && shape.head_dim % 2 == 0) return;
  throw ConfigError(ErrorText{
      .module = "nn",
      .what = "building a " + shape.family + " model",
      .got = "hidden_act '" + shape.hidden_act + "', head_dim " + std::to_string(shape.head_dim),
      .need = "silu and an even head_dim",
      .why = "the MLP is SwiGLU and RoPE turns pairs",
      .fix = ""});
}

}  // namespace

Projection LayerParams::projection(const std::vector<std::string>& names, bool with_bias) const {
  Projection result;
  for (const std::string& name : names) {
    result.parts.push_back(weight(name));
    if (with_bias) result.bias.push_back(find(prefix + name + ".bias"));
  }
  return result;
}

DecoderLayer::DecoderLayer(const plan::ModelShape& shape, const ModelOptions& options, int layer,
                           const LayerParams& params)
    : index(layer),
      eps(shape.rms_norm_eps),
      attention{.query_heads = shape.num_attention_heads,
                .key_value_heads = shape.num_key_value_heads,
                .head_size = shape.head_dim,
                .rope_theta = shape.rope_theta,
                .max_positions = shape.max_position_embeddings,
                .spec = {.scale = 1 / std::sqrt(static_cast<double>(shape.head_dim)),
                         .sliding_window = shape.sliding_window}},
      remade(options.remade),
      input_norm_D(params.weight("input_layernorm")),
      post_norm_D(params.weight("post_attention_layernorm")),
      qkv(params.projection({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
                            shape.attention_bias)),
      o(params.projection({"self_attn.o_proj"}, shape.attention_output_bias)) {
  if (!shape.qk_norm) return;
  attention.qk_norm = {.q_weight_H = params.weight("self_attn.q_norm"),
                       .k_weight_H = params.weight("self_attn.k_norm"),
                       .eps = shape.rms_norm_eps};
}

BlockIO DecoderLayer::forward(const Context& context, Seams& seams, const BlockIO& in) const {
  const auto norm = [&](const Tensor& residual, const Tensor& hidden, const Param& weight_D) {
    return ops::add_rms_norm(residual, hidden, weight_D, eps,
                             remade.norm ? ops::NormOutput::kRemade : ops::NormOutput::kKept);
  };
  const auto before = norm(in.residual_BTD, in.hidden_BTD, input_norm_D);
  const Tensor attended_BTD = attend(context, seams, before.normed);
  const auto between = norm(before.residual, attended_BTD, post_norm_D);
  return {.hidden_BTD = mlp(context, seams, between.normed),
          .residual_BTD = between.residual,
          .extras = in.extras};
}

Tensor DecoderLayer::attend(const Context& context, Seams& seams, const Tensor& x_BTD) const {
  const auto attended = [&seams, this](const Context& pass, const Tensor& x) {
    const Tensor qkv_BTX = seams.column(pass, x, {&qkv, 1}).front();
    return seams.attend(pass, index, qkv_BTX, local_attention());
  };
  return seams.row(context, run_part(remade.attention, context, x_BTD, attended), o);
}

AttentionInput DecoderLayer::local_attention() const {
  AttentionInput local = attention;
  local.query_heads = qkv.parts[0].local().local_shape[0] / attention.head_size;
  local.key_value_heads = qkv.parts[1].local().local_shape[0] / attention.head_size;
  return local;
}

Model build_decoder(const plan::ModelShape& shape, const ModelOptions& options,
                    const FindParam& find, const LayerBuilder& layer) {
  check_shape(shape);
  Model model;
  model.shape = shape;
  auto embedding = std::make_unique<LlamaEmbedding>();
  embedding->table_VD = find("model.embed_tokens.weight");
  embedding->residual = options.residual;
  model.embedding = std::move(embedding);
  for (int i = 0; i < shape.num_hidden_layers; ++i)
    model.layers.push_back(layer(i, LayerParams{find, "model.layers." + std::to_string(i) + "."}));
  auto head = std::make_unique<LlamaHead>();
  head->eps = shape.rms_norm_eps;
  head->norm_D = find("model.norm.weight");
  head->head.parts = {
      find(shape.tie_word_embeddings ? "model.embed_tokens.weight" : "lm_head.weight")};
  model.head = std::move(head);
  return model;
}

Model build_llama(const plan::ModelShape& shape, const ModelOptions& options,
                  const FindParam& find) {
  return build_decoder(shape, options, find, [&](int index, const LayerParams& params) {
    return std::make_unique<LlamaLayer>(shape, options, index, params);
  });
}

}  // namespace capstan::nn
