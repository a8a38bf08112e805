// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Legend: B samples, T tokens, D hidden, X features of all heads.
#include "capstan/parallel/parallel_seams.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <utility>

#include "capstan/base/check.h"
#include "capstan/ops/head.h"
#include "capstan/ops/linear.h"
#include "capstan/parallel/context_split.h"
#include "capstan/parallel/expert_parallel.h"
#include "parallel/context_all_to_all_internal.h"
#include "parallel/ring_attention_internal.h"
#include "parallel/sequence_cut_internal.h"
#include "parallel/tensor_linear_internal.h"

namespace capstan::parallel {
namespace {

// The map must describe the zig-zag part that the ring computes its masks for.
void check_rows(const param::RowMap& rows, const comm::Communicator& context, int64_t tokens) {
  const int64_t length = tokens * context.size();
  CAPSTAN_CHECK(!rows.positions_are_rows && rows.positions_BT.defined(),
                "context parallel: a part of a row needs the positions of its tokens");
  CAPSTAN_CHECK(rows.row_length == length,
                "context parallel: rows of {} tokens, but {} ranks hold {} each", rows.row_length,
                context.size(), tokens);
  CAPSTAN_CHECK(rows.row_index_T.defined() && rows.row_index_T.numel() == tokens,
                "context parallel: {} tokens without their places in the row", tokens);
  int64_t local = 0;
  for (const RowRange& range : context_ranges(length, context.size(), context.rank())) {
    const auto first = rows.row_index_T[local].item<int64_t>();
    const auto last = rows.row_index_T[local + range.size() - 1].item<int64_t>();
    CAPSTAN_CHECK(first == range.begin && last == range.end - 1,
                  "context parallel: local tokens {} to {} are {} to {} of the row, rank {} of {} "
                  "holds {} to {} (zig-zag)",
                  local, local + range.size() - 1, first, last, context.rank(), context.size(),
                  range.begin, range.end - 1);
    local += range.size();
  }
}

Tensor whole_rows(const comm::Communicator& context, const Tensor& x_BtD) {
  std::vector<int64_t> sizes = x_BtD.sizes().vec();
  sizes.insert(sizes.begin(), context.size());
  const Tensor parts = at::empty(sizes, x_BtD.options().requires_grad(false));
  context.all_gather(parts, x_BtD.contiguous()).wait();
  return join_sequence(parts.unbind(0));
}

}  // namespace

ParallelSeams::ParallelSeams(ParallelSeamsOptions options) : options_(std::move(options)) {
  CAPSTAN_CHECK(!options_.sequence_parallel || options_.tensor.size() > 1,
                "sequence parallel cuts over the tensor axis, which has one rank");
}

TensorCut ParallelSeams::cut(const nn::Context& context) const {
  const bool sequence = options_.sequence_parallel && context.mode != param::Mode::kDecode;
  return {options_.tensor, sequence, sequence && options_.overlap_chunks, linear(context)};
}

ops::LinearMode ParallelSeams::linear(const nn::Context& context) const {
  if (context.mode == param::Mode::kDecode) return {};
  return {.fp8 = options_.fp8.get(), .observes = context.mode == param::Mode::kTrain};
}

bool ParallelSeams::splits_rows(const nn::Context& context) const {
  return options_.context.size() > 1 && context.mode != param::Mode::kDecode;
}

Tensor ParallelSeams::embed(const nn::Context& context, const Tensor& ids_BT,
                            const nn::Param& table_VD, at::ScalarType residual) {
  if (options_.tensor.size() == 1) return Seams::embed(context, ids_BT, table_VD, residual);
  return vocabulary_embedding(cut(context), ids_BT, table_VD, residual);
}

Tensor ParallelSeams::positions(const nn::Context& context, const Tensor& ids_BT) {
  const Tensor all_BT = Seams::positions(context, ids_BT);
  if (!cut(context).sequence) return all_BT;
  const int64_t tokens = all_BT.size(1) / options_.tensor.size();
  return all_BT.narrow(1, options_.tensor.rank() * tokens, tokens).contiguous();
}

std::vector<Tensor> ParallelSeams::column(const nn::Context& context, const Tensor& x_BTD,
                                          std::span<const nn::Projection> projections) {
  if (options_.tensor.size() > 1) return column_linear(cut(context), x_BTD, projections);
  std::vector<Tensor> outputs;
  for (const nn::Projection& projection : projections)
    outputs.push_back(ops::linear(x_BTD, projection, true, linear(context)));
  return outputs;
}

Tensor ParallelSeams::row(const nn::Context& context, const Tensor& y_BTO,
                          const nn::Projection& projection) {
  if (options_.tensor.size() > 1) return row_linear(cut(context), y_BTO, projection);
  return ops::linear(y_BTO, projection, true, linear(context));
}

ops::Activated ParallelSeams::column_gelu(const nn::Context& context, const Tensor& x_BTD,
                                          const nn::Projection& projection, ops::GeluForm form) {
  if (options_.tensor.size() > 1) return column_gelu_linear(cut(context), x_BTD, projection, form);
  return ops::linear_gelu(x_BTD, projection, form, linear(context));
}

Tensor ParallelSeams::row(const nn::Context& context, const ops::Activated& y_BTO,
                          const nn::Projection& projection) {
  if (options_.tensor.size() > 1) return row_linear(cut(context), y_BTO, projection);
  return ops::linear(y_BTO, projection, true, linear(context));
}

Tensor ParallelSeams::attend(const nn::Context& context, int layer, const Tensor& qkv_BTX,
                             const nn::AttentionInput& in) {
  if (!splits_rows(context)) return Seams::attend(context, layer, qkv_BTX, in);
  CAPSTAN_CHECK(context.rows, "a pass needs the map of its rows");
  check_rows(*context.rows, options_.context, qkv_BTX.size(1));
  const ContextAttention call{
      .group = options_.context,
      .heads = {in.query_heads, in.key_value_heads, in.head_size, in.spec.scale},
      .sliding_window = in.spec.sliding_window,
      .first_key_Bt = context.rows->first_key_BT,
      .documents = context.rows->documents,
      .lowest_first_key = context.rows->lowest_first_key};
  const Tensor turned_BTX = turn_heads(context, layer, qkv_BTX, in);
  return options_.all_to_all ? all_to_all_attention(call, turned_BTX)
                             : ring_attention(call, turned_BTX);
}

Tensor ParallelSeams::experts(const nn::Context& context, int layer, const Tensor& x_BTD,
                              const nn::ExpertInput& input) {
  CAPSTAN_CHECK(options_.rows.size() == options_.tensor.size() * options_.context.size(),
                "experts need the group of the tensor and context axes together");
  return parallel_experts({.expert = options_.expert,
                           .tensor = options_.tensor,
                           .rows = options_.rows,
                           .sequence_parallel = options_.sequence_parallel},
                          context, layer, x_BTD, input);
}

nn::TokenScores ParallelSeams::score(const nn::Context& context, const Tensor& hidden_BTD,
                                     const nn::Projection& head, const Tensor& targets_BT,
                                     const nn::ScoreRequest& request) {
  if (options_.tensor.size() == 1)
    return Seams::score(context, hidden_BTD, head, targets_BT, request);
  return score_tokens(hidden_BTD, head, targets_BT, request, vocabulary_cut(cut(context)));
}

Tensor ParallelSeams::last_tokens(const nn::Context& context, const Tensor& x_BTD, int64_t count) {
  at::NoGradGuard no_grad;
  Tensor whole = x_BTD.detach();
  if (cut(context).sequence) whole = gather_sequence(options_.tensor, whole);
  if (splits_rows(context)) whole = whole_rows(options_.context, whole);
  return Seams::last_tokens(context, whole, count);
}

Tensor ParallelSeams::logits(const nn::Context& context, const Tensor& hidden_BTD,
                             const nn::Projection& head) {
  if (options_.tensor.size() == 1) return Seams::logits(context, hidden_BTD, head);
  return vocabulary_logits(cut(context), hidden_BTD, head);
}

}  // namespace capstan::parallel
