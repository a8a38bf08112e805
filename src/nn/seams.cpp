// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Seams on one device. Legend: B samples, T tokens, S keys, D hidden, N query heads, K key/value
// heads, H head size, X = N + 2K heads.
#include "capstan/nn/seams.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "capstan/base/check.h"
#include "capstan/ops/attention.h"
#include "capstan/ops/embedding.h"
#include "capstan/ops/head.h"
#include "capstan/ops/linear.h"
#include "capstan/ops/rope.h"

namespace capstan::nn {
namespace {

const param::RowMap& rows_of(const Context& context) {
  CAPSTAN_CHECK(context.rows, "a pass needs the map of its rows");
  return *context.rows;
}

// Attention of new tokens to everything that the cache holds, themselves included.
Tensor attend_cached(const Context& context, int layer, const Tensor& qkv_BTX,
                     const AttentionInput& in) {
  const at::NoGradGuard no_grad;
  const int64_t batch = qkv_BTX.size(0), tokens = qkv_BTX.size(1);
  const auto heads = [&](int64_t first, int64_t count) {
    return qkv_BTX.narrow(2, first * in.head_size, count * in.head_size)
        .view({batch, tokens, count, in.head_size});
  };
  const auto [k_BSKH, v_BSKH] =
      context.cache->append(layer, heads(in.query_heads, in.key_value_heads),
                            heads(in.query_heads + in.key_value_heads, in.key_value_heads));
  const ops::AttentionMask mask{.query_offset = k_BSKH.size(1) - tokens,
                                .sliding_window = in.spec.sliding_window,
                                .first_key_BT = rows_of(context).first_key_BT};
  const auto parts =
      ops::attention_forward(heads(0, in.query_heads), k_BSKH, v_BSKH, in.spec.scale, mask);
  return parts.out_BTNH.reshape({batch, tokens, in.query_heads * in.head_size});
}

}  // namespace

Tensor Seams::embed(const Context&, const Tensor& ids_BT, const Param& table_VD,
                    at::ScalarType residual) {
  return ops::embedding(ids_BT, table_VD, residual);
}

Tensor Seams::positions(const Context& context, const Tensor& ids_BT) {
  const param::RowMap& rows = rows_of(context);
  CAPSTAN_CHECK(rows.positions_are_rows || rows.positions_BT.defined(),
                "positions are neither rows nor given");
  if (!rows.positions_BT.defined())
    return at::arange(ids_BT.size(1), ids_BT.options()).expand(ids_BT.sizes());
  CAPSTAN_CHECK(rows.positions_BT.sizes() == ids_BT.sizes(), "{} positions for {} tokens",
                rows.positions_BT.numel(), ids_BT.numel());
  return rows.positions_BT;
}

std::vector<Tensor> Seams::column(const Context&, const Tensor& x_BTD,
                                  std::span<const Projection> projections) {
  std::vector<Tensor> outputs;
  outputs.reserve(projections.size());
  for (const Projection& projection : projections)
    outputs.push_back(ops::linear(x_BTD, projection));
  return outputs;
}

Tensor Seams::row(const Context&, const Tensor& y_BTO, const Projection& projection) {
  return ops::linear(y_BTO, projection);
}

ops::Activated Seams::column_gelu(const Context&, const Tensor& x_BTD, const Projection& projection,
                                  ops::GeluForm form) {
  return ops::linear_gelu(x_BTD, projection, form);
}

Tensor Seams::row(const Context&, const ops::Activated& y_BTO, const Projection& projection) {
  return ops::linear(y_BTO, projection);
}

Tensor Seams::turn_heads(const Context& context, int layer, const Tensor& qkv_BTX,
                         const AttentionInput& in) {
  if (!in.rotates) return qkv_BTX;
  const param::RowMap& rows = rows_of(context);
  CAPSTAN_CHECK(rows.positions_are_rows || rows.positions_BT.defined(),
                "layer {}: positions are neither rows nor given", layer);
  const Tensor positions_BT = rows.positions_are_rows ? Tensor() : rows.positions_BT;
  const ops::RopeSpec rope{.theta = in.rope_theta,
                           .head_size = in.head_size,
                           .heads = in.query_heads + in.key_value_heads,
                           .length = in.max_positions};
  if (!in.qk_norm) return ops::rope(qkv_BTX, positions_BT, rope);
  return ops::qk_norm_rope(qkv_BTX, positions_BT, in.qk_norm, in.query_heads, rope);
}

Tensor Seams::attend(const Context& context, int layer, const Tensor& qkv_BTX,
                     const AttentionInput& in) {
  const Tensor turned_BTX = turn_heads(context, layer, qkv_BTX, in);
  const param::RowMap& rows = rows_of(context);
  if (context.cache) return attend_cached(context, layer, turned_BTX, in);
  return ops::attention(turned_BTX,
                        {in.query_heads, in.key_value_heads, in.head_size, in.spec.scale},
                        {.sliding_window = in.spec.sliding_window,
                         .first_key_BT = rows.first_key_BT,
                         .documents = rows.documents});
}

TokenScores Seams::score(const Context&, const Tensor& hidden_BTD, const Projection& head,
                         const Tensor& targets_BT, const ScoreRequest& request) {
  return score_tokens(hidden_BTD, head, targets_BT, request, {});
}

TokenScores Seams::score_tokens(const Tensor& hidden_BTD, const Projection& head,
                                const Tensor& targets_BT, const ScoreRequest& request,
                                const ops::VocabularyCut& cut) {
  if (request.weights_BT.defined()) {
    CAPSTAN_CHECK(!request.entropy, "entropy is not available with fixed token weights");
    const auto weighted = ops::head_weighted_loss(hidden_BTD, head, targets_BT, request.weights_BT,
                                                  cut, request.uniform_BT);
    return {.logprob_BT = weighted.logprob_BT, .entropy_BT = {}, .weighted_loss = weighted.loss};
  }
  const auto scores = ops::head_scores(hidden_BTD, head, targets_BT, request.entropy, cut);
  return {.logprob_BT = scores.logprob_BT, .entropy_BT = scores.entropy_BT, .weighted_loss = {}};
}

Tensor Seams::last_tokens(const Context&, const Tensor& x_BTD, int64_t count) {
  const int64_t tokens = x_BTD.size(1);
  CAPSTAN_CHECK(count >= 1 && count <= tokens, "the last {} of {} tokens", count, tokens);
  return x_BTD.detach().narrow(1, tokens - count, count);
}

Tensor Seams::logits(const Context&, const Tensor& hidden_BTD, const Projection& head) {
  return ops::head_logits(hidden_BTD, head);
}

}  // namespace capstan::nn
