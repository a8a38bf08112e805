// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "unit/nn/plain_llama.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>

namespace capstan::nn {
namespace {

using at::Tensor;

Tensor plain_norm(const Tensor& x, const Tensor& w, double eps) {
  return x / (x * x).mean(-1, true).add(eps).sqrt() * w;
}

Tensor plain_turn(const Tensor& x_BNTH, const Tensor& positions_BT, double theta) {
  const int64_t size = x_BNTH.size(3), half = size / 2;
  const Tensor inverse =
      at::pow(theta, at::arange(0, size, 2, at::kDouble) / -static_cast<double>(size));
  const Tensor angle =
      (positions_BT.to(at::kDouble).unsqueeze(-1) * inverse).repeat({1, 1, 2}).unsqueeze(1);
  const Tensor swapped = at::cat({-x_BNTH.slice(-1, half), x_BNTH.slice(-1, 0, half)}, -1);
  const auto dtype = x_BNTH.scalar_type();
  return x_BNTH * angle.cos().to(dtype) + swapped * angle.sin().to(dtype);
}

Tensor allowed_of(const plan::ModelShape& s, const PlainInput& in) {
  const int64_t tokens = in.ids_BT.size(1);
  const Tensor q = at::arange(tokens, at::kLong).view({1, tokens, 1}), k = q.view({1, 1, tokens});
  Tensor allow = k <= q;
  if (s.sliding_window) allow = allow.logical_and(q - k < *s.sliding_window);
  if (in.first_key_BT.defined())
    allow = allow.logical_and(k >= in.first_key_BT.to(at::kLong).unsqueeze(-1));
  return allow.unsqueeze(1);
}

}  // namespace

Tensor plain_logits(const plan::ModelShape& s, const Weights& w, const PlainInput& in) {
  const int64_t batch = in.ids_BT.size(0), tokens = in.ids_BT.size(1);
  const int64_t groups = s.num_attention_heads / s.num_key_value_heads;
  const Tensor positions = in.positions_BT.defined()
                               ? in.positions_BT
                               : at::arange(tokens, at::kLong).unsqueeze(0).expand({batch, tokens});
  const Tensor allow = allowed_of(s, in);
  Tensor x = at::embedding(w.at("model.embed_tokens.weight"), in.ids_BT);
  for (int i = 0; i < s.num_hidden_layers; ++i) {
    const std::string prefix = "model.layers." + std::to_string(i) + ".";
    const auto p = [&](const std::string& name) { return w.at(prefix + name + ".weight"); };
    const auto project = [&](const Tensor& in_x, const std::string& name) {
      const auto bias = w.find(prefix + name + ".bias");
      const Tensor y = at::matmul(in_x, p(name).t());
      return bias == w.end() ? y : y + bias->second;
    };
    const Tensor h = plain_norm(x, p("input_layernorm"), s.rms_norm_eps);
    const auto heads = [&](const char* name) {
      return project(h, std::string("self_attn.") + name)
          .view({batch, tokens, -1, s.head_dim})
          .transpose(1, 2);
    };
    const auto turned = [&](const char* name, const char* norm) {
      Tensor x_BNTH = heads(name);
      if (s.qk_norm)
        x_BNTH = plain_norm(x_BNTH, p(std::string("self_attn.") + norm), s.rms_norm_eps);
      return plain_turn(x_BNTH, positions, s.rope_theta);
    };
    const Tensor q = turned("q_proj", "q_norm");
    const Tensor k = turned("k_proj", "k_norm").repeat_interleave(groups, 1);
    const Tensor v = heads("v_proj").repeat_interleave(groups, 1);
    const Tensor scores =
        (at::matmul(q, k.transpose(-1, -2)) / std::sqrt(static_cast<double>(s.head_dim)))
            .masked_fill(allow.logical_not(), -1e300);
    const Tensor a =
        at::matmul(at::softmax(scores, -1), v).transpose(1, 2).reshape({batch, tokens, -1});
    x = x + project(a, "self_attn.o_proj");
    const Tensor m = plain_norm(x, p("post_attention_layernorm"), s.rms_norm_eps);
    x = x +
        project(at::silu(project(m, "mlp.gate_proj")) * project(m, "mlp.up_proj"), "mlp.down_proj");
  }
  const char* const head = s.tie_word_embeddings ? "model.embed_tokens.weight" : "lm_head.weight";
  return at::matmul(plain_norm(x, w.at("model.norm.weight"), s.rms_norm_eps), w.at(head).t());
}

Weights leaves_of(testing::PlainStore& store) {
  Weights weights;
  for (const auto& spec : store.table())
    weights[spec.name] = store.value_of(spec.name).clone().requires_grad_(true);
  return weights;
}

namespace {

BlockIO detached(const BlockIO& io) {
  const auto cut = [](const Tensor& x) {
    return x.defined() ? x.detach().requires_grad_(at::GradMode::is_enabled()) : x;
  };
  return {.hidden_BTD = cut(io.hidden_BTD), .residual_BTD = cut(io.residual_BTD), .extras = {}};
}

void backward_block(const BlockIO& out, const BlockIO& next_in) {
  std::vector<Tensor> outputs, grads;
  const auto add = [&](const Tensor& o, const Tensor& leaf) {
    if (!o.defined() || !leaf.grad().defined()) return;
    outputs.push_back(o);
    grads.push_back(leaf.grad());
  };
  add(out.hidden_BTD, next_in.hidden_BTD);
  add(out.residual_BTD, next_in.residual_BTD);
  torch::autograd::backward(outputs, grads);
}

}  // namespace

BlockwiseRun run_blockwise(const Model& model, const param::RowMap& rows, const Tensor& ids_BT,
                           const Tensor& targets_BT, const Tensor& weights_BT) {
  Seams seams;
  const Context context{.rows = &rows};
  std::vector<BlockIO> outs{model.embedding->forward(context, seams, ids_BT)}, ins;
  for (const auto& layer : model.layers) {
    ins.push_back(detached(outs.back()));
    outs.push_back(layer->forward(context, seams, ins.back()));
  }
  ins.push_back(detached(outs.back()));
  const TokenScores scores =
      model.head->score(context, seams, ins.back(), targets_BT, {.weights_BT = weights_BT});
  if (at::GradMode::is_enabled()) {
    torch::autograd::backward({scores.weighted_loss}, {});
    for (size_t i = outs.size(); i-- > 0;) backward_block(outs[i], ins[i]);
  }
  return {scores.weighted_loss.detach(), scores.logprob_BT};
}

}  // namespace capstan::nn
