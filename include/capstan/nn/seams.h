// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Seams: the places where a layout cuts into the computation. The base class is the one-device
// form; parallel derives the tensor, sequence, context and expert parallel ones. Local sizes come
// from the tensors. Legend: B samples, T tokens of a row, D hidden, O output features, N query
// heads, K key/value heads, H head size.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <span>
#include <vector>

#include "capstan/ops/head.h"
#include "capstan/ops/linear_gelu.h"
#include "capstan/ops/qk_norm.h"
#include "capstan/param/context.h"
#include "capstan/param/param.h"

namespace capstan::nn {

using at::Tensor;
using param::Context;
using param::Param;
using param::Projection;

struct AttentionSpec {
  double scale = 0;                       // softmax(scale * q k^T)
  std::optional<int64_t> sliding_window;  // keys seen, own position included
};

struct AttentionInput {
  int64_t query_heads = 0, key_value_heads = 0, head_size = 0;
  bool rotates = true;  // RoPE on q and k, else they are used as they are
  ops::QkNorm qk_norm;  // before RoPE, where it has weights
  double rope_theta = 10000.0;
  int64_t max_positions = 0;
  AttentionSpec spec;
};

// What is wanted for each target token. Targets of -100 are ignored: score 0, weight 0.
struct ScoreRequest {
  // Known token weights w [B, T] (loss scale included): the head computes sum_t w_t * loss_t and
  // makes its gradient in the forward pass, so the backward seed must be 1. Undefined: per-token
  // scores with an ordinary backward.
  Tensor weights_BT;
  // fp64 in (0, 1), with weights: targets that are not ignored become labels drawn at these
  // (ops::head_weighted_loss).
  Tensor uniform_BT = {};
  bool entropy = false;
};
struct TokenScores {
  Tensor logprob_BT;     // log p(target); fp32, or fp64 when compute is fp64. Differentiable unless
                         // weights were given
  Tensor entropy_BT;     // when asked for
  Tensor weighted_loss;  // 0-d, differentiable, when weights were given
};

struct ExpertInput;  // experts.h

class Seams {
 public:
  virtual ~Seams() = default;
  virtual Tensor embed(const Context& context, const Tensor& ids_BT, const Param& table_VD,
                       at::ScalarType residual);
  // Positions of the tokens that this rank has of embed(), int64 [B, t], by the map of the pass:
  // for tables of learned positions.
  virtual Tensor positions(const Context& context, const Tensor& ids_BT);
  // Several projections share one gather of x. Returns one output [B, T, O] per projection.
  virtual std::vector<Tensor> column(const Context& context, const Tensor& x_BTD,
                                     std::span<const Projection> projections);
  virtual Tensor row(const Context& context, const Tensor& y_BTO, const Projection& projection);
  // GELU behind the one, in front of the other: column(), and row() of its activation, whose
  // backward goes to the sum.
  virtual ops::Activated column_gelu(const Context& context, const Tensor& x_BTD,
                                     const Projection& projection, ops::GeluForm form);
  virtual Tensor row(const Context& context, const ops::Activated& y_BTO,
                     const Projection& projection);
  // qkv_BTX holds q, k, v side by side before RoPE ([N*H | K*H | K*H]); returns [B, T, N*H].
  virtual Tensor attend(const Context& context, int layer, const Tensor& qkv_BTX,
                        const AttentionInput& input);
  // The chosen experts of every token; shared experts are column and row layers beside it. The
  // input must not be written to afterwards.
  virtual Tensor experts(const Context& context, int layer, const Tensor& x_BTD,
                         const ExpertInput& input);
  virtual TokenScores score(const Context& context, const Tensor& hidden_BTD,
                            const Projection& head, const Tensor& targets_BT,
                            const ScoreRequest& request);
  // The last `count` tokens of each whole row, [B, count, D], wherever a layout keeps them; every
  // rank that shares the row gets them. No gradient.
  virtual Tensor last_tokens(const Context& context, const Tensor& x_BTD, int64_t count);
  // Logits [..., V] of the whole vocabulary, without padding, for tokens that every rank of the
  // tensor axis holds (last_tokens). No gradient.
  virtual Tensor logits(const Context& context, const Tensor& hidden_BTD, const Projection& head);

 protected:
  // RoPE on the q and k heads by the positions of the pass, unless input says no, behind their norm
  // where it has one; consumes qkv.
  [[nodiscard]] static Tensor turn_heads(const Context& context, int layer, const Tensor& qkv_BTX,
                                         const AttentionInput& input);
  // score() for any cut of the vocabulary.
  [[nodiscard]] static TokenScores score_tokens(const Tensor& hidden_BTD, const Projection& head,
                                                const Tensor& targets_BT,
                                                const ScoreRequest& request,
                                                const ops::VocabularyCut& cut);
};

}  // namespace capstan::nn
